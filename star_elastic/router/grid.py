"""The grid: which widths a router may choose, and what its decisions mean as widths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from star_elastic.axes import LAYERS, AxisMap
from star_elastic.axes.widths import Widths, default_step
from star_elastic.errors import ConfigError, ShapeError

KEPT_WHOLE = ("heads", "layers", "top_k")
"""Axes that are not elastic unless asked for: the papers keep them."""


@dataclass(frozen=True, slots=True)
class Place:
    """One decision: an axis, and the number of the layer among those that have it (None: all)."""

    axis: str
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class Grid:
    """The widths to choose from, widest first on each axis; all of them go together, which
    `make_grid` checks.

    `per_layer` maps the axes on which every layer decides for itself to the number of its layers.
    The choices of `layers` are numbers of layers; `depth` lists the layers, most important first
    (empty: not ranked yet).
    """

    choices: Mapping[str, tuple[int, ...]]
    per_layer: Mapping[str, int] = field(default_factory=dict)
    depth: tuple[int, ...] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        """Every decision, in order."""
        return tuple(
            Place(axis, layer)
            for axis in self.choices
            for layer in (range(self.per_layer[axis]) if axis in self.per_layer else (None,))
        )

    @property
    def is_ranked(self) -> bool:
        """Whether it is known which layers there are for every number of them."""
        return LAYERS not in self.choices or bool(self.depth)

    def presence(self, count: Any) -> tuple[Any, ...]:
        """Which layers there are, in their order, if the `count` most important ones are kept."""
        ranks = {layer: rank for rank, layer in enumerate(self.depth)}
        kept = (count > ranks[layer] for layer in range(len(self.depth)))
        return tuple(value.double() if hasattr(value, "double") else int(value) for value in kept)

    def widths(self, chosen: Sequence[Any]) -> dict[str, Any]:
        """Widths by axis from one number (or tensor of numbers) for every place."""
        grouped: dict[str, list] = {}
        for place, value in zip(self.places, chosen, strict=True):
            grouped.setdefault(place.axis, []).append(value)
        return {
            axis: self.presence(values[0])
            if axis == LAYERS
            else tuple(values)
            if axis in self.per_layer
            else values[0]
            for axis, values in grouped.items()
        }

    def at(self, positions: Sequence[int], axis_map: AxisMap) -> Widths:
        """Integer widths of every axis from the number of the choice at every place. Raises
        ShapeError for widths that do not go together."""
        places = zip(self.places, positions, strict=True)
        chosen = [self.choices[place.axis][number] for place, number in places]
        return axis_map.complete(self.widths(chosen))

    def narrowest(self) -> dict[str, Any]:
        """The narrowest widths."""
        return self.widths([self.choices[place.axis][-1] for place in self.places])


def default_choices(axis_map: AxisMap) -> dict[str, tuple[int, ...]]:
    """Widths from full down to half on every axis that the papers cut."""
    grid = {}
    for name, axis in axis_map.axes.items():
        if name in KEPT_WHOLE:
            continue
        step = max(default_step(axis.size, axis.num_groups), axis.num_groups)
        divisors = [axis_map.axes[d].size for first, d in axis_map.multiples if first == name]
        step = math.lcm(step, *divisors) if divisors else step
        least = max(axis.size // 2, axis.minimum)
        widths = [w for w in range(axis.size, least - 1, -step) if w % axis.num_groups == 0]
        if len(widths) > 1:
            grid[name] = tuple(widths)
    return grid


def grid_holding(sizes: Iterable[Widths], axis_map: AxisMap) -> Grid:
    """The grid of the widths that some sizes and the parent have: on every axis that a size cuts,
    with one width for all layers.

    Left whole, although sizes cut them, are axes whose widths do not go together in every
    combination (hidden channels and heads of llama), and layers that no ranking leaves.
    """
    sizes = list(sizes)
    choices: dict[str, tuple[int, ...]] = {}
    for name, axis in axis_map.axes.items():
        found = {axis.size} | {width for own in sizes if isinstance(width := own[name], int)}
        if len(found) > 1 and name != LAYERS:
            choices[name] = tuple(sorted(found, reverse=True))
    for pair in axis_map.multiples:
        first, second = (choices.get(name, (axis_map.axes[name].size,)) for name in pair)
        if any(a % b for a in first for b in second):
            for name in pair:
                choices.pop(name, None)
    layers = axis_map.axes[LAYERS].layers
    kept = [set(axis_map.kept_layers(own)) for own in sizes]
    depth = sorted(layers, key=lambda layer: -sum(layer in own for own in kept))
    counts = sorted({len(layers), *map(len, kept)}, reverse=True)
    if len(counts) == 1 or any(own != set(depth[: len(own)]) for own in kept):
        return make_grid(choices, axis_map)
    return make_grid({**choices, LAYERS: tuple(counts)}, axis_map, depth=depth)


def check_choices(choices: Mapping[str, tuple[int, ...]], axis_map: AxisMap) -> None:
    """Raises ShapeError or ConfigError unless every axis's grid is legal and starts at full."""
    for name, grid in choices.items():
        if name not in axis_map.axes:
            raise ShapeError(
                f"choices.{name}: no such axis in this {axis_map.model_type} model; "
                f"use {', '.join(axis_map.axes)}"
            )
        axis = axis_map.axes[name]
        full = len(axis.layers) if name == LAYERS else axis.size
        if not grid or list(grid) != sorted(set(grid), reverse=True) or grid[0] != full:
            raise ConfigError(
                f"choices.{name}={list(grid)} does not descend from the full width {full}; begin "
                f"with {full}, and go on with smaller ones"
            )
        if name == LAYERS and grid[-1] < 1:
            raise ConfigError(
                f"choices.layers={list(grid)} leaves no layer at its end; keep at least one"
            )
        for width in () if name == LAYERS else grid:
            axis_map.check_width(name, width)
    for first, second in axis_map.multiples:
        pairs = itertools.product(
            *(choices.get(name, (axis_map.axes[name].size,)) for name in (first, second))
        )
        for pair in pairs:
            axis_map.complete(dict(zip((first, second), pair, strict=True)))


def make_grid(
    choices: Mapping[str, tuple[int, ...]],
    axis_map: AxisMap,
    *,
    per_layer: Sequence[str] = (),
    depth: Sequence[int] = (),
) -> Grid:
    """A checked grid; without `depth` its layers are not ranked yet. Raises ShapeError or
    ConfigError."""
    check_choices(choices, axis_map)
    for name in per_layer:
        if name not in choices or name == LAYERS or axis_map.axes[name].is_global:
            able = [n for n in choices if n != LAYERS and not axis_map.axes[n].is_global]
            raise ConfigError(
                f"per_layer names {name!r}, whose width cannot differ between layers here; "
                f"use {', '.join(able) or 'none'}"
            )
    counts = {name: len(axis_map.axes[name].layers) for name in per_layer}
    if LAYERS not in choices:
        return Grid(dict(choices), counts)
    layers = axis_map.axes[LAYERS].layers
    if depth and sorted(depth) != list(layers):
        raise ConfigError(f"depth={list(depth)} does not list every layer from 0 to {layers[-1]}")
    grid = Grid(dict(choices), counts)
    return rank_grid(grid, depth, axis_map) if depth else grid


def rank_grid(grid: Grid, depth: Sequence[int], axis_map: AxisMap) -> Grid:
    """The grid with its layers ranked, most important first. Raises ConfigError if some number of
    layers leaves a model that cannot be."""
    ranked = replace(grid, depth=tuple(depth))
    for count in ranked.choices[LAYERS]:
        try:
            axis_map.complete({LAYERS: ranked.presence(count)})
        except ShapeError as error:
            raise ConfigError(
                f"choices.layers has {count}, which would leave the layers {sorted(depth[:count])} "
                f"({error}); leave {count} out"
            ) from None
    return ranked
