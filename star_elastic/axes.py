"""The axis map: for every tensor of a model family, what each of its dimensions is.

A dimension is a run of segments; a segment is either fixed or laid out along one elastic axis in
units of a constant number of elements, possibly in groups that are always cut alike (SSM groups,
KV groups, routing groups). Sorting, slicing, gating, counting and exporting are short functions
over this one table, so that they cannot disagree. This file knows no model family, no file format
and no tensor library: it is integers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from star_elastic.errors import ShapeError
from star_elastic.widths import Width, Widths


@dataclass(frozen=True, slots=True)
class Axis:
    """One elastic axis of a model.

    `size` counts units at full width, `num_groups` the groups in which units are ranked and cut
    alike (a width is a multiple of it), `layers` the layers that have the axis (empty for an axis
    with one order for the whole model, like the residual stream), `minimum` the smallest width
    that keeps the model well defined.
    """

    name: str
    size: int
    num_groups: int = 1
    layers: tuple[int, ...] = ()
    minimum: int = 1

    @property
    def is_global(self) -> bool:
        return not self.layers


@dataclass(frozen=True, slots=True)
class Segment:
    """`num_units` consecutive units of `unit` elements each; fixed if `axis` is None."""

    num_units: int
    unit: int = 1
    axis: str | None = None
    num_groups: int = 1

    def runs(self, width: int, start: int) -> Iterator[tuple[int, int]]:
        """Kept (start, stop) element ranges when the first `width` units survive, per group."""
        if self.axis is None:
            yield start, start + self.num_units * self.unit
            return
        stride = self.num_units // self.num_groups * self.unit
        kept = width // self.num_groups * self.unit
        for group in range(self.num_groups):
            yield start + group * stride, start + group * stride + kept


Dim = tuple[Segment, ...]


def fixed(size: int) -> Dim:
    """A dimension that no axis cuts."""
    return (Segment(size),)


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor on disk: all of the tensor in memory, or its row `index` along dimension 0."""

    name: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One parameter or buffer of the model in memory.

    `part` names the kind of block it belongs to, for tables. `gate_dim` is the dimension whose axis
    gate multiplies the parameter while the router learns (the inputs of a projection that writes
    the residual stream); `routed` marks weights of which a token uses only `top_k` of the experts
    along dimension 0; `lookup` an embedding table, read one row per token; buffers count in bytes,
    not in parameters.
    """

    name: str
    part: str
    dims: tuple[Dim, ...]
    pieces: tuple[Piece, ...]
    layer: int | None = None
    gate_dim: int | None = None
    routed: bool = False
    lookup: bool = False
    is_buffer: bool = False
    keep_fp32: bool = False

    def axis_of(self, dim: int) -> str | None:
        """The axis of a dimension that one axis cuts (None if it is fixed)."""
        names = {segment.axis for segment in self.dims[dim]} - {None}
        assert len(names) <= 1, (self.name, dim, names)
        return next(iter(names), None)


@dataclass(frozen=True, slots=True)
class StateSpec:
    """A decoding state of one sequence (KV cache, SSM state, conv state), as dimensions.

    `per_token` states grow by one copy per token of context. `dtype_bytes` is None where the
    state has the model's dtype.
    """

    name: str
    layer: int
    dims: tuple[Dim, ...]
    per_token: bool = False
    dtype_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class WorkSpec:
    """Arithmetic per token that is not a product with a parameter.

    `flops` operations per element of `dims`; `per_context`: once per token of context (attention).
    """

    layer: int
    dims: tuple[Dim, ...]
    flops: int
    per_context: bool = False


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A root-mean-square norm over an elastic axis: where it sits, and its epsilon.

    `grouped` norms work on the axis's groups one by one and take a gate branch (Mamba-2).
    `fp32_weight`: the weight multiplies in fp32, before the cast back to the input's dtype.
    `reader`: path of the module whose weights read the norm's output along their last dimension;
    empty where they do more than that (a tied embedding).
    """

    path: str
    axis: str
    layer: int | None
    eps: float
    grouped: bool = False
    fp32_weight: bool = False
    reader: str = ""


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture-of-experts layer: the paths of its router and of its fused experts module."""

    layer: int
    router_path: str
    experts_path: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Where the importance of an axis is measured: a module's input or output (`side`).

    `dims` holds one dimension of one segment: the layout of what passes there. With `written`, the
    module is a linear one and a unit is measured by the norm of what the module makes of it.
    """

    path: str
    layer: int | None
    side: str
    dims: tuple[Dim, ...]
    written: bool = False

    @property
    def axis(self) -> str:
        """The axis that is measured here."""
        name = self.dims[0][0].axis
        assert name is not None, self
        return name


Laid = TensorSpec | StateSpec | WorkSpec | Probe


@dataclass(frozen=True, slots=True)
class AxisMap:
    """The whole table of one model at given widths.

    `multiples` lists pairs of axes of which the first must be a multiple of the second, where a
    model's config class insists on it. `top_k` counts the routed experts that a token uses.
    """

    family: str
    axes: Mapping[str, Axis]
    tensors: Mapping[str, TensorSpec]
    states: tuple[StateSpec, ...] = ()
    norms: tuple[NormSpec, ...] = ()
    moe_layers: tuple[MoeSpec, ...] = ()
    probes: tuple[Probe, ...] = ()
    work: tuple[WorkSpec, ...] = ()
    top_k: int = 0
    multiples: tuple[tuple[str, str], ...] = ()

    @property
    def full(self) -> Widths:
        """The parent's own widths."""
        return Widths({name: axis.size for name, axis in self.axes.items()})

    def complete(self, widths: Mapping[str, Width]) -> Widths:
        """`widths` with every axis that is not named at full width, checked.

        Raises ShapeError with the rule that is broken and a width that would do.
        """
        for name in widths:
            if name not in self.axes:
                raise ShapeError(
                    f"axis {name!r} does not exist in this {self.family} model; "
                    f"use {', '.join(self.axes)}"
                )
        for name, axis in self.axes.items():
            value = widths.get(name, axis.size)
            per_layer = value if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) and len(value) != len(axis.layers):
                raise ShapeError(
                    f"{name} has {len(value)} widths for {len(axis.layers)} layers; give one "
                    "width, or one per layer that has the axis"
                )
            for width in per_layer:
                self.check_width(name, width)
        done = Widths({name: widths.get(name, axis.size) for name, axis in self.axes.items()})
        for name, divisor in self.multiples:
            first, second = done[name], done[divisor]
            if isinstance(first, int) and isinstance(second, int) and first % second:
                raise ShapeError(
                    f"{name}={first} is not a multiple of {divisor}={second}, which the "
                    f"{self.family} config requires; use {name}={max(first // second, 1) * second}"
                )
        return done

    def check_width(self, name: str, width: int) -> None:
        """Raises ShapeError unless `width` is legal on the axis by itself."""
        axis = self.axes[name]
        groups = axis.num_groups
        if isinstance(width, bool) or not isinstance(width, int):
            raise ShapeError(f"{axis.name}={width!r} is not a whole number; give a number of units")
        if width % groups:
            low = min(max(width // groups * groups, axis.minimum), axis.size)
            near = sorted({low, min(low + groups, axis.size)})
            raise ShapeError(
                f"{axis.name}={width} is not a multiple of its {groups} groups; "
                f"use {' or '.join(map(str, near))}"
            )
        if not axis.minimum <= width <= axis.size:
            raise ShapeError(
                f"{axis.name}={width} is outside {axis.minimum} to {axis.size}; "
                "choose a width in that range"
            )

    def width(self, widths: Mapping, axis: str, layer: int | None):
        """The width of `axis` in `layer` (any number type: cost works on expectations too)."""
        value = widths[axis]
        if isinstance(value, tuple):
            assert layer is not None, axis
            return value[self.axes[axis].layers.index(layer)]
        return value

    def runs(self, spec: Laid, dim: int, widths: Widths) -> list[tuple[int, int]]:
        """Kept (start, stop) ranges of a dimension at `widths`, adjacent ranges merged."""
        merged: list[tuple[int, int]] = []
        start = 0
        for segment in spec.dims[dim]:
            width = self.width(widths, segment.axis, spec.layer) if segment.axis else 0
            for low, high in segment.runs(width, start):
                if merged and merged[-1][1] == low:
                    merged[-1] = (merged[-1][0], high)
                else:
                    merged.append((low, high))
            start += segment.num_units * segment.unit
        return merged

    def shape(self, spec: Laid, widths: Mapping) -> tuple:
        """Elements per dimension at `widths`; plain arithmetic, exact for integers."""
        return tuple(
            sum(
                (self.width(widths, s.axis, spec.layer) if s.axis else s.num_units) * s.unit
                for s in dim
            )
            for dim in spec.dims
        )

    def at(self, widths: Mapping[str, Width]) -> AxisMap:
        """The table of the sliced model (tensors, axes and states), to slice it further."""
        widths = self.complete(widths)

        def cut(spec):
            dims = tuple(
                tuple(
                    replace(s, num_units=self.width(widths, s.axis, spec.layer)) if s.axis else s
                    for s in dim
                )
                for dim in spec.dims
            )
            if isinstance(spec, TensorSpec) and len(spec.pieces) > 1:
                kept = [i for lo, hi in self.runs(spec, 0, widths) for i in range(lo, hi)]
                pieces = tuple(replace(spec.pieces[new], index=new) for new in range(len(kept)))
                return replace(spec, dims=dims, pieces=pieces)
            return replace(spec, dims=dims)

        axes = {}
        for name, axis in self.axes.items():
            value = widths[name]
            if isinstance(value, tuple):
                raise ShapeError(
                    f"{name} differs between layers; a table of its own needs one width per axis"
                )
            axes[name] = replace(axis, size=value)
        return replace(
            self,
            axes=axes,
            tensors={name: cut(spec) for name, spec in self.tensors.items()},
            states=tuple(cut(spec) for spec in self.states),
            probes=tuple(cut(spec) for spec in self.probes),
            work=tuple(cut(spec) for spec in self.work),
        )


def order_key(axis: str, layer: int | None) -> str:
    """Name of a score or order: the axis itself, or `layers.<layer>.<axis>` per layer."""
    return axis if layer is None else f"layers.{layer}.{axis}"


def axis_keys(axis_map: AxisMap) -> dict[str, tuple[str, int | None]]:
    """Every (axis, layer) that has scores and an order of its own, by key."""
    keys = {}
    for axis in axis_map.axes.values():
        for layer in axis.layers or (None,):
            keys[order_key(axis.name, layer)] = (axis.name, layer)
    return keys
