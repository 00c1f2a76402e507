"""Wilson's intervals of accuracies."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from star_elastic.evaluate.intervals import QUANTILE, effective_count, wilson_interval


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # As scipy.stats.binomtest(right, count).proportion_ci(method="wilson") has them.
        (200, 200, 0.981155, 1.0),
        (0, 200, 0.0, 0.018845),
        (196, 200, 0.949713, 0.992196),
        (5, 10, 0.236593, 0.763407),
        (1, 1, 0.206549, 1.0),
    ],
)
def test_known_intervals(right, count, low, high):
    assert wilson_interval(right / count, count) == pytest.approx((low, high), abs=1e-6)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_are_where_the_share_is_just_credible(drawn):
    """Each end p solves |share - p| = z sqrt(p (1 - p) / n), and holds the share."""
    right, count = drawn
    low, high = wilson_interval(right / count, count)
    assert 0 <= low <= right / count <= high <= 1 and low < high
    for end in (low, high):
        if 0 < end < 1:
            error = QUANTILE * math.sqrt(end * (1 - end) / count)
            assert abs(right / count - end) == pytest.approx(error, rel=1e-9, abs=1e-12)


def test_a_mean_over_tasks_is_worth_fewer_problems_than_there_are():
    assert effective_count([20] * 10) == pytest.approx(200)
    assert effective_count([7]) == 7
    assert effective_count([1, 99]) == pytest.approx(4 / (1 + 1 / 99))
    assert effective_count([10, 30]) < 40
