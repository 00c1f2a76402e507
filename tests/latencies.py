"""Made-up latency tables: times in which widths surely make a difference."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from star_elastic.axes import AxisMap
from star_elastic.cost.latency import (
    Grid,
    LatencyTable,
    Machine,
    kind_axes,
    layer_kinds,
    layout_digest,
)
from star_elastic.measure.latency_grid import grid_points

MACHINE = Machine(device="a machine", threads=1, torch="2.13.0")


def made_up(
    axis_map: AxisMap, seed: int = 0, choices: Mapping[str, Sequence[int]] | None = None
) -> LatencyTable:
    """A table of random times on the grid that would be measured (for `choices`)."""
    drawn = random.Random(seed)
    points = grid_points(axis_map, choices)

    def grid(axes: tuple[str, ...]) -> Grid:
        shape = tuple(points[axis] for axis in axes)
        return Grid(axes, shape, tuple(drawn.random() for _ in range(math.prod(map(len, shape)))))

    kinds = layer_kinds(axis_map)
    return LatencyTable(
        family=axis_map.model_type,
        full={name: axis.size for name, axis in axis_map.axes.items()},
        layers=kinds,
        digest=layout_digest(axis_map),
        machine=MACHINE,
        dtype="float32",
        phase="decode",
        batch=2,
        context=16,
        parts={kind: grid(kind_axes(axis_map, kinds.index(kind))) for kind in dict.fromkeys(kinds)},
        fixed=grid(("hidden",)),
    )
