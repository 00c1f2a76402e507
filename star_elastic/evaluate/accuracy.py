"""Accuracy, measured time and counted cost of one way to think and answer.

Time is measured on the machine at hand; the counted cost is exact arithmetic over the tokens that
each size has really read, so that it can be compared between machines. Padding and the rows of
finished sequences are in the time and not in the count.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from star_elastic.cost import Cost, CostModel, Workload
from star_elastic.errors import ConfigError
from star_elastic.evaluate.tasks import Problem, is_correct, messages
from star_elastic.families import family_of
from star_elastic.generate.phased import DEFAULT_BATCH_SIZE, PhasedGenerator
from star_elastic.generate.phases import ANSWERING, THINKING, Generation, Plan

CUT = ("cut", "cut_at_newline", "length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one plan reached on a set of problems. Means are per problem.

    `accuracy` is the mean over tasks of the share of right answers, `standard_error` that of this
    mean by the problems drawn. `cut_share` is the share of problems whose trace the model did not
    end itself. `seconds` is wall time of batched generation; `flops` counts every token that a size
    read, with attention at its own context; `bytes_per_token` the weights that a decoded token
    reads at batch 1 (embedding rows looked up are left out).
    """

    label: str
    think: str
    answer: str
    thinking_budget: int | None
    num_problems: int
    accuracy: float
    standard_error: float
    per_task: Mapping[str, float]
    thinking_tokens: float
    answer_tokens: float
    cut_share: float
    batch_size: int
    seconds: float
    flops: float
    bytes_per_token: float

    @property
    def is_pair(self) -> bool:
        """Whether two sizes share the work."""
        return self.think != self.answer

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return asdict(self)


class _SizeCost:
    """Exact counts of one model: operations at any context, weight bytes read per token."""

    def __init__(self, model: PreTrainedModel):
        config = model.config.to_dict()
        table = family_of(config).axis_map(config)
        self._counted: list[Cost] = [
            CostModel(table, Workload(context=context)).count(table.full) for context in (0, 1)
        ]
        lookups = sum(
            math.prod(table.shape(spec, table.full))
            for spec in table.tensors.values()
            if spec.lookup
        )
        self.bytes_per_token = (self._counted[0].active - lookups) * model.dtype.itemsize

    def count_flops(self, start: int, num_tokens: int) -> float:
        """Operations for tokens that see `start + 1`, `start + 2`, ... tokens of context."""
        fixed = self._counted[0].flops_per_token
        per_context = self._counted[1].flops_per_token - fixed
        contexts = num_tokens * start + num_tokens * (num_tokens + 1) // 2
        return num_tokens * fixed + contexts * per_context


def count_work(generation: Generation, costs: Mapping[str, _SizeCost]) -> tuple[float, float]:
    """(operations, weight bytes read by decoded tokens) of one sequence, both phases."""
    flops = num_bytes = 0.0
    start = 0
    for phase in generation.phases:
        if phase.prefill_tokens:
            start = 0  # a size that prefills reads the sequence from its beginning
        num_read = phase.prefill_tokens + phase.decode_steps
        flops += costs[phase.size].count_flops(start, num_read)
        num_bytes += phase.decode_steps * costs[phase.size].bytes_per_token
        start += num_read
    return flops, num_bytes


def evaluate_plan(
    generator: PhasedGenerator,
    problems: Sequence[Problem],
    plan: Plan,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Evaluation:
    """Solves the problems by one plan. Raises what `PhasedGenerator.generate` raises."""
    if not problems:
        raise ConfigError("there is no problem to evaluate; draw at least one")
    prompts = [messages(problem)[:1] for problem in problems]
    options = {"temperature": temperature, "seed": seed, "batch_size": batch_size}
    for size in {plan.think, plan.answer}:
        _warm_up(generator.model(size))
    start = time.perf_counter()
    generations = generator.generate(prompts, plan, **options)
    seconds = time.perf_counter() - start
    costs = {size: _SizeCost(generator.model(size)) for size in {plan.think, plan.answer}}
    work = [count_work(generation, costs) for generation in generations]
    decoded = sum(phase.decode_steps for g in generations for phase in g.phases)
    number = len(problems)
    return Evaluation(
        label=plan.label,
        think=plan.think if plan.thinking_budget != 0 else plan.answer,
        answer=plan.answer,
        thinking_budget=plan.thinking_budget,
        num_problems=number,
        **_score(problems, generations),
        thinking_tokens=_mean_tokens(generations, THINKING),
        answer_tokens=_mean_tokens(generations, ANSWERING),
        cut_share=sum(_was_cut(generation) for generation in generations) / number,
        batch_size=batch_size,
        seconds=seconds / number,
        flops=sum(flops for flops, _ in work) / number,
        bytes_per_token=sum(num_bytes for _, num_bytes in work) / max(decoded, 1),
    )


def _warm_up(model: PreTrainedModel) -> None:
    """One short forward: sizes are built on first use, and the first call of a kernel is slow."""
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))


def _score(problems: Sequence[Problem], generations: Sequence[Generation]) -> dict[str, Any]:
    """Accuracy per task, its mean over tasks, and the standard error of that mean."""
    right: dict[str, list[bool]] = defaultdict(list)
    for problem, generation in zip(problems, generations, strict=True):
        right[problem.task].append(is_correct(problem, generation.answer))
    per_task = {task: sum(marks) / len(marks) for task, marks in right.items()}
    variance = sum(p * (1 - p) / len(right[task]) for task, p in per_task.items())
    return {
        "per_task": per_task,
        "accuracy": sum(per_task.values()) / len(per_task),
        "standard_error": math.sqrt(variance) / len(per_task),
    }


def _was_cut(generation: Generation) -> bool:
    thinking = generation.phase(THINKING)
    return thinking is not None and thinking.ended in CUT


def _mean_tokens(generations: Iterable[Generation], name: str) -> float:
    phases = [generation.phase(name) for generation in generations]
    return sum(phase.tokens for phase in phases if phase is not None) / len(phases)
