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

from star_elastic.errors import not_finite
from star_elastic.evaluate.intervals import Interval, PairedBootstrap
from star_elastic.evaluate.matching import BY_TASK, Match
from star_elastic.evaluate.tasks import Problem
from star_elastic.generate.caches import ATTENTION, MAMBA, HandOver, RowCache
from star_elastic.generate.decode import BatchDecoder, pads_exactly, rows_not_finite
from star_elastic.generate.engine import DEFAULT_BATCH_SIZE
from star_elastic.generate.family import ElasticFamily
from star_elastic.generate.phases import think_and_answer

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
                think, answer, thinking_budget=budget, max_new_tokens=max_new_tokens, switch=switch
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
    known, divergences = [], []  # what each cache had read when it was handed over
    for prompt, generation in zip(prompts, handed, strict=True):
        ids = [*family.generator.tags.encode_prompt(prompt, thinking=True).ids]
        ids += generation.token_ids
        for taken in (taken for phase in generation.phases for taken in phase.handed):
            if taken.how == "hand-over":
                known.append(ids[: taken.position - taken.read])
                divergences += [taken.divergence] if taken.divergence is not None else []
    same = [one.answer == other.answer for one, other in zip(exact, handed, strict=True)]
    return Reuse(
        think=think,
        answer=answer,
        budget=budget,
        num_problems=len(problems),
        num_handed=len(known),
        exact_accuracy=bootstrap.mean(right[1]),
        handed_accuracy=bootstrap.mean(right[0]),
        difference=bootstrap.interval(*right),
        same_answers=statistics.fmean(same),
        mean_divergence=statistics.fmean(divergences) if divergences else None,
        median_divergence=statistics.median(divergences) if divergences else None,
        worst_divergence=max(divergences, default=None),
        likeness=tuple(_likenesses(family, hand_over, known, think, answer, batch_size)),
    )


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
            if rows_not_finite(decoder.logits_BV):
                raise not_finite("the model's logits are")
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
        pairs = (ours.first, theirs.first), (ours.second, theirs.second)
        for name, pair in zip(STATES[ours.kind], pairs, strict=True):
            flat = (state.double().flatten() for state in pair)
            yield layer, name, float(torch.cosine_similarity(*flat, dim=0))
