"""The axis map: for every tensor of a model family, what each of its dimensions is.

A dimension is a run of segments; a segment is either fixed or laid out along one elastic axis in
units of a constant number of elements, possibly in groups that are always cut alike (SSM groups,
KV groups, routing groups). Sorting, slicing, gating, counting and exporting are short functions
over this one table, so that they cannot disagree. This file knows no model family, no file format
and no tensor library: it is integers only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from star_elastic.errors import ShapeError
from star_elastic.widths import LAYERS, Width, Widths

TOP_K = "top_k"
"""Another axis that cuts no dimension: how many of the experts a token uses."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One elastic axis of a model.

    `size` counts units at full width, `num_groups` the groups in which units are ranked and cut
    alike (a width is a multiple of it), `layers` the layers that have the axis (empty for an axis
    with one order for the whole model, like the residual stream), `minimum` the smallest width
    that keeps the model well defined. The units of `ranked` axes are permuted, best first.
    """

    name: str
    size: int
    num_groups: int = 1
    layers: tuple[int, ...] = ()
    minimum: int = 1
    ranked: bool = True

    @property
    def is_global(self) -> bool:
        return not self.layers


@dataclass(frozen=True, slots=True)
class Segment:
    """`num_units` consecutive units of `unit` elements each; fixed if `axis` is None.

    With `per` > 1, so many units share `unit` elements (codes packed into bytes, blocks that share
    a scale): only widths that end on an edge of them can be cut.
    """

    num_units: int
    unit: int = 1
    axis: str | None = None
    num_groups: int = 1
    per: int = 1

    @property
    def size(self) -> int:
        """Elements at full width."""
        return self.num_units * self.unit // self.per

    def runs(self, width: int, start: int) -> Iterator[tuple[int, int]]:
        """Kept (start, stop) element ranges when the first `width` units survive, per group.

        Raises ShapeError for a width that ends between two edges.
        """
        if self.axis is None:
            yield start, start + self.size
            return
        stride = self.size // self.num_groups
        kept, rest = divmod(width // self.num_groups * self.unit, self.per)
        if rest:
            step = self.per // math.gcd(self.unit, self.per) * self.num_groups
            low = width // step * step
            near = [w for w in (low, low + step) if 0 < w <= self.num_units]
            raise ShapeError(
                f"{self.axis}={width} ends inside a block of {self.per} that is quantised "
                f"together; use {' or '.join(map(str, near))}"
            )
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
    the residual stream); `routed` marks weights of which a token uses only `top_k` experts along
    dimension 0; `lookup` an embedding table, read one row per token; buffers count in bytes,
    not in parameters; `coded` tensors hold codes or scales of a format, in dtypes of their own.
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
    coded: bool = False

    def axis_of(self, dim: int) -> str | None:
        """The axis of a dimension that one axis cuts (None if it is fixed)."""
        names = {segment.axis for segment in self.dims[dim]} - {None}
        assert len(names) <= 1, (self.name, dim, names)
        return next(iter(names), None)

    @property
    def is_head(self) -> bool:
        """Whether it makes logits of hidden states: the LM head, or the embedding tied to it."""
        return self.part == "head" or (self.part == "embeddings" and not self.lookup)


@dataclass(frozen=True, slots=True)
class StateSpec:
    """A decoding state of one sequence (KV cache, SSM state, conv state), as dimensions.

    `per_token` states grow by one copy per token of context. A state has the dtype of the model,
    or with `own_dtype` one that engines choose by itself (the SSM state's, `Workload`).
    """

    name: str
    layer: int
    dims: tuple[Dim, ...]
    per_token: bool = False
    own_dtype: bool = False


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
    """A mixture-of-experts layer: the paths of its router and of its fused experts module.

    A token chooses its experts inside `selected_groups` of the routing groups.
    """

    layer: int
    router_path: str
    experts_path: str
    selected_groups: int = 1


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

    `blocks` is the path of the list of layers, `mixers` those of its Mamba-2 mixers. `multiples`
    lists pairs of axes of which the first must be a multiple of the second, where a model's config
    class insists on it.
    """

    family: str
    axes: Mapping[str, Axis]
    tensors: Mapping[str, TensorSpec]
    states: tuple[StateSpec, ...] = ()
    norms: tuple[NormSpec, ...] = ()
    moe_layers: tuple[MoeSpec, ...] = ()
    probes: tuple[Probe, ...] = ()
    work: tuple[WorkSpec, ...] = ()
    multiples: tuple[tuple[str, str], ...] = ()
    blocks: str = "model.layers"
    mixers: tuple[tuple[int, str], ...] = ()

    @property
    def full(self) -> Widths:
        """The parent's own widths."""
        return Widths({name: axis.size for name, axis in self.axes.items()})

    def complete(self, widths: Mapping[str, Width]) -> Widths:
        """`widths` with every axis that is not named at full width, checked.

        Per-layer widths that are the same in all layers that are kept become one width, and axes
        that no layer is left of are at full width: equal models have equal widths. Raises
        ShapeError with the rule that is broken and a width that would do.
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
        kept = self.kept_layers(done)
        if not kept:
            raise ShapeError("layers keeps none of the layers; keep at least one")
        attention = sorted({state.layer for state in self.states if state.per_token})
        if attention and not set(attention) & set(kept):
            raise ShapeError(
                "layers keeps no attention layer, without which transformers cannot decode; keep "
                f"at least one of {', '.join(map(str, attention))}"
            )
        done = Widths({name: self._collapse(name, value, kept) for name, value in done.items()})
        for name, divisor in self.multiples:
            firsts, seconds = (_distinct(done[axis]) for axis in (name, divisor))
            for first, second in itertools.product(firsts, seconds):
                if first % second:
                    raise ShapeError(
                        f"{name}={first} is not a multiple of {divisor}={second}, which the "
                        f"{self.family} config requires; "
                        f"use {name}={max(first // second, 1) * second}"
                    )
        return done

    def _collapse(self, name: str, value: Width, kept: tuple[int, ...]) -> Width:
        """One width in place of a tuple that is constant over the layers that are kept; full width
        on an axis that none of them has."""
        axis = self.axes[name]
        if name == LAYERS:
            return 1 if len(kept) == len(axis.layers) else value
        if not axis.is_global and not set(axis.layers) & set(kept):
            return axis.size
        if not isinstance(value, tuple):
            return value
        seen = {w for w, layer in zip(value, axis.layers, strict=True) if layer in kept}
        return seen.pop() if len(seen) == 1 else value

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

    def kept_layers(self, widths: Mapping) -> tuple[int, ...]:
        """The layers that there are at `widths`, in their order."""
        layers = self.axes[LAYERS].layers
        return tuple(layer for layer in layers if self.width(widths, LAYERS, layer))

    def layer_widths(self, widths: Mapping[str, Width], layer: int) -> Widths:
        """One width per axis, as `layer` sees them; axes that it does not have are at full width.

        So equal layers of different sizes have equal widths here.
        """
        own = self.own_axes(layer)
        return Widths(
            {
                name: self.width(widths, name, layer)
                if axis.is_global or name in own
                else axis.size
                for name, axis in self.axes.items()
            }
        )

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding table; token ids are below."""
        spec = next(spec for spec in self.tensors.values() if spec.part == "embeddings")
        return self.shape(spec, self.full)[0]

    def own_axes(self, layer: int) -> tuple[str, ...]:
        """The axes whose width in `layer` is that layer's own."""
        return tuple(n for n, axis in self.axes.items() if n != LAYERS and layer in axis.layers)

    def names_at(self, widths: Mapping[str, Width]) -> dict[str, str]:
        """Every tensor that there is at `widths`: its name here -> its name there.

        The two differ where layers before it are gone.
        """
        places = self._places(widths)
        return {
            name: _renumber(name, spec.layer, places)
            for name, spec in self.tensors.items()
            if spec.layer is None or spec.layer in places
        }

    def _places(self, widths: Mapping) -> dict[int, int]:
        """New numbers of the layers that are kept."""
        return {layer: place for place, layer in enumerate(self.kept_layers(widths))}

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
            start += segment.size
        return merged

    def require_edges(self, widths: Widths) -> None:
        """Raises ShapeError for a width that ends inside a block of elements stored together."""
        for name in self.names_at(widths):
            spec = self.tensors[name]
            for dim in range(len(spec.dims)):
                self.runs(spec, dim, widths)

    def shape(self, spec: Laid, widths: Mapping) -> tuple:
        """Elements per dimension at `widths`; plain arithmetic, exact for integers."""
        return tuple(
            sum(self._elements(segment, widths, spec.layer) for segment in dim) for dim in spec.dims
        )

    def _elements(self, segment: Segment, widths: Mapping, layer: int | None):
        units = self.width(widths, segment.axis, layer) if segment.axis else segment.num_units
        elements = units * segment.unit
        return elements if segment.per == 1 else elements // segment.per

    def at(self, widths: Mapping[str, Width]) -> AxisMap:
        """The table of the sliced model, to slice it further."""
        widths = self.complete(widths)
        places = self._places(widths)

        def here(specs: Iterable) -> list:
            return [spec for spec in specs if spec.layer is None or spec.layer in places]

        def cut(spec: Any) -> Any:
            dims = tuple(
                tuple(
                    replace(s, num_units=self.width(widths, s.axis, spec.layer)) if s.axis else s
                    for s in dim
                )
                for dim in spec.dims
            )
            changes: dict = {"dims": dims, "layer": places.get(spec.layer)}
            if isinstance(spec, (TensorSpec, Probe)):
                label = "name" if isinstance(spec, TensorSpec) else "path"
                changes[label] = _renumber(getattr(spec, label), spec.layer, places)
            if isinstance(spec, TensorSpec):
                pieces = spec.pieces
                if pieces[0].index is not None:  # as many rows as are kept, whichever they are
                    pieces = pieces[: sum(hi - lo for lo, hi in self.runs(spec, 0, widths))]
                changes["pieces"] = tuple(
                    replace(piece, name=_renumber(piece.name, spec.layer, places))
                    for piece in pieces
                )
            return replace(spec, **changes)

        def move(spec, *labels: str):
            moved = {name: _renumber(getattr(spec, name), spec.layer, places) for name in labels}
            return replace(spec, layer=places.get(spec.layer), **moved)

        tensors = [cut(spec) for spec in here(self.tensors.values())]
        return replace(
            self,
            axes=self._axes_at(widths, places),
            tensors={spec.name: spec for spec in tensors},
            states=tuple(cut(spec) for spec in here(self.states)),
            norms=tuple(move(spec, "path", "reader") for spec in here(self.norms)),
            moe_layers=tuple(
                move(spec, "router_path", "experts_path") for spec in here(self.moe_layers)
            ),
            probes=tuple(cut(spec) for spec in here(self.probes)),
            work=tuple(cut(spec) for spec in here(self.work)),
            mixers=tuple(
                (places[layer], _renumber(path, layer, places))
                for layer, path in self.mixers
                if layer in places
            ),
        )

    def _axes_at(self, widths: Widths, places: Mapping[int, int]) -> dict[str, Axis]:
        axes = {}
        for name, axis in self.axes.items():
            value = 1 if name == LAYERS else widths[name]
            if isinstance(value, tuple):
                raise ShapeError(
                    f"{name} differs between layers; a table of its own needs one width per axis"
                )
            layers = tuple(places[layer] for layer in axis.layers if layer in places)
            if axis.is_global or layers:
                axes[name] = replace(axis, size=value, layers=layers)
        if "experts" in axes:
            axes["experts"] = replace(
                axes["experts"],
                minimum=fewest_experts(
                    axes[TOP_K].size,
                    self.moe_layers[0].selected_groups,
                    axes["experts"].num_groups,
                    axes["experts"].size,
                ),
            )
        return axes


def fewest_experts(top_k: int, selected_groups: int, num_groups: int, size: int) -> int:
    """At least `top_k` experts inside the selected routing groups, and 2 in each group, whose score
    is the sum of its two best."""
    per_group = max(-(-top_k // selected_groups), 2)
    return min(per_group * num_groups, size)


def _distinct(width: Width) -> list[int]:
    return sorted(set(width)) if isinstance(width, tuple) else [width]


def _renumber(name: str, layer: int | None, places: Mapping[int, int]) -> str:
    """A path with the new number of its layer."""
    if layer is None or places[layer] == layer or not name:
        return name
    old = f".layers.{layer}."
    assert name.count(old) == 1, (name, layer)
    return name.replace(old, f".layers.{places[layer]}.")


def order_key(axis: str, layer: int | None) -> str:
    """Name of a score or order: the axis itself, or `layers.<layer>.<axis>` per layer."""
    return axis if layer is None else f"layers.{layer}.{axis}"


def axis_keys(axis_map: AxisMap) -> dict[str, tuple[str, int | None]]:
    """Every (axis, layer) that has scores and an order of its own, by key."""
    keys = {}
    for axis in (axis for axis in axis_map.axes.values() if axis.ranked):
        for layer in axis.layers or (None,):
            keys[order_key(axis.name, layer)] = (axis.name, layer)
    return keys
