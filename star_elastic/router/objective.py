"""What is lost by cutting: the objective of widths that no data has chosen.

Where importance was measured (`star-elastic rank`), a cut loses the share of an axis's importance
that its units hold. Where it was not, importance is taken to fall evenly from the first unit of an
axis to none at the last: a cut of a share c then loses c squared, so that many small cuts are
better than one large one. All axes count alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from star_elastic.axes import LAYERS, Axis, AxisMap, Width, order_key
from star_elastic.router.grid import Grid

Kept = Mapping[str, torch.Tensor]
"""Importance of an axis's units, float (units,), in the order in which units are kept: in each
group the first ones. By `order_key`."""


@dataclass(frozen=True)
class Objective:
    """Shares of importance that widths lose, from 0 (the parent) to 1.

    `scores` are the measured ones; orders that they lack are taken to fall evenly.
    """

    axis_map: AxisMap
    scores: Kept = field(default_factory=dict)

    def is_measured(self, axis: str) -> bool:
        """Whether importance is known of all units of an axis."""
        layers = self.axis_map.axes[axis].layers or (None,)
        return all(order_key(axis, layer) in self.scores for layer in layers)

    def lost_at(self, axis: str, width: int, layer: int | None = None) -> float:
        """The share lost at a width of an axis in one of its layers; without a `layer`, of all
        layers on average. The width of `layers` is how many there are."""
        found = self.axis_map.axes[axis]
        if axis == LAYERS or not self.is_measured(axis):
            size = len(found.layers) if axis == LAYERS else found.size
            return (1 - width / size) ** 2
        layers = (layer,) if layer is not None else found.layers or (None,)
        lost = [_lost(self.scores[order_key(axis, n)], found, width) for n in layers]
        return sum(lost) / len(lost)

    def lost(self, widths: Mapping[str, Width]) -> dict[str, float]:
        """The share lost on every axis, of all layers on average."""
        found = {}
        for axis, width in widths.items():
            layers = self.axis_map.axes[axis].layers
            if axis == LAYERS:
                found[axis] = self.lost_at(axis, len(self.axis_map.kept_layers(widths)))
            elif isinstance(width, tuple):
                own = [self.lost_at(axis, w, n) for w, n in zip(width, layers, strict=True)]
                found[axis] = sum(own) / len(own)
            else:
                found[axis] = self.lost_at(axis, width)
        return found

    def grid_scores(self, grid: Grid) -> list[list[float]]:
        """For every place of a grid, a score of each choice, whose sum is minus the shares lost on
        all axes."""
        scores = []
        for place in grid.places:
            layer, share = None, 1.0
            if place.layer is not None:
                layer = self.axis_map.axes[place.axis].layers[place.layer]
                share = 1 / grid.per_layer[place.axis]
            own = [self.lost_at(place.axis, w, layer) for w in grid.choices[place.axis]]
            scores.append([-share * lost for lost in own])
        return scores


def _lost(scores: torch.Tensor, axis: Axis, width: int) -> float:
    """The share of the scores (units,) of an axis that a width leaves out."""
    grouped = scores.double().reshape(axis.num_groups, -1)
    whole = float(grouped.sum())
    left_out = float(grouped[:, width // axis.num_groups :].sum())
    return left_out / whole if whole else 0.0
