"""Sorting and slicing of tensors by the axis map: pure functions over tensors in memory.

A slice whose kept ranges are one prefix per dimension is a view of the parent's memory; what is
cut inside groups is gathered. Both are differentiable.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from star_elastic.axes import AxisMap, TensorSpec, axis_keys, order_key
from star_elastic.errors import ShapeError
from star_elastic.widths import Widths

Orders = Mapping[str, torch.Tensor]
"""Permutation of an axis's units, best first: keys from `order_key`, int64 values (units,)."""


def slice_tensor(
    tensor: torch.Tensor,
    spec: TensorSpec,
    axis_map: AxisMap,
    widths: Widths,
    *,
    skip_first: bool = False,
) -> torch.Tensor:
    """The part of a full-width tensor that survives at `widths`; a view wherever possible.

    `skip_first`: the tensor is one row of the table's tensor (an expert), without dimension 0.
    """
    first = 1 if skip_first else 0
    runs = [axis_map.runs(spec, position, widths) for position in range(first, len(spec.dims))]
    # Prefixes first, so that a copy holds nothing beside what is kept.
    for dim, kept in enumerate(runs):
        if len(kept) == 1 and kept[0][1] - kept[0][0] < tensor.shape[dim]:
            tensor = tensor.narrow(dim, kept[0][0], kept[0][1] - kept[0][0])
    for dim, kept in enumerate(runs):
        if len(kept) > 1:
            tensor = torch.cat([tensor.narrow(dim, lo, hi - lo) for lo, hi in kept], dim)
    return tensor


def slice_state(
    state: Mapping[str, torch.Tensor],
    axis_map: AxisMap,
    widths: Widths,
    *,
    leave: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """Every tensor that there is at `widths` but those to `leave`, cut, by its name in the sliced
    model."""
    return {
        new: slice_tensor(state[name], axis_map.tensors[name], axis_map, widths)
        for name, new in axis_map.names_at(widths).items()
        if name not in leave
    }


def check_orders(orders: Orders, axis_map: AxisMap) -> None:
    """Raises ShapeError unless each order permutes its units and stays inside its groups."""
    keys = axis_keys(axis_map)
    for key, order in orders.items():
        if key not in keys:
            raise ShapeError(f"order {key!r} belongs to no axis of this {axis_map.family} model")
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


def dim_order(spec: TensorSpec, dim: int, axis_map: AxisMap, orders: Orders) -> torch.Tensor | None:
    """Element positions of a dimension in sorted order, or None if nothing moves there."""
    parts, start, moved = [], 0, False
    for segment in spec.dims[dim]:
        length = segment.num_units * segment.unit
        order = None
        if segment.axis:
            layer = None if axis_map.axes[segment.axis].is_global else spec.layer
            order = orders.get(order_key(segment.axis, layer))
        if order is None:
            parts.append(torch.arange(length) + start)
        else:
            moved = True
            within = torch.arange(segment.unit)
            parts.append((order[:, None] * segment.unit + within).reshape(-1) + start)
        start += length
    return torch.cat(parts) if moved else None


def sort_tensor(
    tensor: torch.Tensor,
    spec: TensorSpec,
    axis_map: AxisMap,
    orders: Orders,
    *,
    skip_first: bool = False,
) -> torch.Tensor:
    """A tensor with the units of every ordered axis permuted, best first."""
    first = 1 if skip_first else 0
    for position in range(first, len(spec.dims)):
        index = dim_order(spec, position, axis_map, orders)
        if index is not None:
            tensor = tensor.index_select(position - first, index.to(tensor.device))
    return tensor


def sort_state(
    state: Mapping[str, torch.Tensor], axis_map: AxisMap, orders: Orders
) -> dict[str, torch.Tensor]:
    """Every tensor of the table with sorted axes. The model's function is unchanged."""
    check_orders(orders, axis_map)
    return {
        name: sort_tensor(state[name], spec, axis_map, orders)
        for name, spec in axis_map.tensors.items()
    }
