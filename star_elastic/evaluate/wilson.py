"""How sure an accuracy is: Wilson's interval, right at 0 and 100 % and for few problems."""

from __future__ import annotations

import math
from collections.abc import Collection

QUANTILE = 1.959964
"""Of the normal distribution, for two-sided intervals of 95 %."""


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in `count` draws (E. B. Wilson, 1927)."""
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
