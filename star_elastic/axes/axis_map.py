"""The axis map: for every tensor of a model, what each of its dimensions is.

A map is what stands before the layers, a list of layers with paths of their own, and what stands
after them. Sorting, slicing, gating, counting and exporting are short functions over this one
table, so that they cannot disagree. This file knows no architecture, no file format and no tensor
library: it is integers only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from star_elastic.axes.dims import runs
from star_elastic.axes.table import (
    Block,
    ConstantSpec,
    Laid,
    Mixer,
    MoeSpec,
    NormSpec,
    Probe,
    StateSpec,
    TensorSpec,
    WorkSpec,
)
from star_elastic.axes.widths import LAYERS, Width, Widths
from star_elastic.errors import ShapeError

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


@dataclass(frozen=True)
class AxisMap:
    """The whole table of one model at given widths.

    `before`, `blocks` and `after` are what the model is made of. `path` is where the list of layers
    stands in the model in memory, `disk_path` where it stands on disk. `multiples` lists pairs of
    axes of which the first must be a multiple of the second, where a model's config class insists
    on it. `width_buffers` are buffers that no checkpoint holds, but that follow a width: in memory
    all sizes have the parent's. The rows of the whole model, with its full names, are `tensors`,
    `states`, `norms`, `probes`, `work`, `moe_layers`, `mixers` and `constants`.
    """

    model_type: str
    axes: Mapping[str, Axis]
    before: Block
    blocks: tuple[Block, ...]
    after: Block
    path: str = "model.layers"
    disk_path: str = "model.layers"
    multiples: tuple[tuple[str, str], ...] = ()
    width_buffers: tuple[str, ...] = ()

    @cached_property
    def _whole(self) -> Block:
        """All rows with the names that the whole model has for them."""
        parts = [self.before.in_model(None, "", "")]
        for layer, block in enumerate(self.blocks):
            places = f"{self.path}.{layer}.", f"{self.disk_path}.{layer}."
            parts.append(block.in_model(layer, *places))
        parts.append(self.after.in_model(None, "", ""))
        return Block.sum(parts)

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every parameter and buffer by its name in memory."""
        return {spec.name: spec for spec in self._whole.tensors}

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """What decoding remembers."""
        return self._whole.states

    @property
    def norms(self) -> tuple[NormSpec, ...]:
        """The norms over elastic axes."""
        return self._whole.norms

    @property
    def probes(self) -> tuple[Probe, ...]:
        """Where importance is measured, but for experts."""
        return self._whole.probes

    @property
    def work(self) -> tuple[WorkSpec, ...]:
        """Arithmetic that is no product with a parameter."""
        return self._whole.work

    @property
    def moe_layers(self) -> tuple[MoeSpec, ...]:
        """The mixtures of experts."""
        return self._whole.moe

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The mixers that need an adapter in training."""
        return self._whole.mixers

    @property
    def constants(self) -> tuple[ConstantSpec, ...]:
        """The buffers that no checkpoint holds."""
        return self._whole.constants

    @property
    def outside(self) -> Block:
        """What stands outside the layers."""
        return self.before + self.after

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
                    f"axis {name!r} does not exist in this {self.model_type} model; "
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
        attention = [n for n, b in enumerate(self.blocks) if any(s.per_token for s in b.states)]
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
                        f"{self.model_type} config requires; "
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

    def layer_widths(self, widths: Mapping[str, Width], layer: int | None) -> Widths:
        """One width per axis, as `layer` sees them (None: what stands outside the layers); axes
        that it does not have are at full width.

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

    def seen_by(self, layer: int | None, widths: Mapping) -> dict[str, Any]:
        """One width for each axis that a layer sees (None: what stands outside the layers); or
        one of whatever else is given for each axis, or for each layer that has it (mixtures)."""
        return {
            name: self.width(widths, name, layer)
            for name, value in widths.items()
            if not isinstance(value, tuple) or layer in self.axes[name].layers
        }

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding table; token ids are below."""
        spec = next(spec for spec in self.tensors.values() if spec.part == "embeddings")
        return self.shape(spec, self.full)[0]

    def own_axes(self, layer: int | None) -> tuple[str, ...]:
        """The axes whose width in `layer` is that layer's own."""
        return tuple(n for n, axis in self.axes.items() if n != LAYERS and layer in axis.layers)

    def names_at(self, widths: Mapping[str, Width]) -> dict[str, str]:
        """Every tensor that there is at `widths`: its name here -> its name there.

        The two differ where layers before it are gone.
        """
        places = {layer: place for place, layer in enumerate(self.kept_layers(widths))}
        return {
            name: name
            if spec.layer is None
            else f"{self.path}.{places[spec.layer]}" + name[len(f"{self.path}.{spec.layer}") :]
            for name, spec in self.tensors.items()
            if spec.layer is None or spec.layer in places
        }

    def runs(self, spec: Laid, dim: int, widths: Mapping) -> list[tuple[int, int]]:
        """Kept (start, stop) ranges of a dimension at `widths`, adjacent ranges merged."""
        return runs(spec.dims[dim], self.seen_by(spec.layer, widths))

    def nearest_homogeneous(self, widths: Mapping[str, Width]) -> dict[str, Width]:
        """One width per axis but `layers`: of the widths that occur in the layers that are kept,
        the one nearest to their mean."""
        kept = self.kept_layers(widths)
        nearest: dict[str, Width] = {}
        for name, width in widths.items():
            if name != LAYERS and isinstance(width, tuple):
                layers = self.axes[name].layers
                values = [w for w, layer in zip(width, layers, strict=True) if layer in kept]
                mean = sum(values) / max(len(values), 1)
                width = min(values or width, key=lambda w: (abs(w - mean), -w))
            nearest[name] = width
        return nearest

    def with_tensors(self, change: Callable[[str, TensorSpec], Iterable[TensorSpec]]) -> AxisMap:
        """The table with every tensor replaced by others: `change` is told its name in the whole
        model, and the row as its block has it."""

        def changed(block: Block, path: str) -> Block:
            tensors = (new for spec in block.tensors for new in change(path + spec.name, spec))
            return replace(block, tensors=tuple(tensors))

        blocks = (changed(b, f"{self.path}.{layer}.") for layer, b in enumerate(self.blocks))
        before, after = changed(self.before, ""), changed(self.after, "")
        return replace(self, before=before, blocks=tuple(blocks), after=after)

    def require_edges(self, widths: Widths) -> None:
        """Raises ShapeError for a width that ends inside a block of elements stored together."""
        for name in self.names_at(widths):
            spec = self.tensors[name]
            for dim in range(len(spec.dims)):
                self.runs(spec, dim, widths)

    def shape(self, spec: Laid, widths: Mapping) -> tuple:
        """Elements per dimension at `widths`; plain arithmetic, exact for integers."""
        here = self.seen_by(spec.layer, widths)
        return tuple(sum(segment.length(here) for segment in dim) for dim in spec.dims)

    def at(self, widths: Mapping[str, Width]) -> AxisMap:
        """The table of the sliced model, to slice it further."""
        widths = self.complete(widths)
        kept = self.kept_layers(widths)
        outside = self.layer_widths(widths, None)
        return replace(
            self,
            axes=self._axes_at(widths, {layer: place for place, layer in enumerate(kept)}),
            before=self.before.at(outside),
            blocks=tuple(self.blocks[n].at(self.layer_widths(widths, n)) for n in kept),
            after=self.after.at(outside),
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
                minimum=self.moe_layers[0].fewest_experts(
                    axes[TOP_K].size, axes["experts"].num_groups, axes["experts"].size
                ),
            )
        return axes


def _distinct(width: Width) -> list[int]:
    return sorted(set(width)) if isinstance(width, tuple) else [width]


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
