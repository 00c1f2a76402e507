"""At which widths a latency table is measured, and at which it is checked.

Integers only: nothing is built or timed here.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

from star_elastic.axes import LAYERS, Axis, AxisMap
from star_elastic.axes.widths import Width, Widths
from star_elastic.cost.latency import kind_axes, layer_kinds
from star_elastic.errors import ShapeError

MAX_COMBINATIONS = 16
"""Points of one kind's own axes (hidden comes on top): the axes with the fewest units lose their
middle point first."""
STEPS = (128, 64, 32, 16, 8)
"""Steps between widths that kernels like, of which the largest that divides an axis in at least
four is taken."""

Points = dict[str, tuple[int, ...]]
"""Ascending widths of every axis but `layers`; the last one is full."""


def grid_points(axis_map: AxisMap, choices: Mapping[str, Sequence[int]] | None = None) -> Points:
    """Up to three widths per axis, legal in every combination: narrow, middle and full.

    The narrowest is the smallest of the axis's `choices`, and an axis without any stays at full
    width; without choices at all, every axis goes down to half.
    """
    points: Points = {}
    axes = [axis for axis in axis_map.axes.values() if axis.name != LAYERS]
    for axis in sorted(axes, key=lambda axis: axis.is_global):
        widths = [width for width in _steps(axis) if 2 * width >= axis.size]
        if choices is not None:
            widths = sorted({*choices.get(axis.name, ()), axis.size})
        legal = [width for width in widths if _fits(axis_map, axis, width, points)]
        middle = min(legal, key=lambda w: (abs(2 * w - legal[0] - legal[-1]), -w))
        points[axis.name] = tuple(sorted({legal[0], middle, legal[-1]}))
    for component in _components(axis_map):
        for name in sorted(component, key=lambda name: axis_map.axes[name].size):
            if math.prod(len(points[other]) for other in component) > MAX_COMBINATIONS:
                points[name] = (points[name][0], points[name][-1])
    return points


def _steps(axis: Axis) -> list[int]:
    """Regular widths of an axis, ascending, the full one included."""
    step = axis.num_groups
    for larger in STEPS:
        if axis.size % larger == 0 and larger % step == 0 and axis.size // larger >= 4:
            step = larger
            break
    return [width for width in range(step, axis.size + 1, step) if width >= axis.minimum]


def _fits(axis_map: AxisMap, axis: Axis, width: int, points: Points) -> bool:
    """Whether a width goes with every point of every other axis, taken one at a time."""
    others = [{name: w} for name, widths in points.items() for w in widths] or [{}]
    combined = ({**other, axis.name: width} for other in others)
    return width == axis.size or _are_legal(axis_map, combined)


def _are_legal(axis_map: AxisMap, candidates: Iterable[Mapping[str, Width]]) -> bool:
    """Whether models could have each of these widths."""
    try:
        for widths in candidates:
            axis_map.complete(widths)
    except ShapeError:
        return False
    return True


def _components(axis_map: AxisMap) -> list[list[str]]:
    """The layers' axes in sets that belong to different kinds of layer."""
    components: list[list[str]] = []
    layers = dict(zip(layer_kinds(axis_map), axis_map.axes[LAYERS].layers, strict=True))
    for layer in layers.values():
        own = [name for name in kind_axes(axis_map, layer) if not axis_map.axes[name].is_global]
        touching = [c for c in components if set(c) & set(own)]
        merged = dict.fromkeys(itertools.chain(own, *touching))
        components = [c for c in components if c not in touching] + [list(merged)]
    return [component for component in components if component]


def grid_widths(axis_map: AxisMap, points: Points) -> Iterator[Widths]:
    """Widths of the models whose blocks together cover every point of every kind's grid.

    Axes of different kinds move at the same time, from all narrow to all full, so there are as many
    models as the largest kind has points.
    """
    shared = [name for name in points if axis_map.axes[name].is_global]
    combinations = [
        [dict(zip(c, widths, strict=True)) for widths in itertools.product(*(points[n] for n in c))]
        for c in _components(axis_map)
    ]
    most = max(map(len, combinations), default=1)
    for outer in itertools.product(*(points[name] for name in shared)):
        for number in range(most):
            widths = dict(zip(shared, outer, strict=True))
            for combination in combinations:
                widths |= combination[number * len(combination) // most]
            yield axis_map.complete(widths)


def random_widths(axis_map: AxisMap, points: Points, count: int, seed: int) -> list[Widths]:
    """Random legal widths inside the grid, mostly between its points; the same for one seed.

    Every other one has widths of its own in each layer.
    """
    drawn = random.Random(f"{seed} latency checks")
    found: list[Widths] = []
    for _ in range(100 * count):
        if len(found) == count:
            break
        widths: dict[str, Width] = {}
        for name, axis in axis_map.axes.items():
            if name == LAYERS:
                continue
            grid = points[name]
            inside = [w for w in _steps(axis) if grid[0] <= w <= grid[-1]] or [axis.size]
            per_layer = [drawn.choice(inside) for _ in axis.layers or (0,)]
            varies = len(found) % 2 and not axis.is_global
            widths[name] = tuple(per_layer) if varies else per_layer[0]
        of_layers = (  # the widths of every layer, as if they were those of a whole model
            {n: axis_map.width(widths, n, layer) for n in kind_axes(axis_map, layer)}
            for layer in axis_map.axes[LAYERS].layers
        )
        if _are_legal(axis_map, itertools.chain([widths], of_layers)):
            found.append(axis_map.complete(widths))
    return found
