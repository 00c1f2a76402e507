"""Thinking budgets to try: from the lengths of natural traces; those that coincide, once.

A budget that cuts no trace, or cuts every trace where another does, makes the plans of the other
once more. Where budgets cut is known from the traces that the sizes end themselves: up to its cut a
trace is the same whatever its budget is (at temperature 0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from star_elastic.generate.phases import DEFAULT_GRACE

TRACE_QUANTILES = (0.25, 0.5, 0.75)
"""Of the lengths of the largest size's traces: the budgets that are tried if none are named."""
TRACE_SHARE = 0.75
"""Of all new tokens that such a budget, with its grace, may leave to the trace."""

Budget = int | None


@dataclass(frozen=True, slots=True)
class Thought:
    """The trace of one text, as ids; `is_reopened` where its model has opened it again later."""

    trace: tuple[int, ...]
    is_reopened: bool = False


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


def alike_budgets(
    budgets: Sequence[Budget],
    thoughts: Sequence[Thought],
    ends_line: Callable[[int], bool],
) -> list[list[Budget]]:
    """The budgets in groups that cut all these traces at the same places; 0, which opens no trace,
    is by itself.

    A trace that is opened again has what the first one left of the budget, which differs from
    budget to budget: where no budget has cut before, none is like another.
    """
    alike: dict[object, list[Budget]] = {}
    for budget in budgets:
        cuts = []
        for thought in thoughts:
            place = cut_place(thought.trace, budget, ends_line)
            is_left = thought.is_reopened and place is None
            cuts.append(("left of", budget) if is_left else place)
        alike.setdefault(0 if budget == 0 else tuple(cuts), []).append(budget)
    return list(alike.values())


def common_groups(
    budgets: Sequence[Budget], groupings: Sequence[Sequence[Sequence[Budget]]]
) -> dict[Budget, tuple[Budget, ...]]:
    """Groups of budgets that are alike in every grouping, each by the budget that stands for it:
    none if it is among them, else the smallest. The order is that of `budgets`."""
    alike: dict[object, list[Budget]] = {}
    for budget in budgets:
        places = [next(i for i, own in enumerate(g) if budget in own) for g in groupings]
        alike.setdefault(tuple(places) if groupings else budget, []).append(budget)
    groups = {min(own, key=lambda b: -1 if b is None else b): tuple(own) for own in alike.values()}
    return {budget: groups[budget] for budget in budgets if budget in groups}


NO_BUDGET = "none"


def coinciding(alike: Mapping[str, Iterable[Sequence[int | None]]]) -> list[str]:
    """`16, 32 and none (of large and small)`: groups of budgets that come to the same, from those
    of every size."""
    sizes: dict[tuple[int | None, ...], list[str]] = {}
    for size, groups in alike.items():
        for group in groups:
            if len(group) > 1:
                sizes.setdefault(tuple(group), []).append(size)
    return [
        listed(NO_BUDGET if budget is None else str(budget) for budget in group)
        + f" (of {listed(names)})"
        for group, names in sizes.items()
    ]


def listed(names: Iterable[str]) -> str:
    """`a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
