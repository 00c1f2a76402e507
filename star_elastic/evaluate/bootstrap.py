"""How sure a difference between two plans is: both solve the same problems, which are resampled.

A problem that both plans solve, or that neither does, tells nothing of their difference; so the
interval comes from the pairs of outcomes, not from two accuracies. R resamples, N problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2_000
LEVEL = 0.95
LEAST_STRATUM = 5
"""Problems of a task below which it is resampled together with others: alone they would hardly
vary, and make differences look sure."""


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
