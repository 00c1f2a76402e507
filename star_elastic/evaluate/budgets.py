"""Thinking budgets to try: from the lengths of natural traces; those that coincide, once.

A budget that cuts no trace, or cuts every trace where another does, makes the plans of the other
once more. Where budgets cut is known from the traces that the sizes end themselves: up to its cut a
trace is the same whatever its budget is (at temperature 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from star_elastic.generate.phases import DEFAULT_GRACE

TRACE_QUANTILES = (0.25, 0.5, 0.75)
"""Of the lengths of the largest size's traces: the budgets that are tried if none are named."""
TRACE_SHARE = 0.75
"""Of all new tokens that such a budget, with its grace, may leave to the trace."""

Budget = int | None


def natural_budgets(lengths: Sequence[int], max_new_tokens: int) -> list[Budget]:
    """Budgets that cut a part of traces of these lengths and leave room for an answer, and none."""
    room = int(TRACE_SHARE * max_new_tokens) - DEFAULT_GRACE
    cuts = {min(int(cut), room) for cut in np.quantile(lengths, TRACE_QUANTILES)}
    return [*sorted(cut for cut in cuts if cut > 0), None]


def cut_place(
    trace: Sequence[int],
    budget: Budget,
    ends_line: Callable[[int], bool],
    grace: int = DEFAULT_GRACE,
) -> int | None:
    """How many tokens of a trace a budget leaves, None where the trace ends before it is cut."""
    if budget is None:
        return None
    last = min(budget + grace, len(trace))
    place = next((n for n in range(budget, last) if n and ends_line(trace[n - 1])), last)
    return place if place < len(trace) else None


def merge_budgets(
    budgets: Sequence[Budget],
    traces: Iterable[Sequence[int]],
    ends_line: Callable[[int], bool],
) -> dict[Budget, list[Budget]]:
    """Budgets to try, each with those that cut the traces exactly where it does (itself included).

    No budget stands for those that cut nothing if it is among them, else the smallest for all. A
    budget of 0 opens no trace: it stands for itself. The order is that of `budgets`.
    """
    traces = list(traces)
    alike: dict[object, list[Budget]] = {}
    for budget in budgets:
        cuts = tuple(cut_place(trace, budget, ends_line) for trace in traces)
        alike.setdefault(0 if budget == 0 else cuts, []).append(budget)
    chosen: dict[Budget, list[Budget]] = {}
    for own in alike.values():
        chosen[None if None in own else min(b for b in own if b is not None)] = own
    order = sorted(chosen, key=lambda budget: math.inf if budget is None else budget)
    return {budget: chosen[budget] for budget in order}
