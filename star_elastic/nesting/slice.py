"""Sorting and slicing of tensors by the axis map: pure functions over tensors in memory.

A slice whose kept ranges are one prefix per dimension is a view of the parent's memory; what is
cut inside groups is gathered. Both are differentiable.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from star_elastic.axes import AxisMap, Dim, TensorSpec, axis_keys, order_key
from star_elastic.axes.dims import runs
from star_elastic.axes.widths import Widths
from star_elastic.errors import ShapeError

Orders = Mapping[str, torch.Tensor]
"""Permutation of an axis's units, best first: keys from `order_key`, int64 values (units,)."""


def slice_tensor(
    tensor: torch.Tensor, dims: tuple[Dim, ...], widths: Mapping, *, first: int = 0
) -> torch.Tensor:
    """The part of a full-width tensor that survives at `widths` (one for each axis, as its layer
    sees them); a view wherever possible. Dimensions before `first` are cut already."""
    kept = list(enumerate(runs(dim, widths) for dim in dims))[first:]
    # Prefixes first, so that a copy holds nothing beside what is kept.
    for dim, ranges in kept:
        low, high = ranges[0]
        if len(ranges) == 1 and high - low < tensor.shape[dim]:
            tensor = tensor.narrow(dim, low, high - low)
    for dim, ranges in kept:
        if len(ranges) > 1:
            tensor = torch.cat([tensor.narrow(dim, lo, hi - lo) for lo, hi in ranges], dim)
    return tensor


def follow(
    tensor: torch.Tensor,
    spec: TensorSpec,
    axis_map: AxisMap,
    widths: Mapping,
    *,
    back: bool = False,
) -> torch.Tensor:
    """A sliced tensor as a checkpoint of `widths` stores it (`TensorSpec.follows`), or `back` from
    there; as it is where it follows nothing."""
    own = spec.follows
    if own is None or widths[own.axis] == axis_map.axes[own.axis].size:
        return tensor
    factor = own.factor(widths[own.axis], axis_map.axes[own.axis].size)
    factor = 1 / factor if back else factor
    return ((tensor.double() + own.offset) * factor - own.offset).to(tensor.dtype)


def slice_state(
    state: Mapping[str, torch.Tensor],
    axis_map: AxisMap,
    widths: Widths,
    *,
    leave: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """Every tensor that there is at `widths` but those to `leave`, cut, by its name in the sliced
    model."""
    seen: dict[int | None, Mapping] = {}
    sliced = {}
    for name, new in axis_map.names_at(widths).items():
        spec = axis_map.tensors[name]
        here = seen.setdefault(spec.layer, axis_map.seen_by(spec.layer, widths))
        if name not in leave:
            sliced[new] = slice_tensor(state[name], spec.dims, here)
    return sliced


def check_orders(orders: Orders, axis_map: AxisMap) -> None:
    """Raises ShapeError unless each order permutes its units and stays inside its groups."""
    keys = axis_keys(axis_map)
    for key, order in orders.items():
        if key not in keys:
            raise ShapeError(
                f"order {key!r} belongs to no axis of this {axis_map.model_type} model"
            )
        axis = axis_map.axes[keys[key][0]]
        if order.shape != (axis.size,) or not torch.equal(
            order.sort().values, torch.arange(axis.size)
        ):
            raise ShapeError(f"order {key!r} is not a permutation of {axis.size} units")
        per_group = axis.size // axis.num_groups
        home = torch.arange(axis.size) // per_group
        if not torch.equal(order // per_group, home):
            raise ShapeError(
                f"order {key!r} moves units between the {axis.num_groups} groups of {axis.name}; "
                "rank inside each group"
            )


def orders_of(layer: int | None, axis_map: AxisMap, orders: Orders) -> Orders:
    """The orders that a layer sees, by axis."""
    keys = {name: order_key(name, layer) for name in axis_map.own_axes(layer)}
    keys |= {name: name for name, axis in axis_map.axes.items() if axis.is_global}
    return {name: orders[key] for name, key in keys.items() if key in orders}


def dim_order(dim: Dim, orders: Orders) -> torch.Tensor | None:
    """Element positions of a dimension in sorted order, or None if nothing moves there. `orders` by
    axis, as the tensor's layer sees them."""
    if not any(segment.axis in orders for segment in dim):
        return None
    parts, start = [], 0
    for segment in dim:
        place = torch.arange(segment.size)
        if segment.axis is not None and segment.axis in orders:
            place = place.view(-1, segment.unit)[orders[segment.axis]].flatten()
        parts.append(place + start)
        start += segment.size
    return torch.cat(parts)


def sort_tensor(
    tensor: torch.Tensor, dims: tuple[Dim, ...], orders: Orders, *, first: int = 0
) -> torch.Tensor:
    """A tensor with the units of every ordered axis permuted, best first; `orders` by axis, as its
    layer sees them. Dimensions before `first` are sorted already."""
    for position, dim in list(enumerate(dims))[first:]:
        index = dim_order(dim, orders)
        if index is not None:
            tensor = tensor.index_select(position, index.to(tensor.device))
    return tensor


def sort_state(
    state: Mapping[str, torch.Tensor], axis_map: AxisMap, orders: Orders
) -> dict[str, torch.Tensor]:
    """Every tensor of the table with sorted axes. The model's function is unchanged."""
    check_orders(orders, axis_map)
    return {
        name: sort_tensor(state[name], spec.dims, orders_of(spec.layer, axis_map, orders))
        for name, spec in axis_map.tensors.items()
    }
