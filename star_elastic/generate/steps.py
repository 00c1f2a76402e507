"""Decode steps in memory that stays where it is, so that a GPU can replay them as a CUDA graph.

A step of one token is hundreds of small kernels per layer kind; launching them one by one takes a
GPU longer than running them, so that all sizes would be equally slow. On the CPU the same step runs
without a graph (for tests; there is nothing to gain). B rows, T columns, V vocabulary.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from star_elastic.errors import reason
from star_elastic.generate.caches import ATTENTION, join, layers_of
from star_elastic.models.native import fits
from star_elastic.quant.formats import E4M3
from star_elastic.recent import Recent

logger = logging.getLogger(__name__)

PATIENCE = 8
"""Steps of one shape that are run before one is captured: a capture takes as long as a few."""
MAX_CAPTURED = 4
"""Captured steps that a model keeps, each with memory for the caches of its rows."""
MIN_COLUMNS = 256
WARM_UPS = 2
KINDS = {
    DynamicLayer: "full_attention", DynamicSlidingWindowLayer: "sliding_attention",
    LinearAttentionLayer: "linear_attention",
}  # fmt: skip
"""What masks of layers with such caches are called."""


class StaticStep:
    """One token for each of up to `rows` rows, with up to `columns` tokens of context.

    Rows beyond those in use are computed and not looked at; columns beyond are masked.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, rows: int, columns: int):
        self.model, self.rows, self.columns = model, rows, columns
        device = model.device
        self._cache, self._kinds, self._window = _static_cache(model.config, columns)
        self._ids_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._places_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._mask_B11T = torch.zeros(rows, 1, 1, columns, dtype=torch.bool, device=device)
        self._logits_BV = torch.zeros(rows, model.config.vocab_size, device=device)
        self._settle: weakref.WeakMethod[Callable[[], None]] | None = None
        self._run()  # the first one makes the states
        self._graph = self._capture() if device.type == "cuda" else None

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Records the step; what it does to the states meanwhile is overwritten by `load`."""
        device = self.model.device
        with torch.cuda.device(device):
            before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._run()
            before.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=stream):
                    self._run()
            finally:  # a capture that fails may leave its stream in charge
                torch.cuda.set_stream(before)
        return graph

    def _run(self) -> None:
        """The step itself: everything it reads and writes stays at its address."""
        self._mask_B11T.index_fill_(3, self._column, True)
        output = self.model(
            input_ids=self._ids_B1,
            attention_mask=self._masks(),
            position_ids=self._places_B1,
            cache=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._logits_BV.copy_(output.logits[:, -1])
        self._column += 1
        self._places_B1 += 1

    def _masks(self) -> torch.Tensor | dict[str, torch.Tensor | None]:
        """Which columns the token sees: one mask (B, 1, 1, T), or by kind of layer where a model
        has several kinds."""
        masks = {"full_attention": self._mask_B11T}
        if self._window is not None:
            columns_T = torch.arange(self.columns, device=self._column.device)
            inside_T = columns_T > self._column - self._window
            masks["sliding_attention"] = self._mask_B11T & inside_T
        if self.model.config._attn_implementation == "eager":  # which adds masks to its scores
            least = torch.finfo(self.model.dtype).min
            for kind, mask in masks.items():
                closed = torch.zeros_like(mask, dtype=self.model.dtype)
                masks[kind] = closed.masked_fill_(~mask, least)
        only = next(iter(self._kinds)) if len(self._kinds) == 1 else ""
        return masks.get(only, {**masks, "linear_attention": None})

    @torch.inference_mode()
    def load(self, cache: DynamicCache, lengths: Sequence[int], settle: Callable[[], None]) -> None:
        """Takes up rows of these lengths from a cache, padded on the left.

        `settle` is a method that takes them back, called when another decoder needs the memory.
        """
        before = self._settle() if self._settle is not None else None
        if before is not None:
            before()
        self._settle = weakref.WeakMethod(settle)
        rows, columns = len(lengths), max(lengths)
        for layer, given, own in zip(
            self._cache.layers, layers_of(cache), layers_of(self._cache), strict=True
        ):
            if given is None or own is None:
                continue
            # A layer with a window has the last columns only, and looks at no others.
            held = given.first.shape[2] if given.kind == ATTENTION else columns
            target = own.cut(slice(rows), slice(columns - held, columns))
            target.first.copy_(given.first)
            target.second.copy_(given.second)
            if given.kind == ATTENTION:
                attention: Any = layer
                attention.cumulative_length.fill_(columns)
        lengths_B1 = torch.tensor(lengths, device=self._places_B1.device)[:, None]
        self._places_B1[:rows].copy_(lengths_B1)
        self._column.fill_(columns)
        self._mask_B11T.zero_()
        places_T = torch.arange(columns, device=self._places_B1.device)
        self._mask_B11T[:rows, 0, 0, :columns].copy_(places_T >= columns - lengths_B1)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Feeds one token to every row in use; returns logits (B, V) in fp32."""
        self._ids_B1[: len(tokens), 0].copy_(torch.tensor(tokens))
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        return self._logits_BV[: len(tokens)].clone()

    @torch.inference_mode()
    def unload(self, rows: int, columns: int) -> DynamicCache:
        """The rows in use as a cache of their own."""
        place = slice(rows), slice(columns)
        layers = tuple(own and own.cut(*place) for own in layers_of(self._cache))
        return join([layers], self.model.config, columns)


def _static_cache(
    config: PreTrainedConfig, columns: int
) -> tuple[StaticCache, frozenset[str], int | None]:
    """A cache in which every attention layer keeps all columns; the kinds of its layers that
    remember something, as masks are named after them; and the window of those that look at the last
    columns only (None: all look at all of them). transformers' own layers with windows move what
    they hold at every step and count in Python, which a graph would not replay."""
    growing: list[Any] = DynamicCache(config=config).layers
    windows = {layer.sliding_window for layer in growing if hasattr(layer, "sliding_window")}
    assert len(windows) <= 1, windows
    cache = StaticCache(config=config, max_cache_len=columns)
    cache.layers = [
        StaticLayer(columns) if hasattr(own, "sliding_window") else layer
        for layer, own in zip(cache.layers, growing, strict=True)
    ]
    kinds = frozenset(KINDS[type(layer)] for layer in growing if type(layer) in KINDS)
    return cache, kinds, next(iter(windows), None)


class StepPool:
    """The static steps of one model, by their numbers of rows and columns (powers of two).

    A step is captured when its shape has been asked for `patience` times; the one that was used
    longest ago goes when there are more than a few. Where capturing fails (an operation that waits
    for the CPU, no memory for the rows' caches), steps go on without.
    """

    def __init__(self, model: PreTrainedModel, patience: int = PATIENCE):
        self.model, self._patience = model, patience
        self._fails = False
        self._asked: Counter[tuple[int, int]] = Counter()
        self._steps: Recent[tuple[int, int], StaticStep] = Recent(MAX_CAPTURED)

    def fetch(self, rows: int, columns: int) -> StaticStep | None:
        """A step with room for so many rows and columns; None while it is not worth capturing."""
        shape = _power_of_two(rows), max(_power_of_two(columns), MIN_COLUMNS)
        if shape not in self._steps.kept:
            self._asked[shape] += 1
            if self._fails or self._asked[shape] < self._patience:
                return None
        try:
            return self._steps.fetch(shape, lambda: StaticStep(self.model, *shape))
        except RuntimeError as error:
            self._fails = True
            logger.warning("decode steps are not captured, which is slower: %s", reason(error))
            return None

    def clear(self) -> None:
        """Forgets the captured steps and frees their memory; they are captured anew when used."""
        self._steps = Recent(MAX_CAPTURED)


def _power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()


def pool_for(model: PreTrainedModel, patience: int = PATIENCE) -> StepPool | None:
    """A pool where steps can be captured: on a CUDA device, with attention that takes masks, and
    with experts (if any) as grouped products in bf16, which do not wait for the CPU."""
    config: Any = model.config
    if any(p.dtype == E4M3 and p.dim() == 3 and not fits(p) for p in model.parameters()):
        return None  # codes of experts that are unpacked, group by group
    has_experts = any(name.endswith("experts") for name, _ in model.named_modules())
    grouped = config._experts_implementation != "eager" and model.dtype == torch.bfloat16
    captures = config._attn_implementation == "sdpa" and (grouped or not has_experts)
    return StepPool(model, patience) if model.device.type == "cuda" and captures else None
