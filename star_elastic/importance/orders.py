"""From scores to orders, and the two baselines that importance has to beat.

Scores and orders share their keys (`axes.order_key`): one vector per axis, or per axis and layer.
An order never moves a unit out of its group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from star_elastic.axes import Axis, AxisMap, axis_keys, order_key
from star_elastic.errors import CheckpointError

Scores = Mapping[str, torch.Tensor]
"""Importance of an axis's units, larger is better: keys from `order_key`, float (units,)."""


def check_scores(scores: Scores, axis_map: AxisMap) -> None:
    """Raises CheckpointError unless each score belongs to an axis of the map and can be ranked."""
    keys = axis_keys(axis_map)
    for key, score in scores.items():
        if key not in keys:
            raise CheckpointError(
                f"score {key!r} belongs to no axis of this {axis_map.model_type} model; rank the "
                "model that is to be sorted"
            )
        size = axis_map.axes[keys[key][0]].size
        if score.shape != (size,):
            raise CheckpointError(
                f"score {key!r} has shape {tuple(score.shape)} but the model has {size} units; "
                "rank the model that is to be sorted"
            )
        if not score.is_floating_point() or not score.isfinite().all() or (score < 0).any():
            raise CheckpointError(
                f"score {key!r} holds values that are negative or not finite; estimate it again"
            )


def orders_from_scores(scores: Scores, axis_map: AxisMap) -> dict[str, torch.Tensor]:
    """Orders (units,) int64, best first inside each group; equal scores keep their old sequence.

    Axes without a score get no order. Raises CheckpointError for scores of another model.
    """
    check_scores(scores, axis_map)
    keys = axis_keys(axis_map)
    return {key: _rank(score, axis_map.axes[keys[key][0]]) for key, score in scores.items()}


def random_orders(axis_map: AxisMap, seed: int) -> dict[str, torch.Tensor]:
    """Uniformly random legal orders of all axes; a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: _rank(torch.rand(axis_map.axes[name].size, generator=generator), axis_map.axes[name])
        for key, (name, _) in axis_keys(axis_map).items()
    }


def magnitude_scores(
    state: Mapping[str, torch.Tensor], axis_map: AxisMap
) -> dict[str, torch.Tensor]:
    """L2 norm of all weights of each unit, over every tensor of the table (buffers apart).

    `state` holds the model's parameters by their name in memory. Needs no data: the baseline.
    """
    squares = {
        key: torch.zeros(axis_map.axes[name].size, dtype=torch.float64)
        for key, (name, _) in axis_keys(axis_map).items()
    }
    for spec in axis_map.tensors.values():
        if spec.is_buffer:
            continue
        square = state[spec.name].detach().double().square()
        for position, dim in enumerate(spec.dims):
            others = [other for other in range(square.dim()) if other != position]
            per_element = (square.sum(others) if others else square).cpu()
            start = 0
            for segment in dim:
                stop = start + segment.num_units * segment.unit
                if segment.axis:
                    layer = None if axis_map.axes[segment.axis].is_global else spec.layer
                    per_unit = per_element[start:stop].reshape(segment.num_units, -1).sum(1)
                    squares[order_key(segment.axis, layer)] += per_unit
                start = stop
    return {key: total.sqrt() for key, total in squares.items()}


def _rank(score: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Positions by falling score within each group of the axis."""
    per_group = axis.size // axis.num_groups
    grouped = score.detach().cpu().reshape(axis.num_groups, per_group)
    ranked = grouped.argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(axis.num_groups)[:, None] * per_group
    return (ranked + starts).reshape(-1)
