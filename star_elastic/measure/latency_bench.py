"""Whole models of any widths on one machine, with clocks around their blocks.

Weights are random, and all models cut them from one piece of memory: time does not depend on them.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from star_elastic.architectures import ModelConfig
from star_elastic.architectures.config_file import Config
from star_elastic.axes import LAYERS
from star_elastic.axes.widths import Widths
from star_elastic.cost.latency import PHASES, Machine, layer_kinds
from star_elastic.errors import ConfigError
from star_elastic.models.skeleton import build_skeleton, build_skeleton_at

Progress = Callable[[int, int], None]
"""Told the seconds of measuring that are done, and how many there will be."""
REST = "rest"
"""Everything outside the blocks, beside the kinds of block."""
MIN_ROUNDS = 2
DECODE_STEPS = 3
"""Steps that count of one visit to a model that decodes, after one that does not."""
QUIET = 0.1
"""Of all repeats, the share that is taken for undisturbed: a time stands for its slowest."""
PATTERN = 1_000_003
"""Random weights repeat after so many elements (a prime, so that no two rows are equal)."""
ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is measured: the phase, sequences at once, tokens of context, dtype and device.

    `seconds` of measuring, after the models are built (three rounds at least). Of a model with more
    than `max_bytes` of weights only as many layers are built as fit, at least one of each kind.
    Raises ConfigError.
    """

    phase: str = "decode"
    batch: int = 1
    context: int = 256
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seconds: float = 60.0
    seed: int = 0
    max_bytes: int = 4 * 1024**3

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ConfigError(f"phase={self.phase!r} is unknown; use {' or '.join(PHASES)}")
        for name in ("batch", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not positive; use 1 or more")

    @property
    def machine(self) -> Machine:
        """This machine, as it is written into a table."""
        cuda = torch.device(self.device).type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else _cpu_name()
        return Machine(name, torch.get_num_threads(), torch.__version__)


def _cpu_name() -> str:
    """The processor's name, as Linux tells it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes(setting: Setting) -> int:
    """Memory of the device in all."""
    if torch.device(setting.device).type == "cuda":
        return torch.cuda.mem_get_info(setting.device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Bench:
    """Builds models of one config at any widths and visits them in shuffled rounds."""

    def __init__(self, config: Config, setting: Setting):
        self.config, self.setting = ModelConfig.of(config), setting
        self.axis_map = self.config.axis_map
        self.kinds = layer_kinds(self.axis_map)
        self.kept = self._kept_layers()
        self._generator = torch.Generator(setting.device).manual_seed(setting.seed)
        self._filler: dict[tuple[int, ...], torch.Tensor] = {}
        # The largest model comes first: the others cut their weights from its memory.
        full = self.widths(self.axis_map.full)
        self._first = build_skeleton(self.config.at(full))
        self._weights = self._random(sum(map(_aligned, self._first.parameters())))
        self._fill(self._first)

    def _kept_layers(self) -> tuple[int, ...]:
        """All layers if their weights fit, else as many as do, at least one of each kind. Raises
        ConfigError if not even those fit into the memory of this machine."""
        size: dict[int | None, int] = defaultdict(int)
        for spec in self.axis_map.tensors.values():
            count = math.prod(self.axis_map.shape(spec, self.axis_map.full))
            size[spec.layer] += count * self.setting.dtype.itemsize
        layers = range(len(self.kinds))
        kept = [layer for layer in layers if self.kinds.index(self.kinds[layer]) == layer]
        least, memory = size[None] + sum(size[layer] for layer in kept), _memory_bytes(self.setting)
        if least > memory:
            raise ConfigError(
                f"the embeddings and one layer of each kind take {least:,} bytes, but there are "
                f"{memory:,} here; measure on a larger machine, or correct config.json"
            )
        room = self.setting.max_bytes - least
        for layer in layers:
            if layer not in kept and size[layer] <= room:
                kept.append(layer)
                room -= size[layer]
        return tuple(sorted(kept))

    def widths(self, widths: Mapping) -> Widths:
        """The widths of the model that is built: with the layers that are kept."""
        present = tuple(int(layer in self.kept) for layer in range(len(self.kinds)))
        return self.axis_map.complete({**widths, LAYERS: present})

    def model(self, widths: Widths, *, clocked: bool) -> ClockedModel:
        """A model of `widths`, with clocks around its blocks or only around the whole."""
        model = build_skeleton_at(self.config, self.widths(widths), self._first)
        self._fill(model)
        return ClockedModel(self, widths, model.requires_grad_(False).eval(), clocked)

    def _fill(self, model: PreTrainedModel) -> None:
        """Gives a memory-less model weights; matrices are cut from memory that all models share."""
        setting, values = self.setting, {}
        place = 0
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                flat = self._weights[place : place + parameter.numel()]
                values[name] = flat.view(parameter.shape)
                place += _aligned(parameter)
            else:
                make = torch.ones if name.endswith("weight") else torch.zeros
                values[name] = make(parameter.shape, dtype=setting.dtype, device=setting.device)
        for name, buffer in model.named_buffers():
            if buffer.is_meta:
                values[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=setting.device)
        model.load_state_dict(values, strict=False, assign=True)
        model.tie_weights()
        movable: Any = model  # pyright cannot read the decorated `to` of transformers
        movable.to(setting.device)

    def _random(self, count: int) -> torch.Tensor:
        """So many values with a standard deviation of 0.02, periodic where there are many."""
        options: dict[str, Any] = {"device": self.setting.device, "dtype": self.setting.dtype}
        pattern = torch.randn(min(count, PATTERN), generator=self._generator, **options) * 0.02
        return pattern.repeat(-(-count // PATTERN))[:count]

    def ids(self, vocab_size: int, length: int) -> torch.Tensor:
        """Random token ids (batch, length): other tokens go to other experts."""
        shape = (self.setting.batch, length)
        device = self.setting.device
        return torch.randint(vocab_size, shape, generator=self._generator, device=device)

    def filler(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Keys or values of a full context; models share them, for a cache never writes to it."""
        if shape not in self._filler:
            self._filler[shape] = self._random(math.prod(shape)).view(shape)
        return self._filler[shape]

    def run(self, models: Sequence[ClockedModel], progress: Progress | None) -> None:
        """Visits all models in shuffled rounds until the time is up; the first does not count."""
        shuffle = random.Random(f"{self.setting.seed} latency rounds")
        begin, counted = time.monotonic(), -1
        total = math.ceil(self.setting.seconds)
        while counted < MIN_ROUNDS or time.monotonic() - begin < self.setting.seconds:
            for model in shuffle.sample(models, len(models)):
                model.visit(counts=counted >= 0)
                if progress is not None:
                    progress(min(int(time.monotonic() - begin), total), total)
            counted += 1


def _aligned(parameter: torch.Tensor) -> int:
    """Elements that a parameter takes of the shared memory."""
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT if parameter.dim() > 1 else 0


def undisturbed(times: Sequence[float]) -> float:
    """The time of a repeat that nothing else interrupted: a low quantile of all of them.

    Other programs only ever add time, in lumps; under load a median jumps between the lumps (on two
    cores shared with two other processes, held-out predictions from medians were off by 27 % in
    the median, from this quantile by 3 %).
    """
    return sorted(times)[int(QUIET * len(times))]


class ClockedModel:
    """A model at some widths, and the milliseconds per token that its steps took."""

    def __init__(self, bench: Bench, widths: Widths, model: PreTrainedModel, clocked: bool):
        self.bench, self.widths, self.model = bench, widths, model
        self._totals: list[float] = []
        self._times: dict[str, list[float]] = defaultdict(list)
        self._marks: list[Any] = []
        self._cuda = torch.device(bench.setting.device).type == "cuda"
        self._clocked = clocked
        self._visits = 0
        self._cache = self._decoding_cache() if bench.setting.phase == "decode" else None

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    @torch.inference_mode()
    def _decoding_cache(self) -> DynamicCache:
        """A cache after one token; `_rewind` gives it the whole context."""
        cache = DynamicCache(config=self.model.config)
        ids = self.bench.ids(self.model.config.vocab_size, 1)
        self.model(input_ids=ids, cache=cache, use_cache=True)
        self._rewind(cache)
        return cache

    def _rewind(self, cache: DynamicCache) -> None:
        """Every attention layer as after `context` tokens."""
        attention: list[Any] = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
        context = self.bench.setting.context
        for layer in attention:
            columns = context
            if layer.is_sliding:
                columns, layer.cumulative_length = min(context, layer.sliding_window - 1), context
            shape = (*layer.keys.shape[:-2], columns, layer.keys.shape[-1])
            layer.keys = layer.values = self.bench.filler(shape)

    @torch.inference_mode()
    def visit(self, *, counts: bool) -> None:
        """Runs a few steps (or one prefill) and keeps their times if they count.

        Every other visit of a clocked model goes without clocks, which take a few microseconds.
        """
        hooks = []
        if counts and self._clocked and self._visits % 2 == 0:
            for block in self.model.get_submodule(self.bench.axis_map.path).children():
                hooks.append(block.register_forward_pre_hook(lambda *_: self._mark()))
                hooks.append(block.register_forward_hook(lambda *_: self._mark()))
        self._visits += counts
        if self._cache is None:
            self._step(self.bench.setting.context, counts)
        else:
            for number in range(1 + DECODE_STEPS):
                self._step(1, counts and number > 0)
            self._rewind(self._cache)
        for hook in hooks:
            hook.remove()

    def _step(self, length: int, counts: bool) -> None:
        """One forward pass over `length` tokens of each sequence, with marks around all parts."""
        ids = self.bench.ids(self.model.config.vocab_size, length)
        if self._cuda:
            torch.cuda.synchronize()
        self._mark()
        self.model(input_ids=ids, cache=self._cache, use_cache=True, logits_to_keep=1)
        self._mark()
        if self._cuda:
            torch.cuda.synchronize()
            spans = [a.elapsed_time(b) for a, b in itertools.pairwise(self._marks)]
        else:
            spans = [1e3 * (b - a) for a, b in itertools.pairwise(self._marks)]
        self._marks.clear()
        if counts:
            self._keep([span / length for span in spans])

    def _keep(self, spans: list[float]) -> None:
        """The time of a whole step; or of the rest and of a layer of each kind, in every other
        span a block."""
        if len(spans) == 1:
            self._totals += spans
            return
        by_kind: dict[str, list[float]] = defaultdict(list)
        for layer, span in zip(self.bench.kept, spans[1::2], strict=True):
            by_kind[self.bench.kinds[layer]].append(span)
        self._times[REST].append(sum(spans[::2]))
        for kind, times in by_kind.items():
            self._times[kind].append(statistics.fmean(times))

    @property
    def milliseconds(self) -> float:
        """Milliseconds per token of the whole model."""
        return undisturbed(self._totals)

    def split(self) -> dict[str, float]:
        """`milliseconds`, split into those of one layer of each kind and of the rest.

        The parts are scaled to add up: what they take undisturbed is less than what the whole does,
        for a long step is hit more surely than a short block, and more by what the clocks take.
        """
        parts = {kind: undisturbed(times) for kind, times in self._times.items()}
        built = [REST, *(self.bench.kinds[layer] for layer in self.bench.kept)]
        scale = self.milliseconds / sum(parts[kind] for kind in built)
        return {kind: scale * time for kind, time in parts.items()}
