"""What elastic budget control gives against budget control of the largest size alone.

Three questions are asked for each budget of the largest size. Which plan is as accurate and costs
least? Which one costs no more and is most accurate? What does the same budget give with other
sizes? Plans are chosen on the validation split by a function that sees nothing else; the chosen
ones are looked at on the test split once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from star_elastic.evaluate.accuracy import Evaluation, Trials, summarise
from star_elastic.evaluate.grid import Entry
from star_elastic.evaluate.intervals import LEVEL, RESAMPLES, Interval, PairedBootstrap
from star_elastic.evaluate.problems import TEST, VALIDATION, Splits

Question = Literal["equal accuracy", "equal cost", "equal tokens"]
Group = Literal["any", "smaller", "pair", "policy"]
"""Plans to choose from: all; one smaller size alone; pairs; choices by difficulty."""
COSTS = ("flops", "seconds", "weight_bytes")
"""Per problem: counted operations; measured time; weights to fetch at batch 1, which bound the
speed of any machine whose memory is the narrow part."""
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """A chosen plan beside the reference on one split: both accuracies, and the ratio of costs."""

    accuracy: float
    reference_accuracy: float
    cost_ratios: Mapping[str, float]

    @classmethod
    def of(cls, ours: Evaluation, theirs: Evaluation) -> SideBySide:
        """Of the chosen plan and of the reference."""
        ratios = {name: getattr(ours, name) / getattr(theirs, name) for name in COSTS}
        return cls(accuracy=ours.accuracy, reference_accuracy=theirs.accuracy, cost_ratios=ratios)


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
    validation: SideBySide | None = None
    test: SideBySide | None = None
    difference: Interval | None = None


def assemble(
    entries: Sequence[Entry], splits: Splits, trials: Trials, *, batch_size: int, seed: int
) -> dict[str, Any]:
    """Every plan with its means on both splits and its difference to the largest size alone, and
    all comparisons, as plain data. `seed` is of the bootstrap."""
    means = {
        split: {
            own.label: summarise(
                own.plan, problems, trials[own.label][split], batch_size, own.label
            )
            for own in entries
        }
        for split, problems in splits.items()
    }
    right = {label: own[TEST].right for label, own in trials.items()}
    bootstrap = PairedBootstrap([problem.task for problem in splits.test], seed)
    comparisons = compare(entries, means[VALIDATION], means[TEST], right, bootstrap)
    plans = []
    for own in entries:
        same_budget = (other for other in entries if own.budget in other.budgets)
        alone = next(other.label for other in same_budget if other.sizes == entries[0].sizes)
        outcomes = trials[own.label][TEST].outcomes
        plans.append({
            **own.to_json(),
            **{split: found[own.label].to_json() for split, found in means.items()},
            "tokens_by_size": {
                size: sum(outcome.tokens_by_size.get(size, 0) for outcome in outcomes)
                / len(outcomes)
                for size in own.sizes
            },
            "difference": asdict(bootstrap.interval(right[own.label], right[alone])),
        })  # fmt: skip
    return {
        "intervals": {"level": LEVEL, "resamples": RESAMPLES},
        "plans": plans,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }


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
        theirs = reference.label
        candidates = {label: validation[label] for label in labels}
        chosen = choose(question, candidates, validation[theirs], cost or COSTS[0])
        shown: dict[str, Any] = {}
        if chosen is not None:
            shown = {
                "validation": SideBySide.of(validation[chosen], validation[theirs]),
                "test": SideBySide.of(test[chosen], test[theirs]),
                "difference": bootstrap.interval(right[chosen], right[theirs]),
            }
        asked = {"question": question, "group": group, "cost": cost, "budget": reference.budget}
        found.append(Comparison(**asked, reference=theirs, chosen=chosen, **shown))
    return found


def _cases(
    entries: Sequence[Entry],
) -> Iterator[tuple[Question, Group, str, Entry, list[str]]]:
    """Question, group, cost, reference, labels to choose from; no group that has no plans."""
    largest = entries[0].sizes
    members: dict[Group, list[Entry]] = {
        "any": [*entries],
        "smaller": [own for own in entries if own.kind == "single" and own.sizes != largest],
        "pair": [own for own in entries if own.kind == "pair"],
        "policy": [own for own in entries if own.kind == "policy"],
    }
    references = [own for own in entries if own.sizes == largest]
    for reference, (group, plans) in itertools.product(references, members.items()):
        labels = [own.label for own in plans]
        if labels:
            for question, cost in itertools.product(("equal accuracy", "equal cost"), COSTS):
                yield question, group, cost, reference, labels
        labels = [own.label for own in plans if reference.budget in own.budgets]
        if labels and group != "any":
            yield "equal tokens", group, "", reference, labels


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
