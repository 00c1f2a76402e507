"""What it costs to take over another size's cache as it is, instead of reading everything anew.

A pair is run twice on the same problems: its answering size is handed the thinking size's cache, or
reads the sequence itself. Beside the answers, what the two caches hold is compared layer by layer.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from star_elastic.evaluate.intervals import Interval, PairedBootstrap
from star_elastic.evaluate.matching import BY_TASK, Match
from star_elastic.evaluate.tasks import Problem
from star_elastic.generate.caches import ATTENTION, MAMBA, HandOver, RowCache
from star_elastic.generate.decode import BatchDecoder, pads_exactly
from star_elastic.generate.family import ElasticFamily
from star_elastic.generate.phased import DEFAULT_BATCH_SIZE
from star_elastic.generate.phases import Generation, Handed, think_and_answer

STATES = {ATTENTION: ("keys", "values"), MAMBA: ("conv", "recurrent")}
"""What a layer remembers, by its kind."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """Cosine between a state as it is handed over and as its new owner would have made it, the
    whole state of a sequence as one vector: mean and least over sequences."""

    layer: int
    state: str
    cosine: float
    least: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """A pair whose caches are handed over, against the same pair that reads anew.

    `difference` of the accuracies is paired by problem; `same_answers` is the share of problems
    with the very same answer. `divergence` of the first token that the answering size writes, from
    what it would say after reading everything itself: KL in nats, over the `num_handed` sequences.
    """

    think: str
    answer: str
    budget: int | None
    num_problems: int
    num_handed: int
    exact_accuracy: float
    handed_accuracy: float
    difference: Interval
    same_answers: float
    mean_divergence: float | None
    median_divergence: float | None
    worst_divergence: float | None
    likeness: tuple[Likeness, ...]


def study_reuse(
    family: ElasticFamily,
    problems: Sequence[Problem],
    think: str,
    answer: str,
    *,
    budget: int | None = None,
    max_new_tokens: int,
    match: Match = BY_TASK,
    batch_size: int = DEFAULT_BATCH_SIZE,
    seed: int = 0,
) -> Reuse:
    """Runs a pair both ways. Raises ConfigError, before any work, if its caches cannot be handed
    over; `seed` is of the bootstrap."""
    hand_over = HandOver(family.axis_map, *(family.sizes[size].widths for size in (think, answer)))
    prompts = [problem.question for problem in problems]
    exact, handed = (
        family.generator.generate(
            prompts,
            think_and_answer(
                think,
                answer,
                thinking_budget=budget,
                max_new_tokens=max_new_tokens,
                switch=switch,
            ),
            batch_size=batch_size,
            compare=switch == "hand-over",
        )
        for switch in ("reprefill", "hand-over")
    )
    right = [
        [match.judge(p, g.answer).is_right for p, g in zip(problems, generations, strict=True)]
        for generations in (handed, exact)
    ]
    bootstrap = PairedBootstrap([problem.task for problem in problems], seed)
    found = [(prompt, g, h) for prompt, g in zip(prompts, handed, strict=True) for h in _taken(g)]
    divergences = [h.divergence for _, _, h in found if h.divergence is not None]
    rows = [_known(family, prompt, generation, h) for prompt, generation, h in found]
    same = [one.answer == other.answer for one, other in zip(exact, handed, strict=True)]
    return Reuse(
        think=think,
        answer=answer,
        budget=budget,
        num_problems=len(problems),
        num_handed=len(found),
        exact_accuracy=bootstrap.mean(right[1]),
        handed_accuracy=bootstrap.mean(right[0]),
        difference=bootstrap.interval(*right),
        same_answers=statistics.fmean(same),
        mean_divergence=statistics.fmean(divergences) if divergences else None,
        median_divergence=statistics.median(divergences) if divergences else None,
        worst_divergence=max(divergences, default=None),
        likeness=tuple(_likenesses(family, hand_over, rows, think, answer, batch_size)),
    )


def _taken(generation: Generation) -> Iterator[Handed]:
    """The times a cache was handed over."""
    for phase in generation.phases:
        yield from (handed for handed in phase.handed if handed.how == "hand-over")


def _known(family: ElasticFamily, prompt: str, generation: Generation, handed: Handed) -> list[int]:
    """The tokens that a cache knew when it was handed over."""
    prompt_ids = family.generator.tags.encode_prompt(prompt, thinking=True).ids
    return [*prompt_ids, *generation.token_ids][: handed.position - handed.read]


@torch.inference_mode()
def _likenesses(
    family: ElasticFamily,
    hand_over: HandOver,
    rows: Sequence[Sequence[int]],
    giver: str,
    taker: str,
    batch_size: int,
) -> Iterator[Likeness]:
    """How alike the states are that two sizes make of the same tokens, layer by layer."""
    cosines: dict[tuple[int, str], list[float]] = defaultdict(list)
    layers = family.axis_map.kept_layers(family.sizes[taker].widths)
    models = [family[size] for size in (giver, taker)]
    step = batch_size if all(map(pads_exactly, models)) else 1
    for start in range(0, len(rows), step):
        decoders = [BatchDecoder(model) for model in models]
        batch = rows[start : start + step]
        for decoder in decoders:
            decoder.prefill(batch)
        for row in range(len(batch)):
            given, own = (decoder.take(row) for decoder in decoders)
            for layer, state, cosine in _compare(hand_over(given), own, layers):
                cosines[layer, state].append(cosine)
    for (layer, state), found in cosines.items():
        yield Likeness(layer, state, statistics.fmean(found), min(found))


def _compare(
    given: RowCache, own: RowCache, layers: Sequence[int]
) -> Iterator[tuple[int, str, float]]:
    """Layer, name of the state and cosine of everything that two caches hold."""
    for layer, ours, theirs in zip(layers, given.layers, own.layers, strict=True):
        if ours is None or theirs is None:
            continue
        names = STATES[ours.kind]
        for name, one, other in (
            (names[0], ours.first, theirs.first),
            (names[1], ours.second, theirs.second),
        ):
            pair = one.double().flatten(), other.double().flatten()
            yield layer, name, float(torch.cosine_similarity(*pair, dim=0))
