"""Accuracy, measured time and counted cost of one way to think and answer.

Time is measured on the machine at hand; the counted cost is exact arithmetic over the tokens that
each size has really read, so that it can be compared between machines. Padding and the rows of
finished sequences are in the time and not in the count. What is known of every problem (`Outcome`)
and the means over problems (`Evaluation`) are kept apart: plans are compared problem by problem.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from star_elastic.architectures import ModelConfig
from star_elastic.axes import AxisMap
from star_elastic.axes.widths import Widths
from star_elastic.cost.count import Cost, CostModel, Workload
from star_elastic.errors import ConfigError
from star_elastic.evaluate.intervals import effective_count, wilson_interval
from star_elastic.evaluate.matching import BY_TASK, Match
from star_elastic.evaluate.tasks import Problem
from star_elastic.generate.engine import DEFAULT_BATCH_SIZE, Generator
from star_elastic.generate.family import ElasticFamily
from star_elastic.generate.phases import ANSWERING, TAG, THINKING, ByDifficulty, Generation, Plan

MAX_TEXT, LEFT_OUT = 1_000, " [...] "
"""Characters that are kept of a text, and what stands for its middle where it is longer."""

Kind = Literal["single", "pair", "policy"]
"""One size alone; one thinks and another answers; two share the work by difficulty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One problem as one plan solved it, counted as in `Evaluation`.

    `text` is all that was written, its middle left out where it is longer than `MAX_TEXT`;
    `extracted` what the matching rule took for the answer (None: it found none).
    `tokens_by_size` says who wrote what. `decoded_bytes` are the weights that the `decode_steps`
    tokens read one by one need; `weight_bytes` all that a batch of one must fetch from memory at
    the least: the same, and a token's weights for every stretch read at once.
    """

    is_right: bool
    extracted: str | None
    text: str
    thinking_tokens: int
    answer_tokens: int
    tokens_by_size: Mapping[str, int]
    is_cut: bool
    decode_steps: int
    flops: float
    decoded_bytes: float
    weight_bytes: float


class Trial(NamedTuple):
    """One plan tried on a set of problems: every outcome, and the wall seconds of all together."""

    outcomes: list[Outcome]
    seconds: float

    @property
    def right(self) -> list[bool]:
        """Whether each problem was solved."""
        return [outcome.is_right for outcome in self.outcomes]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data: a list for each field of the outcomes."""
        names = [field.name for field in fields(Outcome)]
        columns = {name: [getattr(own, name) for own in self.outcomes] for name in names}
        return {"seconds": self.seconds, "outcomes": columns}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Trial:
        """What `to_json` wrote."""
        columns = content["outcomes"]
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        return cls([Outcome(**row) for row in rows], content["seconds"])


Trials = Mapping[str, Mapping[str, Trial]]
"""Of many plans: by label and split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one plan reached on a set of problems. Means are per problem.

    `accuracy` is the mean over tasks of the share of right answers, `interval` its 95 % interval
    (Wilson's), `no_answer_share` the share of problems in whose reply the matching rule found no
    answer. `cut_share` is the share of problems whose trace the model did not end itself,
    `cut_accuracy` that of right answers among them (None: there are none). `seconds` is
    wall time of batched generation; `flops` counts every token that a size read, with attention at
    its own context, and the LM head where a token is predicted (once for a text that is read at
    once); `bytes_per_token` the weights that a decoded token reads at batch 1 (embedding rows
    looked up are left out), `weight_bytes` those of a whole problem.
    """

    label: str
    think: str
    answer: str
    thinking_budget: int | None
    num_problems: int
    accuracy: float
    interval: tuple[float, float]
    per_task: Mapping[str, float]
    thinking_tokens: float
    answer_tokens: float
    cut_share: float
    batch_size: int
    seconds: float
    flops: float
    bytes_per_token: float
    weight_bytes: float = 0.0
    cut_accuracy: float | None = None
    no_answer_share: float = 0.0
    by_difficulty: bool = False

    @property
    def kind(self) -> Kind:
        """Which sizes work, and how they share it."""
        if self.by_difficulty:
            return "policy"
        return "pair" if self.think != self.answer else "single"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return {**asdict(self), "interval": list(self.interval)}


class SizeCost:
    """Exact counts of one model: operations at any context, weight bytes read per token."""

    def __init__(self, axis_map: AxisMap, widths: Widths, dtype_bytes: int):
        def count(context: int) -> Cost:
            return CostModel(axis_map, Workload(context=context)).count(widths)

        self._body = count(0)
        # What a token of context costs falls where the windows of some layers end.
        ends = sorted({work.most for work in axis_map.work if work.most is not None})
        slopes = [count(end + 1).flops_per_token - count(end).flops_per_token for end in (0, *ends)]
        falls = [before - after for before, after in itertools.pairwise(slopes)]
        self._per_context: list[tuple[int | None, float]] = [
            *zip(ends, falls, strict=True), (None, slopes[-1])
        ]  # fmt: skip
        tables = (spec for spec in axis_map.tensors.values() if spec.lookup)
        lookups = sum(math.prod(axis_map.shape(spec, widths)) for spec in tables)
        self.bytes_per_token = (self._body.active - lookups) * dtype_bytes

    @classmethod
    def of(cls, models: Mapping[str, PreTrainedModel], size: str) -> SizeCost:
        """Of a size of a family, or of a model by its config, which knows no widths that differ
        between layers."""
        dtype_bytes = models[size].dtype.itemsize
        if isinstance(models, ElasticFamily):
            return cls(models.axis_map, models.manifest.size(size).widths, dtype_bytes)
        axis_map = ModelConfig(models[size].config.to_dict()).axis_map
        return cls(axis_map, axis_map.full, dtype_bytes)

    def count_flops(self, start: int, num_tokens: int, *, at_once: bool) -> float:
        """Operations for tokens that see `start + 1`, `start + 2`, ... tokens of context.

        Read one by one, every token goes through the LM head; read at once, only the last does.
        """
        num_predicted = min(num_tokens, 1) if at_once else num_tokens
        seen = sum(flops * _sum_seen(start, num_tokens, m) for m, flops in self._per_context)
        body, head = self._body.prefill_flops_per_token, self._body.head_flops
        return num_tokens * body + seen + num_predicted * head


def _sum_seen(start: int, num_tokens: int, most: int | None) -> int:
    """Sum of the tokens that each of some tokens sees, `start + 1` and more, at most `most`."""
    growing = num_tokens if most is None else min(max(most - start, 0), num_tokens)
    beyond = (num_tokens - growing) * (most or 0)
    return growing * start + growing * (growing + 1) // 2 + beyond


def evaluate_plan(
    generator: Generator,
    problems: Sequence[Problem],
    plan: Plan,
    *,
    match: Match = BY_TASK,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Evaluation:
    """Solves the problems by one plan. Raises what `Generator.generate` raises."""
    solved = solve(generator, problems, plan, match=match, batch_size=batch_size)
    return summarise(plan, problems, solved, batch_size)


def solve(
    generator: Generator,
    problems: Sequence[Problem],
    plan: Plan,
    *,
    match: Match = BY_TASK,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Trial:
    """What one plan makes of the problems, judged by a matching rule."""
    if not problems:
        raise ConfigError("there is no problem to evaluate; draw at least one")
    prompts = [problem.question for problem in problems]
    for size in plan.sizes:  # built on first use; the first call of a kernel is slow
        model = generator.model(size)
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
    start = time.perf_counter()
    generations = generator.generate(prompts, plan, batch_size=batch_size)
    seconds = time.perf_counter() - start
    costs = {size: SizeCost.of(generator.models, size) for size in plan.sizes}
    found = zip(problems, generations, strict=True)
    return Trial([_outcome(*each, match, costs) for each in found], seconds)


def _outcome(
    problem: Problem, generation: Generation, match: Match, costs: Mapping[str, SizeCost]
) -> Outcome:
    verdict = match.judge(problem, generation.answer)
    by_size: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for phase in generation.phases:
        by_size.update(phase.by_size)
        tokens[phase.name] += phase.tokens
    flops = decoded = at_once = 0.0
    for read in generation.reads:
        cost = costs[read.size]
        flops += cost.count_flops(read.start, read.tokens, at_once=read.at_once)
        if read.at_once:
            at_once += cost.bytes_per_token
        else:
            decoded += read.tokens * cost.bytes_per_token
    return Outcome(
        is_right=verdict.is_right,
        extracted=verdict.extracted,
        text=_shorten(generation.text),
        thinking_tokens=tokens[THINKING],
        answer_tokens=tokens[ANSWERING],
        tokens_by_size=dict(by_size),
        is_cut=_was_cut(generation),
        decode_steps=sum(phase.decode_steps for phase in generation.phases),
        flops=flops,
        decoded_bytes=decoded,
        weight_bytes=decoded + at_once,
    )


def _shorten(text: str) -> str:
    """A text of at most `MAX_TEXT` characters: its beginning and its end."""
    if len(text) <= MAX_TEXT:
        return text
    half = (MAX_TEXT - len(LEFT_OUT)) // 2
    return text[:half] + LEFT_OUT + text[-half:]


def summarise(
    plan: Plan, problems: Sequence[Problem], solved: Trial, batch_size: int, label: str = ""
) -> Evaluation:
    """The means over problems, under the plan's own label or another."""
    outcomes, count = solved.outcomes, len(problems)

    def mean(name: str) -> float:
        return sum(getattr(outcome, name) for outcome in outcomes) / count

    marks: dict[str, list[bool]] = defaultdict(list)
    for problem, outcome in zip(problems, outcomes, strict=True):
        marks[problem.task].append(outcome.is_right)
    per_task = {task: sum(own) / len(own) for task, own in marks.items()}
    accuracy = sum(per_task.values()) / len(per_task)
    after_cut = [outcome.is_right for outcome in outcomes if outcome.is_cut]
    return Evaluation(
        label=label or plan.label,
        think=str(plan.phases[0].size),
        answer=str(plan.phases[-1].size),
        thinking_budget=plan.thinking_budget,
        num_problems=count,
        per_task=per_task,
        accuracy=accuracy,
        interval=wilson_interval(accuracy, effective_count([len(own) for own in marks.values()])),
        thinking_tokens=mean("thinking_tokens"),
        answer_tokens=mean("answer_tokens"),
        cut_share=mean("is_cut"),
        batch_size=batch_size,
        seconds=solved.seconds / count,
        flops=mean("flops"),
        bytes_per_token=mean("decoded_bytes") / max(mean("decode_steps"), 1 / count),
        weight_bytes=mean("weight_bytes"),
        cut_accuracy=sum(after_cut) / len(after_cut) if after_cut else None,
        no_answer_share=sum(own.extracted is None for own in outcomes) / count,
        by_difficulty=any(isinstance(phase.size, ByDifficulty) for phase in plan.phases),
    )


def _was_cut(generation: Generation) -> bool:
    """Whether the trace was ended by its budget, or by the limit of all tokens."""
    parts = generation.token_parts
    if TAG in parts:
        end = parts.index(TAG)
        return end > 0 and generation.token_sizes[end] is None
    return THINKING in parts and generation.phases[-1].ended == "length"
