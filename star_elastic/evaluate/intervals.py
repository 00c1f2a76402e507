"""How sure an accuracy is, and how sure a difference between two plans is.

A problem that both plans solve, or that neither does, tells nothing of their difference. So the
interval of a difference comes from the pairs of outcomes on the same problems, which are resampled,
not from two accuracies. R resamples, N problems.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL, QUANTILE = 0.95, 1.959964
"""How sure intervals are, and the quantile of the normal distribution at their upper end."""
RESAMPLES = 2_000
LEAST_STRATUM = 5
"""Problems of a task below which it is resampled together with others: alone they would hardly
vary, and make differences look sure."""


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in `count` draws (E. B. Wilson, 1927), which is
    right at 0 and 100 % and for few draws."""
    assert count > 0 and 0 <= share <= 1 + 1e-9, (share, count)
    square = QUANTILE**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    spread = max(share * (1 - share), 0.0) / count + square / (4 * count**2)
    reach = QUANTILE / (1 + square / count) * math.sqrt(spread)
    # Both ends are exact at 0 and 1 but for rounding.
    return (max(middle - reach, 0.0) if share > 0 else 0.0), (middle + reach if share < 1 else 1.0)


def effective_count(counts: Collection[int]) -> float:
    """Problems that a mean over tasks is worth, from the problems of each task: all of them where
    tasks have equally many, fewer where a small task weighs as much as a large one (L. Kish's
    effective sample size)."""
    return len(counts) ** 2 / sum(1 / count for count in counts)


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference, and the percentile interval that holds it at `LEVEL`."""

    difference: float
    low: float
    high: float


class PairedBootstrap:
    """Resamples of problems, drawn within each task, with as many of it as there are.

    Tasks of fewer than `LEAST_STRATUM` problems are drawn together. A difference is the mean over
    tasks of the mean over the task's problems, as accuracies are. The draws depend on the tasks of
    the problems (N,) and the seed only: all differences are looked at on the same resamples.
    """

    def __init__(self, tasks: Sequence[str], seed: int = 0, resamples: int = RESAMPLES):
        names, task_N, counts = np.unique(np.array(tasks), return_inverse=True, return_counts=True)
        self._weight_N = 1 / (len(names) * counts[task_N])
        stratum_N = np.where(counts[task_N] < LEAST_STRATUM, -1, task_N)
        rng = np.random.default_rng(seed)
        self._times_RN = np.zeros((resamples, len(tasks)))
        for stratum in np.unique(stratum_N):
            own_N = stratum_N == stratum
            count = int(own_N.sum())
            drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
            self._times_RN[:, own_N] = drawn

    def mean(self, values: Sequence[float]) -> float:
        """The mean over tasks of the means over their problems; values (N,)."""
        return float(np.asarray(values, float) @ self._weight_N)

    def interval(self, ours: Sequence[float], theirs: Sequence[float]) -> Interval:
        """Of our mean minus theirs; both (N,), in the order of the problems.

        Where no problem tells the two apart, resampling knows no spread: then it is 3 / N to both
        sides, above which 95 % of such samples would have shown a difference (the rule of three),
        and no more than 1.
        """
        differences_N = np.asarray(ours, float) - np.asarray(theirs, float)
        if not differences_N.any():
            spread = min(3 / len(differences_N), 1.0)
            return Interval(0.0, -spread, spread)
        weighted_N = differences_N * self._weight_N
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(self._times_RN @ weighted_N, [tail, 1 - tail])
        # Sums that are zero but for rounding must not look like gains or losses.
        return Interval(*(round(float(x), 12) + 0.0 for x in (weighted_N.sum(), low, high)))
