"""Which budgets some widths of a grid can meet: all others are refused before training."""

from __future__ import annotations

from dataclasses import replace

from star_elastic.axes import LAYERS
from star_elastic.cost.amounts import show_amount
from star_elastic.cost.count import METRICS, CostModel
from star_elastic.errors import BudgetError
from star_elastic.router.budget import REACH, Budgets, describe
from star_elastic.router.grid import Grid
from star_elastic.router.search import nearest


def check_reach(name: str, budgets: Budgets, cost: CostModel, grid: Grid) -> None:
    """Raises BudgetError unless each budget by itself lies between the grid's ends.

    For a grid whose layers are not ranked yet, the ranking that leaves the cheapest counts: what
    lies outside then, no ranking meets.
    """
    if not budgets:
        raise BudgetError(f"size {name!r} has no budget; give one, for example active = 0.5")
    full = cost.axis_map.full
    for metric, fraction in budgets.items():
        if metric not in METRICS:
            raise BudgetError(
                f"size {name!r}: budget {metric!r} is unknown; use {', '.join(METRICS)}"
            )
        ranked = grid if grid.is_ranked else replace(grid, depth=_cheapest(grid, cost, metric))
        least = cost.count({**full, **ranked.narrowest()})
        whole = cost.count(full).metric(metric)
        floor = least.metric(metric) / whole
        if not floor <= fraction <= 1:
            asked, ends = (show_amount(share * whole, metric) for share in (fraction, floor))
            raise BudgetError(
                f"size {name!r}: {metric}={fraction:.4g} ({asked}) cannot be met; the choices "
                f"reach from {floor:.3f} ({ends}) to 1 ({show_amount(whole, metric)}); ask for "
                "what lies between, or widen the choices"
            )


def _cheapest(grid: Grid, cost: CostModel, metric: str) -> tuple[int, ...]:
    """The layers by what they cost at the narrowest widths of the grid."""
    layers = cost.axis_map.axes[LAYERS].layers
    others = replace(grid, choices={a: c for a, c in grid.choices.items() if a != LAYERS})
    narrowest = {**cost.axis_map.full, **others.narrowest()}

    def alone(layer: int) -> float:
        return cost.count({**narrowest, LAYERS: tuple(int(o == layer) for o in layers)}).metric(
            metric
        )

    return tuple(sorted(layers, key=alone))


def check_budgets(name: str, budgets: Budgets, cost: CostModel, grid: Grid) -> None:
    """Raises BudgetError unless the budgets are known and some widths of the grid meet them all."""
    check_reach(name, budgets, cost, grid)
    found = nearest(grid, cost, budgets)
    if found.miss > REACH:
        raise BudgetError(
            f"size {name!r}: no widths of the choices meet {describe(budgets)} within {REACH:.0%}; "
            f"the nearest ({found.widths}) miss by {found.miss:.1%}: change a budget or give finer "
            "choices"
        )
