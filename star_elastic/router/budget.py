"""Budgets: what a size may cost, and the loss that pulls the router to it.

A size's budget is a fraction of the parent's cost for one or several metrics (`active`, `total`,
`bytes`, `flops`, `ms` of cost.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from star_elastic.cost.count import CostModel
from star_elastic.nesting.gate import expected_widths
from star_elastic.router.router import Decision

FULL_WIDTH_WEIGHT = 10.0
AIM = 0.005
"""Relative distance to a budget that counts as met."""
REACH = 0.02
"""A budget that all widths of the grid miss by more than this is refused before training."""

Budgets = Mapping[str, float]
"""Fractions of the parent's cost, by metric."""
Limits = Mapping[str, float]
"""The most that something may cost, by metric, in the metric's own unit."""


def describe(budgets: Budgets) -> str:
    """Budgets in words."""
    return " and ".join(f"{metric}={fraction:.4g}" for metric, fraction in budgets.items())


def overspent(widths: Mapping, budgets: Budgets, cost: CostModel) -> list[Any]:
    """C / (b * C_full) - 1 at `widths` for every budget: the relative distance of the cost to it,
    above zero where it costs more. Numbers, or tensors for widths that are tensors."""
    now = cost.count({**cost.axis_map.full, **widths})
    return [
        now.metric(metric) / (fraction * cost.full.metric(metric)) - 1
        for metric, fraction in budgets.items()
    ]


def beyond(widths: Mapping, limits: Limits, cost: CostModel) -> list[Any]:
    """C / limit - 1 at `widths` for every limit where that is above zero, else 0. Numbers, or
    tensors for widths that are tensors. It is 0 exactly where the cost is within the limit, for
    counts below 2^52."""
    now = cost.count({**cost.axis_map.full, **widths})
    over = [now.metric(metric) / limit - 1 for metric, limit in limits.items()]
    return [o.clamp(min=0) if isinstance(o, torch.Tensor) else max(o, 0) for o in over]


def budget_miss(widths: Mapping, budgets: Budgets, cost: CostModel):
    """The largest relative distance of the exact cost to a budget; a tensor for tensors (n,)."""
    misses = [abs(value) for value in overspent(widths, budgets, cost)]
    if any(isinstance(miss, torch.Tensor) for miss in misses):
        return torch.stack(list(torch.broadcast_tensors(*map(torch.as_tensor, misses)))).amax(0)
    return max(misses)


def budget_loss(decision: Decision, budgets: Budgets, cost: CostModel) -> torch.Tensor:
    """Relative distance of the expected cost to the budget, summed over metrics; a scalar.

    |C(x) / (b * C_full) - 1| at the expected widths x, without slack: any slack is a budget
    missed. At the full budget, 10 * the squared distance to the one-hot full width is added, the
    mean over the layers of an axis on which each decides for itself.
    """
    expected = expected_widths(decision.mixtures, cost.axis_map)
    distances = [torch.as_tensor(value).abs() for value in overspent(expected, budgets, cost)]
    loss = torch.stack(distances).sum()
    if all(fraction == 1 for fraction in budgets.values()):
        share = len(decision.mixtures) / len(decision.picks)
        for pick in decision.picks:
            target = F.one_hot(torch.tensor(0), len(pick.choices)).to(pick.probs)
            loss = loss + FULL_WIDTH_WEIGHT * share * F.mse_loss(pick.probs, target)
    return loss
