"""The trained router beside an elastic checkpoint, and sizes that were never named.

The router maps any budget between two trained ones to widths; every such size is a slice of the
same shared weights, but only the named ones were trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from star_elastic.amounts import parse_budget
from star_elastic.axes import AxisMap
from star_elastic.checkpoint import load_tensors
from star_elastic.cost import CostModel, Workload
from star_elastic.errors import CheckpointError, ConfigError, ShapeError, reason
from star_elastic.latency import load_table
from star_elastic.manifest import Manifest
from star_elastic.router.budget import Commitment, settle_between
from star_elastic.router.grid import make_grid
from star_elastic.router.router import Router

ROUTER = "router.safetensors"
LATENCY = "latency.json"
"""The table that budgets in milliseconds were counted with, if there were any."""


def load_router(directory: str | Path, manifest: Manifest, axis_map: AxisMap) -> Router:
    """The router of an elastic checkpoint. Raises CheckpointError if it is missing or damaged."""
    file = Path(directory) / ROUTER
    if not file.is_file():
        raise CheckpointError(
            f"{directory} has no router, so it has only the sizes {', '.join(manifest.sizes)}; "
            "name one of them"
        )
    try:
        grid = make_grid(
            manifest.choices, axis_map, per_layer=manifest.per_layer, depth=manifest.depth
        )
        if not grid.is_ranked:
            raise ConfigError("depth is missing")
    except (ShapeError, ConfigError) as error:
        raise CheckpointError(f"elastic.json is damaged ({error}); restore the file") from None
    router = Router(grid, len(manifest.sizes))
    try:
        router.load_state_dict(load_tensors(file))
    except RuntimeError as error:
        raise CheckpointError(
            f"{file} does not belong to this checkpoint's choices ({reason(error, -1)}); restore it"
        ) from None
    return router


def widths_for(
    directory: str | Path,
    manifest: Manifest,
    axis_map: AxisMap,
    budget: Mapping[str, float | str],
) -> Commitment:
    """Widths for one budget between trained ones, for example `{"active": 0.6}`.

    Raises BudgetError for a budget outside the trained range, ConfigError for one that cannot be
    read, CheckpointError if there is no router.
    """
    router = load_router(directory, manifest, axis_map)
    table = Path(directory) / LATENCY
    needed = "ms" in budget and table.is_file()
    measured = load_table(table, axis_map).milliseconds if needed else None
    try:
        workload = Workload(**manifest.provenance.get("workload", {}))
    except TypeError as error:
        raise CheckpointError(f"elastic.json is damaged ({error}); restore the file") from None
    cost = CostModel(axis_map, workload, measured)
    full = cost.count(axis_map.full)
    asked = {
        metric: parse_budget(amount, metric).fraction_of(full.metric(metric))
        for metric, amount in budget.items()
    }
    trained = [size.budgets for size in manifest.sizes.values()]
    return settle_between(router, trained, asked, cost)
