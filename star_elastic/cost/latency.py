"""Milliseconds per token at any widths, from a table that was measured on one machine.

A table holds one grid of times per kind of block (layers with equal tensors are of one kind) and
one for what is outside the blocks: embedding, final norm, LM head and the overhead of a step. The
time of a model is their sum at the layers' widths. Like cost.py this is plain arithmetic: exact at
the grid's points, and differentiable when widths are tensors. `evaluate/latency.py` measures.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from star_elastic.axes import LAYERS, AxisMap, Block
from star_elastic.errors import CheckpointError, library_boundary
from star_elastic.files.paths import exists

FORMAT_VERSION = 1
PHASES = ("decode", "prefill")
MEASURE = "measure this model with star-elastic latency"


@dataclass(frozen=True, slots=True)
class Grid:
    """Measured milliseconds over a grid of widths.

    `points` are the ascending widths of each axis in `axes`, `milliseconds` the values in row-major
    order (the last axis fastest). A wider block is never faster in the table, whatever the noise:
    the values are made monotone along every axis (`monotone`) when a grid is built.
    """

    axes: tuple[str, ...]
    points: tuple[tuple[int, ...], ...]
    milliseconds: tuple[float, ...]

    def __post_init__(self) -> None:
        shape = [len(widths) for widths in self.points]
        if len(self.axes) != len(shape) or len(self.milliseconds) != math.prod(shape):
            raise ValueError(f"{len(self.milliseconds)} times do not fill {self.axes} x {shape}")
        if any(list(widths) != sorted(set(widths)) or not widths for widths in self.points):
            raise ValueError(f"widths {self.points} are not ascending")
        if not all(0 <= value < math.inf for value in self.milliseconds):
            raise ValueError("times must be finite and not negative")
        object.__setattr__(self, "milliseconds", monotone(shape, self.milliseconds))

    def at(self, widths: Sequence[Any]) -> Any:
        """Milliseconds at one width per axis of the grid, multilinear between its points.

        Widths outside the grid continue the slope of the outermost interval, so that a router
        keeps a gradient there. Widths may be numbers, scalar tensors, or tensors (n,) of widths.
        """
        if any(getattr(width, "ndim", 0) for width in widths):
            return self._at_many(widths)
        places = [_place(grid, width) for grid, width in zip(self.points, widths, strict=True)]

        def fold(axis: int, row: int) -> Any:
            if axis == len(places):
                return self.milliseconds[row]
            low, share = places[axis]
            row = row * len(self.points[axis]) + low
            below = fold(axis + 1, row)
            # Exact at both ends, which below + (above - below) * share is not.
            return below if share is None else below * (1 - share) + fold(axis + 1, row + 1) * share

        return fold(0, 0)

    def _at_many(self, widths: Sequence[Any]) -> Any:
        """`at` for tensors (n,): every point of the grid with its weight."""
        weights = [_weights(grid, width) for grid, width in zip(self.points, widths, strict=True)]

        def fold(axis: int, row: int) -> Any:
            if axis == len(weights):
                return self.milliseconds[row]
            row *= len(self.points[axis])
            return sum(w * fold(axis + 1, row + point) for point, w in enumerate(weights[axis]))

        return fold(0, 0)


def _weights(points: tuple[int, ...], width: Any) -> list[Any]:
    """How much each point of an axis counts at a tensor of widths; they sum to 1."""
    if len(points) == 1:
        return [1.0]
    last = len(points) - 2
    steps = []
    for number, (low, high) in enumerate(pairwise(points)):
        share = (width - low) / (high - low)
        if number > 0 or last > 0:
            floor = None if number == 0 else 0.0
            share = _clamp(share, floor, None if number == last else 1.0)
        steps.append(share)
    inner = [before - after for before, after in pairwise(steps)]
    return [1 - steps[0], *inner, steps[-1]]


def _clamp(value: Any, low: float | None, high: float | None) -> Any:
    if hasattr(value, "clamp"):
        return value.clamp(min=low, max=high)
    value = value if low is None else max(value, low)
    return value if high is None else min(value, high)


def _place(points: tuple[int, ...], width: Any) -> tuple[int, Any]:
    """The interval of a width and how far inside it stands; None where there is one point."""
    if len(points) == 1:
        return 0, None
    low = 0
    while low < len(points) - 2 and width > points[low + 1]:
        low += 1
    return low, (width - points[low]) / (points[low + 1] - points[low])


def monotone(shape: Sequence[int], values: Sequence[float]) -> tuple[float, ...]:
    """Values of a row-major grid made non-decreasing along every axis.

    The mean of the running maximum (from the narrow end) and of the running minimum (from the wide
    end): each is monotone, and where the maximum alone would spread every slow outlier, their
    errors cancel. Monotone values are returned as they are.
    """
    highest, lowest = list(values), list(values)
    for axis, length in enumerate(shape):
        stride = math.prod(shape[axis + 1 :])
        for row in range(len(highest)):
            if row // stride % length:
                highest[row] = max(highest[row], highest[row - stride])
        for row in reversed(range(len(lowest))):
            if row // stride % length:
                lowest[row - stride] = min(lowest[row], lowest[row - stride])
    return tuple(
        high if high == low else (high + low) / 2 for high, low in zip(highest, lowest, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a table was measured: device name, CPU threads and torch version."""

    device: str
    threads: int
    torch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """What one model costs in milliseconds per token, at any widths, on one machine.

    Times are those of one sequence: in the phase "decode" a step that gives each of `batch`
    sequences one token after `context` tokens; in "prefill" reading `batch` sequences of `context`
    tokens, divided by `context`. `full`, `layers` (the kind of each layer) and `digest` (of all
    tensors' layouts) say which model the table belongs to.
    """

    family: str
    full: Mapping[str, int]
    layers: tuple[str, ...]
    digest: str
    machine: Machine
    dtype: str
    phase: str
    batch: int
    context: int
    parts: Mapping[str, Grid]
    fixed: Grid

    def milliseconds(self, widths: Mapping, axis_map: AxisMap) -> Any:
        """Milliseconds per token at `widths` (numbers, per-layer tuples, or tensors of expected
        widths), monotone in every axis.

        A layer's time counts as far as the layer is there: `layers` may hold 1, 0 or a share.
        """
        total = self.fixed_milliseconds(widths, axis_map)
        seen: dict[tuple, tuple[list, Any]] = {}
        for layer, kind in enumerate(self.layers):
            own = self._own_widths(widths, axis_map, layer)
            # Layers that share their kind and their very widths cost the same: count them once.
            key = (kind, *map(id, own))
            if key not in seen:
                seen[key] = own, self.parts[kind].at(own)
            total = total + seen[key][1] * _presence(widths, axis_map, layer)
        return total

    def fixed_milliseconds(self, widths: Mapping, axis_map: AxisMap) -> Any:
        """The share of everything outside the layers, in milliseconds per token."""
        return self.fixed.at([axis_map.width(widths, axis, None) for axis in self.fixed.axes])

    def _own_widths(self, widths: Mapping, axis_map: AxisMap, layer: int) -> list:
        axes = self.parts[self.layers[layer]].axes
        return [axis_map.width(widths, axis, layer) for axis in axes]

    def mismatch(self, axis_map: AxisMap) -> str:
        """What tells the model of this table from the one of `axis_map`; empty if nothing does."""
        if self.family != axis_map.model_type:
            return f"it was measured on a {self.family} model, this one is {axis_map.model_type}"
        if dict(self.full) != dict(axis_map.full):
            theirs = ",".join(f"{axis}={width}" for axis, width in self.full.items())
            return f"it was measured at the widths {theirs}, this model has {axis_map.full}"
        if self.layers != layer_kinds(axis_map):
            return f"its {len(self.layers)} layers are not of the kinds of this model's"
        if self.digest != layout_digest(axis_map):
            return "its model has other shapes (vocabulary, head or state sizes)"
        return ""


def _presence(widths: Mapping, axis_map: AxisMap, layer: int) -> Any:
    return axis_map.width(widths, LAYERS, layer) if LAYERS in widths else 1


def _layout(block: Block) -> list:
    """What the tensors and states of a block look like."""
    rows: list = [
        [s.name, [[[g.num_units, g.unit, g.axis, g.num_groups] for g in dim] for dim in s.dims]]
        for s in (*block.tensors, *block.states)
    ]
    return rows + [["most", state.most] for state in block.states if state.most is not None]


def layer_kinds(axis_map: AxisMap) -> tuple[str, ...]:
    """The kind of every layer, named after its parts; layers with equal tensors share a kind."""
    names: dict[str, str] = {}
    kinds = []
    for block in axis_map.blocks:
        key = json.dumps(_layout(block))
        if key not in names:
            parts = dict.fromkeys(spec.part for spec in block.tensors if spec.part != "norms")
            name = " + ".join(parts)
            same = sum(other.partition(" #")[0] == name for other in names.values())
            names[key] = f"{name} #{same + 1}" if same else name
        kinds.append(names[key])
    return tuple(kinds)


def layout_digest(axis_map: AxisMap) -> str:
    """A short digest of the layouts of all tensors and decoding states."""
    layouts: list[list] = [[None, _layout(axis_map.outside)]]
    layouts += ([layer, _layout(block)] for layer, block in enumerate(axis_map.blocks))
    return hashlib.sha256(json.dumps(layouts).encode()).hexdigest()[:16]


def kind_axes(axis_map: AxisMap, layer: int) -> tuple[str, ...]:
    """The axes that decide the time of a layer that is there: the shared ones and its own."""
    return tuple(
        name
        for name, axis in axis_map.axes.items()
        if name != LAYERS and (axis.is_global or layer in axis.layers)
    )


def save_table(table: LatencyTable, file: str | Path) -> None:
    """Writes a table as JSON, in place only when it is complete."""
    from star_elastic.files.writing import write_json

    content = {"format_version": FORMAT_VERSION, **asdict(table)}
    content["full"] = dict(table.full)
    write_json(Path(file), content)


def load_table(file: str | Path, axis_map: AxisMap) -> LatencyTable:
    """Reads a table and checks that it was measured on the model of `axis_map`.

    Raises CheckpointError if it is missing, damaged, of another format version or model.
    """
    from star_elastic.files.writing import read_json

    file = Path(file)
    if not exists(file):
        raise CheckpointError(f"{file} does not exist; {MEASURE}")
    content = read_json(file, MEASURE)
    with library_boundary(f"{file} is damaged", MEASURE):
        table = _parse(content, file)
        problem = table.mismatch(axis_map)
    if problem:
        raise CheckpointError(f"{file} is not of this model: {problem}; {MEASURE}")
    return table


def _parse(content: Any, file: Path) -> LatencyTable:
    version = content.pop("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version}, this package reads {FORMAT_VERSION}; {MEASURE}"
        )
    parts = {kind: _read_grid(grid) for kind, grid in content.pop("parts").items()}
    fixed, machine = _read_grid(content.pop("fixed")), Machine(**content.pop("machine"))
    layers = tuple(content.pop("layers"))
    table = LatencyTable(parts=parts, fixed=fixed, machine=machine, layers=layers, **content)
    unknown = set(layers) - set(parts)
    if unknown:
        raise ValueError(f"no times of {', '.join(sorted(unknown))}")
    return table


def _read_grid(content: Mapping[str, Any]) -> Grid:
    return Grid(
        axes=tuple(content["axes"]),
        points=tuple(tuple(widths) for widths in content["points"]),
        milliseconds=tuple(content["milliseconds"]),
    )
