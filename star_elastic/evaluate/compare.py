"""What elastic budget control gives against budget control of the largest size alone.

Three questions, asked for each budget of the largest size: which plan is as accurate and costs
least, which one costs no more and is most accurate, and what the same budget gives with other
sizes. Plans are chosen on the validation split by functions that see nothing else; the chosen ones
are looked at on the test split once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from star_elastic.evaluate.accuracy import Evaluation
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


def choose(
    question: Question, candidates: Mapping[str, Evaluation], reference: Evaluation, cost: str
) -> str | None:
    """The label of the best candidate on the validation split; None if none qualifies.

    - equal accuracy: the cheapest that is at least as accurate as the reference; of equally cheap
      ones the most accurate.
    - equal cost: the most accurate that costs no more than the reference; of equally accurate ones
      the cheapest.
    - equal tokens: the most accurate, whatever it costs.
    """

    def price(label: str) -> float:
        return getattr(candidates[label], cost)

    def accuracy(label: str) -> float:
        return candidates[label].accuracy

    if question == "equal accuracy":
        fit = [label for label in candidates if accuracy(label) >= reference.accuracy - ROUNDING]
        return min(fit, key=lambda label: (price(label), -accuracy(label)), default=None)
    most = getattr(reference, cost) * (1 + ROUNDING) if question == "equal cost" else math.inf
    fit = [label for label in candidates if price(label) <= most]
    return min(fit, key=lambda label: (-round(accuracy(label), 9), price(label)), default=None)


def compare(
    entries: Sequence[Entry],
    validation: Mapping[str, Evaluation],
    test: Mapping[str, Evaluation],
    right: Mapping[str, Sequence[bool]],
    bootstrap: PairedBootstrap,
) -> list[Comparison]:
    """All comparisons with the first entry's size alone. All mappings are by label; `right` says
    which test problems each plan solved (N,), and the bootstrap is of these problems."""
    found = []
    for question, group, cost, reference, labels in _cases(entries):
        candidates = {label: validation[label] for label in labels}
        chosen = choose(question, candidates, validation[reference.label], cost or COSTS[0])
        shown: dict[str, Any] = {}
        if chosen is not None:
            shown = {
                "validation": _see(validation[chosen], validation[reference.label]),
                "test": _see(test[chosen], test[reference.label]),
                "difference": bootstrap.interval(right[chosen], right[reference.label]),
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


def _see(ours: Evaluation, theirs: Evaluation) -> Seen:
    return Seen(
        accuracy=ours.accuracy,
        reference_accuracy=theirs.accuracy,
        cost_ratios={name: getattr(ours, name) / getattr(theirs, name) for name in COSTS},
    )
