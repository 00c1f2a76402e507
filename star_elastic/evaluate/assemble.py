"""From the outcomes of every plan to what is told of them: means, comparisons, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from star_elastic.evaluate.accuracy import Solved, summarise
from star_elastic.evaluate.bootstrap import LEVEL, RESAMPLES, PairedBootstrap
from star_elastic.evaluate.compare import compare
from star_elastic.evaluate.grid import Entry
from star_elastic.evaluate.problems import TEST, VALIDATION, Splits


def assemble(
    entries: Sequence[Entry],
    splits: Splits,
    solved: Sequence[Mapping[str, Solved]],
    *,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Every plan with its means on both splits and its difference to the largest size alone, and
    all comparisons, as plain data. `solved` are by split, `seed` is of the bootstrap."""
    means = {
        split: {
            entry.label: summarise(entry.plan, problems, found[split], batch_size, entry.label)
            for entry, found in zip(entries, solved, strict=True)
        }
        for split, problems in splits.items()
    }
    right = {e.label: found[TEST].right for e, found in zip(entries, solved, strict=True)}
    bootstrap = PairedBootstrap([problem.task for problem in splits.test], seed)
    comparisons = compare(entries, means[VALIDATION], means[TEST], right, bootstrap)
    plans = []
    for entry, found in zip(entries, solved, strict=True):
        # The largest size alone with the same budget.
        reference = next(
            own for own in entries if own.sizes == entries[0].sizes and entry.budget in own.budgets
        )
        written = [outcome.tokens_by_size for outcome in found[TEST].outcomes]
        plans.append({
            **entry.to_json(),
            **{split: own[entry.label].to_json() for split, own in means.items()},
            "tokens_by_size": {
                size: sum(own.get(size, 0) for own in written) / len(written)
                for size in entry.sizes
            },
            "difference": asdict(bootstrap.interval(right[entry.label], right[reference.label])),
        })  # fmt: skip
    return {
        "intervals": {"level": LEVEL, "resamples": RESAMPLES},
        "plans": plans,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
