"""Commitments: the widths that a size is fixed to, and what decided them.

The router's own choice is the likeliest width of every place. It seldom meets a budget to the
unit, so places move along the grid until the cost does. One step each is rounding. More than that,
or a router that still chooses the parent whole, means that the budget has chosen the widths and the
data has not: a commitment says which.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from star_elastic.axes.widths import Widths
from star_elastic.cost.amounts import show_amount
from star_elastic.cost.count import CostModel
from star_elastic.errors import BudgetError
from star_elastic.router.budget import AIM, REACH, Budgets, budget_miss
from star_elastic.router.grid import Grid
from star_elastic.router.router import Decision, Router, Temperature
from star_elastic.router.search import nearest, search

LEARNED = 80
"""Router steps from which its own choice is to be trusted (`benchmarks/planted_axes.py`)."""
ROUNDED = 1e-3
"""Relative distance to a trained budget that counts as that budget."""
ASKED = Temperature(tau=1.0, scale=1.0)
"""Neither changes which widths are likelier than others."""


@dataclass(frozen=True, slots=True)
class Commitment:
    """The widths of a size, how far they are off its budget, and where they come from.

    `miss` is the largest relative distance to a budget, `possible` the smallest that was found for
    any widths of the grid (all were counted unless the grid is too large; None if nobody looked).
    `argmax` is the trained router's own choice (None: there was no router) and `repair` how far
    each axis moved from there, in steps on the grid (negative: narrower; one number for every layer
    where each decides for itself). `data_free_steps` is the number of these steps if one or none
    per place would not have done, else 0. `widths_from`: what decided, the `data`, the `budget`,
    the `config`, or who adopted the family (`adopt`).
    """

    widths: Widths
    miss: float
    repair: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    possible: float | None = None
    argmax: Widths | None = None
    data_free_steps: int = 0
    widths_from: str = "config"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "widths": dict(self.widths),
            "miss": self.miss,
            "repair": dict(self.repair),
            "possible": self.possible,
            "argmax": None if self.argmax is None else dict(self.argmax),
            "data_free_steps": self.data_free_steps,
            "widths_from": self.widths_from,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Commitment:
        """From what `to_json` gave, also after a round through JSON."""
        argmax = content["argmax"]
        repair = {a: tuple(s) if isinstance(s, list) else s for a, s in content["repair"].items()}
        return cls(**{
            **content,
            "widths": Widths(content["widths"]),
            "argmax": None if argmax is None else Widths(argmax),
            "repair": repair,
        })  # fmt: skip


def commit(decision: Decision, budgets: Budgets, cost: CostModel, grid: Grid) -> Commitment:
    """Fixes the widths of a size: what the router says for it, moved onto its budgets.

    Of all widths within one grid step per place of the router's own choice, takes the most probable
    (by the router) that meet the budgets within 0.5 %, or as near as any widths of the grid come.
    If none do, or if the router still chooses the parent whole, the most probable ones of the whole
    grid: from there, how likely what is left out is says more than what is near. No data is looked
    at.
    """
    likely = [pick.probs.detach().cpu().double().clamp_min(1e-30).log() for pick in decision.picks]
    own = tuple(int(log_probs.argmax()) for log_probs in likely)
    possible = nearest(grid, cost, budgets).miss
    found = search(grid, cost, budgets, likely, steps=1)
    is_whole = not any(own) and found.positions != own
    if is_whole or found.miss > max(AIM, possible) * (1 + 1e-9):
        found = search(grid, cost, budgets, likely)
    steps = [at - to for at, to in zip(own, found.positions, strict=True)]
    is_far = max(map(abs, steps)) > 1
    miss = float(budget_miss(found.widths, budgets, cost))
    return Commitment(
        found.widths,
        miss,
        _by_axis(grid, steps),
        min(possible, miss),
        grid.at(own, cost.axis_map),
        sum(map(abs, steps)) if is_far else 0,
        "budget" if is_far or is_whole else "data",
    )


def _by_axis(grid: Grid, steps: Sequence[int]) -> dict[str, int | tuple[int, ...]]:
    """Steps of every place as steps of the axes that moved."""
    grouped: dict[str, list[int]] = {}
    for place, moved in zip(grid.places, steps, strict=True):
        grouped.setdefault(place.axis, []).append(moved)
    return {
        axis: tuple(moved) if axis in grid.per_layer else moved[0]
        for axis, moved in grouped.items()
        if any(moved)
    }


def origin_line(name: str, fixed: Commitment, full: Widths, num_steps: int) -> str:
    """One line if the budget has chosen a size's widths, else nothing. `full` are the parent's
    widths, `num_steps` the steps that the router learned for."""
    if fixed.widths_from != "budget":
        return ""
    if fixed.argmax == full:
        found = "the router still kept the parent whole"
    else:
        found = f"the router's own choice was {fixed.data_free_steps} steps on the grid away"
    advice = (
        f"let it learn for {LEARNED} or more (router.commit_at, stages.tokens)"
        if num_steps < LEARNED
        else "raise router.weight or router.learning_rate"
    )
    return (
        f"{name}: widths come from the budget, not from the data: after {num_steps} steps "
        f"{found}; {advice}"
    )


def settle_between(
    router: Router, trained: Sequence[Budgets], asked: Budgets, cost: CostModel
) -> Commitment:
    """Widths for budgets between two trained ones, by interpolating their budget vectors.

    `trained` are the budgets the router was trained at, in its order. Raises BudgetError for
    budgets outside the trained range, for metrics that no two trained sizes have, and where the
    choices are too coarse for the budget.
    """
    if len(asked) != 1:
        raise BudgetError("give one budget, for example active=0.6, to find widths between sizes")
    ((metric, fraction),) = asked.items()
    known = sorted((b[metric], number) for number, b in enumerate(trained) if metric in b)
    if len(known) < 2:
        counts = Counter(m for budgets in trained for m in budgets)
        others = ", ".join(m for m, count in counts.items() if count > 1)
        raise BudgetError(
            f"this router was not trained for budgets on {metric}: {'one' if known else 'none'} "
            "of its sizes has one, and two are needed to go between; "
            + (f"ask for one on {others}" if others else "name a size in place of a budget")
        )

    def shown(share: float) -> str:
        return f"{share:.4g} ({show_amount(share * cost.full.metric(metric), metric)})"

    def inside(share: float) -> float:
        return min(max(share, known[0][0]), known[-1][0])

    # What was rounded to be written, as in what is advised below, is no other budget.
    if not math.isclose(inside(fraction), fraction, rel_tol=ROUNDED):
        raise BudgetError(
            f"{metric}={shown(fraction)} lies outside the range of {metric} that this router was "
            f"trained for, {shown(known[0][0])} to {shown(known[-1][0])}; ask for a budget inside "
            "it, or train a size there"
        )
    fraction = inside(fraction)
    below = max(pair for pair in known if pair[0] <= fraction)
    above = min(pair for pair in known if pair[0] >= fraction)
    span = above[0] - below[0]
    share = (fraction - below[0]) / span if span else 0.0
    vector = (1 - share) * router.one_hot(below[1]) + share * router.one_hot(above[1])
    found = commit(router.decide(vector, ASKED), {metric: fraction}, cost, router.grid)
    if found.miss > REACH:
        now = cost.count(found.widths).metric(metric) / cost.full.metric(metric)
        raise BudgetError(
            f"no widths of this family's choices meet {metric}={shown(fraction)} within "
            f"{REACH:.0%}; the nearest have {shown(now)}: ask for {metric}={inside(now):.4f}"
        )
    return found
