"""The trained router beside an elastic checkpoint, and sizes that were never named.

The router maps any budget between two trained ones to widths; every such size is a slice of the
same shared weights, but only the named ones were trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from star_elastic.axes import Widths
from star_elastic.checkpoints.companions import LATENCY, ROUTER
from star_elastic.checkpoints.elastic import ElasticCheckpoint
from star_elastic.checkpoints.tensors import is_finite
from star_elastic.cost.amounts import parse_budget
from star_elastic.cost.count import CostModel, Workload
from star_elastic.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    ShapeError,
    library_boundary,
)
from star_elastic.router.commit import Commitment, settle_between
from star_elastic.router.grid import Grid, make_grid
from star_elastic.router.router import Router
from star_elastic.strict import parse

HALVINGS = 6
"""How often the range of budgets is halved to find the largest whose widths fit."""


def family_grid(family: ElasticCheckpoint) -> Grid:
    """The widths that a family's sizes were chosen from. Raises CheckpointError if they do not fit
    its model."""
    manifest = family.manifest
    try:
        grid = make_grid(
            manifest.choices, family.axis_map, per_layer=manifest.per_layer, depth=manifest.depth
        )
        if not grid.is_ranked:
            raise ConfigError("depth is missing")
    except (ShapeError, ConfigError) as error:
        raise CheckpointError(f"elastic.json is damaged ({error}); restore the file") from None
    return grid


def load_router(family: ElasticCheckpoint) -> Router:
    """The router of an elastic checkpoint. Raises CheckpointError if it is missing or damaged."""
    manifest, state, file = family.manifest, family.router_state, family.path / ROUTER
    if state is None:
        raise CheckpointError(
            f"{family.path} has no router, so it has only the sizes {', '.join(manifest.sizes)}; "
            "name one of them"
        )
    router = Router(family_grid(family), len(manifest.sizes))
    if not all(map(is_finite, state.values())):
        raise CheckpointError(f"{file} holds values that are not finite; restore the file")
    with library_boundary(f"{file} does not belong to this checkpoint's choices", "restore it"):
        router.load_state_dict(state)
    return router


def widths_for(family: ElasticCheckpoint, budget: Mapping[str, float | str]) -> Commitment:
    """Widths for one budget between trained ones, for example `{"active": 0.6}`.

    What a family's router counts was counted before the family was quantised. It still says what
    shares of time and bytes mean, but no times or bytes of the quantised model: those are refused.
    Raises BudgetError for a budget outside the trained range or too fine for the choices,
    ConfigError for one that cannot be read, CheckpointError if there is no router.
    """
    router, manifest = load_router(family), family.manifest
    table = family.latency if "ms" in budget else None
    try:
        workload = parse(Workload, manifest.provenance.get("workload", {}), "provenance.workload.")
    except ConfigError as error:
        raise CheckpointError(f"elastic.json is damaged ({error}); restore the file") from None
    cost = CostModel(family.axis_map, workload, table and table.milliseconds)
    amounts = {metric: parse_budget(amount, metric) for metric, amount in budget.items()}
    if family.is_quantised and table is not None and not amounts["ms"].is_fraction:
        raise ConfigError(
            f"ms={budget['ms']!r} is a time, but {family.path / LATENCY} was measured before the "
            "family was quantised; give a share of the parent's time, like ms=0.6"
        )
    if family.is_quantised and "bytes" in amounts and not amounts["bytes"].is_fraction:
        raise ConfigError(
            f"bytes={budget['bytes']!r} is an amount, but the router of a quantised family counts "
            "the bytes that it had before; give a share of the parent's, like bytes=0.6"
        )
    asked = {
        metric: amount.fraction_of(cost.full.metric(metric)) for metric, amount in amounts.items()
    }
    trained = [size.budgets for size in manifest.sizes.values()]
    return settle_between(router, trained, asked, cost)


def widths_within(
    family: ElasticCheckpoint, fits: Callable[[Widths], bool]
) -> tuple[dict[str, float], Commitment] | None:
    """The largest budget between trained ones whose widths, by the family's router, fit; and those
    widths. None if there is no router, if no metric was trained at two sizes, or if nothing fits.

    What fits is asked of widths themselves: the budget is on a metric that the router was trained
    for. It is found to within the range over 2^`HALVINGS`.
    """
    if family.router_state is None:
        return None
    trained = [size.budgets for size in family.manifest.sizes.values()]
    shared = [m for m in (trained[0] if trained else ()) if sum(m in b for b in trained) > 1]
    if not shared:
        return None
    metric = shared[0]
    shares = [budgets[metric] for budgets in trained if metric in budgets]

    def asked(share: float) -> Commitment | None:
        try:
            found = widths_for(family, {metric: share})
        except BudgetError:  # the choices are too coarse for it
            return None
        return found if fits(found.widths) else None

    low, high = min(shares), max(shares)
    for share in (high, low):
        if best := asked(share):
            break
    else:
        return None
    if share == high:
        return {metric: high}, best
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if found := asked(middle):
            low, best = middle, found
        else:
            high = middle
    return {metric: low}, best
