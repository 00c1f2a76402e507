"""From the outcomes of every plan to what is told of them: means, comparisons, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from star_elastic.evaluate.accuracy import Evaluation, Outcome, summarise
from star_elastic.evaluate.bootstrap import LEVEL, RESAMPLES, PairedBootstrap
from star_elastic.evaluate.compare import COSTS, Scores, compare
from star_elastic.evaluate.grid import Entry
from star_elastic.evaluate.problems import TEST, VALIDATION, Splits

Solved = Mapping[str, Any]
"""What one plan made of the problems, as it is kept: by split, its seconds and its outcomes, one
list per field."""


def keep(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """One plan on one split, as it is kept."""
    names = [field.name for field in fields(Outcome)]
    columns = {name: [getattr(outcome, name) for outcome in outcomes] for name in names}
    return {"seconds": seconds, "outcomes": columns}


def assemble(
    entries: Sequence[Entry],
    splits: Splits,
    solved: Sequence[Solved],
    *,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Every plan with its means on both splits and its difference to the largest size alone, and
    all comparisons, as plain data. `seed` is of the bootstrap."""
    means, scores = {}, {}
    for split in (VALIDATION, TEST):
        means[split] = [
            _mean(entry, splits, split, found[split], batch_size)
            for entry, found in zip(entries, solved, strict=True)
        ]
        scores[split] = {
            mean.label: Scores(
                found[split]["outcomes"]["is_right"],
                mean.accuracy,
                {cost: getattr(mean, cost) for cost in COSTS},
            )
            for mean, found in zip(means[split], solved, strict=True)
        }
    bootstrap = PairedBootstrap([problem.task for problem in splits.test], seed)
    comparisons = compare(entries, scores[VALIDATION], scores[TEST], bootstrap)
    plans = []
    for number, (entry, found) in enumerate(zip(entries, solved, strict=True)):
        pair = (scores[TEST][own.label].right for own in (entry, _reference(entries, entry)))
        plans.append({
            **entry.to_json(),
            **{split: means[split][number].to_json() for split in (VALIDATION, TEST)},
            "tokens_by_size": _mean_tokens(entry, found[TEST]),
            "difference": asdict(bootstrap.interval(*pair)),
        })  # fmt: skip
    return {
        "intervals": {"level": LEVEL, "resamples": RESAMPLES},
        "plans": plans,
        "comparisons": [comparison.to_json() for comparison in comparisons],
    }


def _mean(
    entry: Entry, splits: Splits, split: str, found: Mapping[str, Any], batch_size: int
) -> Evaluation:
    columns = found["outcomes"]
    outcomes = [
        Outcome(**dict(zip(columns, values, strict=True)))
        for values in zip(*columns.values(), strict=True)
    ]
    mean = summarise(entry.plan, splits[split], outcomes, found["seconds"], batch_size)
    return replace(mean, label=entry.label)


def _reference(entries: Sequence[Entry], entry: Entry) -> Entry:
    """The largest size alone with the same budget."""
    return next(
        own for own in entries if own.sizes == entries[0].sizes and entry.budget in own.budgets
    )


def _mean_tokens(entry: Entry, found: Mapping[str, Any]) -> dict[str, float]:
    """Tokens that each size writes, per problem."""
    written = found["outcomes"]["tokens_by_size"]
    return {size: sum(own.get(size, 0) for own in written) / len(written) for size in entry.sizes}
