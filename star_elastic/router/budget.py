"""Budgets: the loss that pulls the router to them, and the exact choice when it commits.

A size's budget is a fraction of the parent's cost for one or several metrics (`active`, `total`,
`bytes`, `flops` of cost.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from star_elastic.cost import METRICS, CostModel
from star_elastic.errors import BudgetError, ShapeError
from star_elastic.nesting.gate import Mixtures
from star_elastic.router.router import Decision
from star_elastic.widths import Widths

FULL_WIDTH_WEIGHT = 10.0
AIM = 0.005
TOLERANCE = 0.02

Budgets = Mapping[str, float]
"""Fractions of the parent's cost, by metric."""


def check_budgets(name: str, budgets: Budgets, cost: CostModel, choices: Mapping) -> None:
    """Raises BudgetError unless the budgets are known and lie in the range of the choices."""
    if not budgets:
        raise BudgetError(f"size {name!r} has no budget; give one, for example active = 0.5")
    full = cost.axis_map.full
    least = full.replace(**{axis: min(grid) for axis, grid in choices.items()})
    for metric, fraction in budgets.items():
        if metric not in METRICS:
            raise BudgetError(
                f"size {name!r}: budget {metric!r} is unknown; use {', '.join(METRICS)}"
            )
        floor = cost.count(least).metric(metric) / cost.count(full).metric(metric)
        if not floor <= fraction <= 1:
            raise BudgetError(
                f"size {name!r}: {metric}={fraction} cannot be met; the choices reach from "
                f"{floor:.3f} to 1"
            )


def expected_widths(mixtures: Mixtures, cost: CostModel) -> dict[str, Any]:
    """Expected width per axis (tensors), full width for axes without a choice."""
    expected: dict[str, Any] = dict(cost.axis_map.full)
    expected.update({axis: mixture.expected() for axis, mixture in mixtures.items()})
    return expected


def budget_loss(mixtures: Mixtures, budgets: Budgets, cost: CostModel) -> torch.Tensor:
    """Relative distance of the expected cost to the budget, summed over metrics; a scalar.

    |C(x) / (b * C_full) - 1| at the expected widths x, without slack: any slack is a budget
    missed. At the full budget, 10 * the squared distance to the one-hot full width is added.
    """
    full = cost.count(cost.axis_map.full)
    now = cost.count(expected_widths(mixtures, cost))
    distances = [
        torch.as_tensor(now.metric(metric) / (fraction * full.metric(metric)) - 1).abs()
        for metric, fraction in budgets.items()
    ]
    loss = torch.stack(distances).sum()
    if all(fraction == 1 for fraction in budgets.values()):
        for mixture in mixtures.values():
            target = F.one_hot(torch.tensor(0), len(mixture.choices)).to(mixture.probs)
            loss = loss + FULL_WIDTH_WEIGHT * F.mse_loss(mixture.probs, target)
    return loss


@dataclass(frozen=True, slots=True)
class Commitment:
    """The widths a size is fixed to: how far off its budget, and what moved after argmax.

    `miss` is the largest relative distance to a budget; `repair` maps each axis that moved to
    its steps on the grid (negative: narrower).
    """

    widths: Widths
    miss: float
    repair: Mapping[str, int]


def budget_miss(widths: Mapping, budgets: Budgets, cost: CostModel) -> float:
    """The largest relative distance of the exact cost to a budget."""
    full = cost.count(cost.axis_map.full)
    now = cost.count(widths)
    return max(
        abs(now.metric(metric) / (fraction * full.metric(metric)) - 1)
        for metric, fraction in budgets.items()
    )


def commit(decision: Decision, budgets: Budgets, cost: CostModel) -> Commitment:
    """Fixes a size's widths: the router's argmax, moved at most one grid step per axis.

    Of all widths within one step, takes the most probable (by the router) that meets the budget
    within 0.5 %, else within 2 %, else the nearest to the budget.
    """
    axes = list(decision.mixtures)
    steps: list[list[tuple[int, int, float]]] = []
    for axis in axes:
        mixture = decision.mixtures[axis]
        at = mixture.choices.index(decision.choice[axis])
        log_probs = mixture.probs.detach().clamp_min(1e-30).log().tolist()
        options = []
        for position in (at - 1, at, at + 1):
            if 0 <= position < len(mixture.choices):
                width = mixture.choices[position]
                options.append((width, at - position, log_probs[position]))
        steps.append(options)

    best: tuple[tuple, Commitment] | None = None
    for combination in itertools.product(*steps):
        chosen = {axis: option[0] for axis, option in zip(axes, combination, strict=True)}
        try:
            widths = cost.axis_map.complete(chosen)
        except ShapeError:
            continue
        miss = budget_miss(widths, budgets, cost)
        moved = {a: o[1] for a, o in zip(axes, combination, strict=True) if o[1]}
        log_prob = math.fsum(option[2] for option in combination)
        grade = 0 if miss <= AIM else 1 if miss <= TOLERANCE else 2
        rank = (grade, miss if grade == 2 else -log_prob, len(moved), miss)
        if best is None or rank < best[0]:
            best = (rank, Commitment(widths, miss, moved))
    if best is None:
        raise BudgetError(
            f"no allowed widths lie within one step of {dict(decision.choice)}; "
            "change the choices so that they satisfy the model's rules"
        )
    return best[1]
