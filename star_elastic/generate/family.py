"""A loaded elastic checkpoint: all its sizes over one copy of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from star_elastic.axes.widths import Widths
from star_elastic.bundled import find_model
from star_elastic.checkpoints.elastic import ElasticCheckpoint
from star_elastic.checkpoints.manifest import Size
from star_elastic.cost.count import Cost, CostModel, Workload
from star_elastic.errors import ConfigError
from star_elastic.generate.caches import HandOver
from star_elastic.generate.engine import Generator, Options
from star_elastic.generate.phases import (
    DEFAULT_GRACE,
    DEFAULT_MAX_NEW_TOKENS,
    ByDifficulty,
    Generation,
    Plan,
    PlanOptions,
    Switch,
    think_and_answer,
)
from star_elastic.generate.prompts import Prompt
from star_elastic.models.load import load_parent
from star_elastic.models.placement import AUTO, choose_device, choose_dtype
from star_elastic.models.resident import ResidentBytes, count_resident, nest_in_place
from star_elastic.models.submodel import build_submodel
from star_elastic.models.tokenizer import load_tokenizer
from star_elastic.router.files import widths_for


class ElasticFamily(Mapping[str, PreTrainedModel]):
    """The sizes of an elastic checkpoint by name, from the largest to the smallest.

    `family["small"]` is a transformers model in evaluation mode whose parameters are views of the
    one copy, but for vectors and small tensors that are cut inside groups; it is built on first use
    and kept.
    """

    def __init__(self, checkpoint: ElasticCheckpoint, parent: PreTrainedModel):
        self.checkpoint = checkpoint
        self.path, self.config = checkpoint.path, checkpoint.config
        self.manifest, self.axis_map = checkpoint.manifest, checkpoint.axis_map
        self.parent = parent
        self.table = self.config.architecture
        self._models: dict[str, PreTrainedModel] = {}

    def __getitem__(self, size: str) -> PreTrainedModel:
        """The model of a size. Raises CheckpointError naming the sizes there are."""
        if size not in self._models:
            widths = self.manifest.size(size).widths
            full = widths == self.axis_map.full
            model = self.parent if full else self._build(size, widths)
            self._models[size] = model
        return self._models[size]

    def _build(self, size: str, widths: Widths) -> PreTrainedModel:
        scales = self.checkpoint.input_scales(size)
        return build_submodel(self.parent, self.config, widths, input_scales=scales)

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.sizes)

    def __len__(self) -> int:
        return len(self.manifest.sizes)

    def __contains__(self, size: object) -> bool:
        return size in self.manifest.sizes

    def at(self, **budget: float | str) -> PreTrainedModel:
        """The model for one budget between trained ones, for example `family.at(active=0.6)`.

        Its widths are the router's; they were not trained themselves. Raises BudgetError outside
        the trained range.
        """
        found = widths_for(self.checkpoint, budget)
        return build_submodel(self.parent, self.config, found.widths)

    @property
    def sizes(self) -> Mapping[str, Size]:
        """Widths, budgets and recorded cost of every size, from the largest to the smallest."""
        return self.manifest.sizes

    def cost(self, size: str, workload: Workload | None = None) -> Cost:
        """What a size costs: exact counts (default: no context, one sequence, 2 bytes)."""
        return CostModel(self.axis_map, workload or Workload()).count(
            self.manifest.size(size).widths
        )

    def resident_bytes(self) -> ResidentBytes:
        """Memory of the weights: of the shared copy, and of each size built so far beside it."""
        return count_resident(self.parent, self._models)

    def is_cache_compatible(self, *sizes: str) -> bool:
        """Whether caches of these sizes (all if none is named) have one shape: the same layers that
        remember something, with the same KV and Mamba heads."""
        shapes = set()
        for size in sizes or self:
            widths = self.manifest.size(size).widths
            kept = self.axis_map.kept_layers(widths)
            states = [state for state in self.axis_map.states if state.layer in kept]
            shapes.add(tuple((s.layer, s.name, self.axis_map.shape(s, widths)) for s in states))
        return len(shapes) == 1

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer. Raises CheckpointError if it has none."""
        return load_tokenizer(self.path)

    @cached_property
    def generator(self) -> Generator:
        """Its sizes and tokenizer, for plans of one's own, streams and engines."""

        def hand_over(giver: str, taker: str) -> HandOver:
            return HandOver(self.axis_map, self.sizes[giver].widths, self.sizes[taker].widths)

        return Generator(self, self.tokenizer, self.table.end_of_thinking, hand_over)

    def plan(
        self,
        think: str | ByDifficulty | None = None,
        answer: str | ByDifficulty | None = None,
        **options: Unpack[PlanOptions],
    ) -> Plan:
        """A plan to think and answer, see `think_and_answer`. A size that is not named is the one
        that is; if none is, the largest does both."""
        largest = next(iter(self.sizes))
        return think_and_answer(think or answer or largest, answer or think or largest, **options)

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        *,
        think: str | ByDifficulty | None = None,
        answer: str | ByDifficulty | None = None,
        thinking_budget: int | None = None,
        grace: int = DEFAULT_GRACE,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        switch: Switch = "reprefill",
        stop: Sequence[str] = (),
        **options: Unpack[Options],
    ) -> list[Generation]:
        """Thinks with one size and answers with another; one result per prompt.

        See `plan` for the sizes and budgets, `Generator` for the options: sampling and batches.
        `generator` takes plans of any phases, and streams tokens.
        """
        plan = self.plan(
            think, answer, thinking_budget=thinking_budget, grace=grace,
            max_new_tokens=max_new_tokens, switch=switch, stop=stop,
        )  # fmt: skip
        return self.generator.generate(prompts, plan, **options)


def load(
    path: str | Path,
    dtype: str | torch.dtype | None = AUTO,
    device: str | torch.device | None = AUTO,
) -> ElasticFamily:
    """An elastic checkpoint, loaded once for all its sizes.

    `path` is its directory, or `bundled`: the family that comes with the package.
    `dtype` is float32, bfloat16 or float16; "auto" (or None) is the one that the weights are stored
    in, on every device. `device` is a device of torch; "auto" (or None) is a GPU if there is one.
    Switching between sizes is exact (as far as rounding goes) in any dtype; where tokens must not
    depend on batches and switches, take float32. Raises ConfigError or CheckpointError with one
    line for anything that cannot be loaded.
    """
    chosen = choose_device(device)
    if not isinstance(path, (str, Path)):
        raise ConfigError(
            f"a checkpoint of type {type(path).__name__} cannot be loaded; name its directory"
        )
    # Absolute: tokenizer, router and input scales are read when they are first used.
    checkpoint = ElasticCheckpoint(find_model(path).absolute())
    sizes = checkpoint.manifest.sizes.values()
    parent, _ = load_parent(checkpoint.path, choose_dtype(dtype, checkpoint.path), chosen)
    nest_in_place(parent, checkpoint.axis_map, [size.widths for size in sizes])
    return ElasticFamily(checkpoint, parent)
