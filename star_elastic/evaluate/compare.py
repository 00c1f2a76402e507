"""What elastic budget control gives against budget control of the largest size alone.

Three questions, asked for each budget of the largest size: which plan is as accurate and costs
least, which one costs no more and is most accurate, and what the same budget gives with other
sizes. Plans are chosen on the validation split by functions that see nothing else; the chosen ones
are looked at on the test split once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from star_elastic.evaluate.bootstrap import Interval, PairedBootstrap
from star_elastic.evaluate.grid import Entry

Question = Literal["equal accuracy", "equal cost", "equal tokens"]
Group = Literal["any", "smaller", "pair", "policy"]
"""Plans to choose from: all; one smaller size alone; pairs; choices by difficulty."""

GROUPS: tuple[Group, ...] = ("any", "smaller", "pair", "policy")
COSTS = ("flops", "seconds", "weight_bytes")
"""Per problem: counted operations; measured time; weights to fetch at batch 1, which bound the
speed of any machine whose memory is the narrow part."""
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Scores:
    """One plan on one split: whether each problem was solved (N,), the mean over tasks of their
    share, and the mean costs per problem by name."""

    right: Sequence[bool]
    accuracy: float
    costs: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A chosen plan beside the reference on one split: both accuracies, and the ratio of costs."""

    accuracy: float
    reference_accuracy: float
    cost_ratios: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The answer to one question at one budget of the reference, among one group of plans.

    `cost` is what was compared in choosing; empty for equal tokens. `chosen` is None if no plan of
    the group qualified on the validation split; then nothing was looked at on the test split.
    `difference` in accuracy on the test split, from pairs of outcomes.
    """

    question: Question
    group: Group
    cost: str
    budget: int | None
    reference: str
    chosen: str | None
    validation: Seen | None = None
    test: Seen | None = None
    difference: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


Choose = Callable[[Mapping[str, Scores], Scores, str], str | None]
"""Picks one of the candidates on the validation split: their scores by label, those of the
reference, the name of the cost. None if no candidate qualifies."""


def cheapest_as_accurate(
    candidates: Mapping[str, Scores], reference: Scores, cost: str
) -> str | None:
    """The cheapest that is at least as accurate as the reference; the more accurate of equals."""
    least = reference.accuracy - ROUNDING
    fit = [label for label, own in candidates.items() if own.accuracy >= least]
    return min(fit, key=lambda k: _cheap_first(candidates[k], cost), default=None)


def most_accurate_as_cheap(
    candidates: Mapping[str, Scores], reference: Scores, cost: str
) -> str | None:
    """The most accurate that costs no more than the reference; the cheapest of equals."""
    most = reference.costs[cost] * (1 + ROUNDING)
    fit = [label for label, own in candidates.items() if own.costs[cost] <= most]
    return min(fit, key=lambda k: _accurate_first(candidates[k], cost), default=None)


def most_accurate(candidates: Mapping[str, Scores], reference: Scores, cost: str) -> str | None:
    """The most accurate, whatever the reference is; the cheapest of equals."""
    return min(candidates, key=lambda k: _accurate_first(candidates[k], cost), default=None)


def _cheap_first(scores: Scores, cost: str) -> tuple[float, float]:
    return scores.costs[cost], -scores.accuracy


def _accurate_first(scores: Scores, cost: str) -> tuple[float, float]:
    return -round(scores.accuracy, 9), scores.costs[cost]


CHOICES: Mapping[Question, Choose] = {
    "equal accuracy": cheapest_as_accurate,
    "equal cost": most_accurate_as_cheap,
    "equal tokens": most_accurate,
}


def compare(
    entries: Sequence[Entry],
    validation: Mapping[str, Scores],
    test: Mapping[str, Scores],
    bootstrap: PairedBootstrap,
) -> list[Comparison]:
    """All comparisons with the first entry's size alone. Scores by label; the bootstrap is of the
    test problems."""
    found = []
    for question, group, cost, reference, labels in _cases(entries):
        candidates = {label: validation[label] for label in labels}
        chosen = CHOICES[question](candidates, validation[reference.label], cost or COSTS[0])
        shown: dict[str, Any] = {}
        if chosen is not None:
            pairs = test[chosen].right, test[reference.label].right
            shown = {
                "validation": _see(validation, chosen, reference.label),
                "test": _see(test, chosen, reference.label),
                "difference": bootstrap.interval(*pairs),
            }
        found.append(
            Comparison(
                question=question,
                group=group,
                cost=cost,
                budget=reference.budget,
                reference=reference.label,
                chosen=chosen,
                **shown,
            )
        )
    return found


def _cases(
    entries: Sequence[Entry],
) -> Iterator[tuple[Question, Group, str, Entry, list[str]]]:
    """Question, group, cost, reference, labels to choose from; no group that has no plans."""
    largest = entries[0].sizes
    references = [entry for entry in entries if entry.sizes == largest]
    for reference, group in itertools.product(references, GROUPS):
        members = [entry for entry in entries if _belongs(entry, group, largest)]
        labels = [entry.label for entry in members]
        if labels:
            for question, cost in itertools.product(("equal accuracy", "equal cost"), COSTS):
                yield question, group, cost, reference, labels
        labels = [entry.label for entry in members if reference.budget in entry.budgets]
        if labels and group != "any":
            yield "equal tokens", group, "", reference, labels


def _belongs(entry: Entry, group: Group, largest: tuple[str, ...]) -> bool:
    if group == "any":
        return True
    if group == "smaller":
        return entry.kind == "single" and entry.sizes != largest
    return entry.kind == group


def _see(scores: Mapping[str, Scores], chosen: str, reference: str) -> Seen:
    ours, theirs = scores[chosen], scores[reference]
    return Seen(
        accuracy=ours.accuracy,
        reference_accuracy=theirs.accuracy,
        cost_ratios={name: ours.costs[name] / theirs.costs[name] for name in COSTS},
    )
