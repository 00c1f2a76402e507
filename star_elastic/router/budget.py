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
from star_elastic.router.router import Decision, Router, Temperature
from star_elastic.widths import Widths

FULL_WIDTH_WEIGHT = 10.0
AIM = 0.005
TOLERANCE = 0.02
SETTLED = Temperature(tau=1.0, scale=1.0)
SETTLE_STEPS, SETTLE_RATE = 1000, 0.02
DECIDED = 0.98
"""Probability from which an axis counts as settled on one width."""

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


def settle(router: Router, budget_N: torch.Tensor, budgets: Budgets, cost: CostModel) -> Commitment:
    """Fixes the widths of the size that the budget vector stands for.

    Where the router's argmax cannot be moved onto the budgets within one grid step per axis, the
    router first takes up to `SETTLE_STEPS` gradient steps that no data sees: its expected cost onto
    the budgets or, where it is there, one axis onto the width next to its expected one, those whose
    grid steps cost most first, so that the finer ones can make up for it. What still misses then is
    in the commitment.
    """
    coarsest_first = sorted(
        router.choices,
        key=lambda axis: _step_cost(axis, router.choices[axis], budgets, cost),
        reverse=True,
    )
    fixed = commit(router.decide(budget_N, SETTLED), budgets, cost)
    for _ in range(SETTLE_STEPS):
        if fixed.miss <= TOLERANCE:
            break
        mixtures = router.decide(budget_N, SETTLED).mixtures
        loss = budget_loss(mixtures, budgets, cost)
        if loss <= TOLERANCE:
            open_axes = [a for a in coarsest_first if mixtures[a].probs.max() < DECIDED]
            for mixture in [mixtures[axis] for axis in open_axes[:1]]:
                offsets = mixture.probs.new_tensor(mixture.choices) - mixture.expected().detach()
                loss = loss - mixture.probs[offsets.abs().argmin()].log()
        parameters = list(router.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= SETTLE_RATE / max(norm.item(), 1e-12) * gradient
        fixed = commit(router.decide(budget_N, SETTLED), budgets, cost)
    return fixed


def _step_cost(axis: str, choices: tuple[int, ...], budgets: Budgets, cost: CostModel) -> float:
    """Relative cost of an axis's mean grid step, summed over the budgets' metrics."""
    full = cost.axis_map.full
    whole, least = cost.count(full), cost.count(full.replace(**{axis: choices[-1]}))
    saved = sum(1 - least.metric(m) / whole.metric(m) for m in budgets)
    return saved / max(len(choices) - 1, 1)
