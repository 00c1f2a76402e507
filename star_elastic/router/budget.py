"""Budgets: the loss that pulls the router to them, and the exact choice when it commits.

A size's budget is a fraction of the parent's cost for one or several metrics (`active`, `total`,
`bytes`, `flops`, `ms` of cost.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from star_elastic.axes import LAYERS
from star_elastic.cost import METRICS, CostModel
from star_elastic.errors import BudgetError
from star_elastic.nesting.gate import Mixture, expected_widths
from star_elastic.router.grid import Grid, complete_widths
from star_elastic.router.router import Decision, Router, Temperature
from star_elastic.widths import Widths

FULL_WIDTH_WEIGHT = 10.0
AIM = 0.005
"""Relative distance to a budget that counts as met."""
REACH = 0.02
"""A budget that all widths of the grid miss by more than this is refused before training."""
SETTLED = Temperature(tau=1.0, scale=1.0)
SETTLE_STEPS, SETTLE_RATE, LOOK_EVERY = 1000, 0.02, 20
DECIDED = 0.98
"""Probability from which a place counts as settled on one width."""
EXHAUSTIVE = 200_000
"""Combinations of widths up to this many are counted one and all."""
BEAM = 64

Budgets = Mapping[str, float]
"""Fractions of the parent's cost, by metric."""


def check_reach(name: str, budgets: Budgets, cost: CostModel, grid: Grid) -> None:
    """Raises BudgetError unless each budget by itself lies between the grid's ends.

    For a grid whose layers are not ranked yet, the ranking that leaves the cheapest counts: what
    lies outside then, no ranking meets.
    """
    if not budgets:
        raise BudgetError(f"size {name!r} has no budget; give one, for example active = 0.5")
    full = cost.axis_map.full
    for metric, fraction in budgets.items():
        if metric not in METRICS:
            raise BudgetError(
                f"size {name!r}: budget {metric!r} is unknown; use {', '.join(METRICS)}"
            )
        ranked = grid if grid.is_ranked else replace(grid, depth=_cheapest(grid, cost, metric))
        least = cost.count({**full, **ranked.narrowest()})
        floor = least.metric(metric) / cost.count(full).metric(metric)
        if not floor <= fraction <= 1:
            raise BudgetError(
                f"size {name!r}: {metric}={fraction:.4g} cannot be met; the choices reach from "
                f"{floor:.3f} to 1"
            )


def _cheapest(grid: Grid, cost: CostModel, metric: str) -> tuple[int, ...]:
    """The layers by what they cost at the narrowest widths of the grid."""
    layers = cost.axis_map.axes[LAYERS].layers
    others = replace(grid, choices={a: c for a, c in grid.choices.items() if a != LAYERS})
    narrowest = {**cost.axis_map.full, **others.narrowest()}

    def alone(layer: int) -> float:
        return cost.count({**narrowest, LAYERS: tuple(int(o == layer) for o in layers)}).metric(
            metric
        )

    return tuple(sorted(layers, key=alone))


def check_budgets(name: str, budgets: Budgets, cost: CostModel, grid: Grid) -> None:
    """Raises BudgetError unless the budgets are known and some widths of the grid meet them all."""
    check_reach(name, budgets, cost, grid)
    possible, widths = nearest_possible(budgets, cost, grid)
    if possible > REACH:
        raise BudgetError(
            f"size {name!r}: no widths of the choices meet {describe(budgets)} within {REACH:.0%}; "
            f"the nearest ({widths}) miss by {possible:.1%}: change a budget or give finer choices"
        )


def describe(budgets: Budgets) -> str:
    """Budgets in words."""
    return " and ".join(f"{metric}={fraction:.4g}" for metric, fraction in budgets.items())


def budget_loss(decision: Decision, budgets: Budgets, cost: CostModel) -> torch.Tensor:
    """Relative distance of the expected cost to the budget, summed over metrics; a scalar.

    |C(x) / (b * C_full) - 1| at the expected widths x, without slack: any slack is a budget
    missed. At the full budget, 10 * the squared distance to the one-hot full width is added, the
    mean over the layers of an axis on which each decides for itself.
    """
    full = cost.count(cost.axis_map.full)
    now = cost.count(expected_widths(decision.mixtures, cost.axis_map))
    distances = [
        torch.as_tensor(now.metric(metric) / (fraction * full.metric(metric)) - 1).abs()
        for metric, fraction in budgets.items()
    ]
    loss = torch.stack(distances).sum()
    if all(fraction == 1 for fraction in budgets.values()):
        share = len(decision.mixtures) / len(decision.picks)
        for pick in decision.picks:
            target = F.one_hot(torch.tensor(0), len(pick.choices)).to(pick.probs)
            loss = loss + FULL_WIDTH_WEIGHT * share * F.mse_loss(pick.probs, target)
    return loss


@dataclass(frozen=True, slots=True)
class Commitment:
    """The widths a size is fixed to: how far off its budget, and what moved after argmax.

    `miss` is the largest relative distance to a budget, `possible` the smallest that was found for
    any widths of the grid (all were counted unless the grid is too large; None if nobody looked);
    `repair` maps each axis that moved to its steps on the grid (negative: narrower; summed over its
    layers).
    """

    widths: Widths
    miss: float
    repair: Mapping[str, int]
    possible: float | None = None


def budget_miss(widths: Mapping, budgets: Budgets, cost: CostModel):
    """The largest relative distance of the exact cost to a budget; a tensor for tensors (n,)."""
    full = cost.count(cost.axis_map.full)
    now = cost.count({**cost.axis_map.full, **widths})
    misses = [
        abs(now.metric(metric) / (fraction * full.metric(metric)) - 1)
        for metric, fraction in budgets.items()
    ]
    if any(isinstance(miss, torch.Tensor) for miss in misses):
        return torch.stack(list(torch.broadcast_tensors(*map(torch.as_tensor, misses)))).amax(0)
    return max(misses)


@dataclass(frozen=True, slots=True)
class _Scored:
    """Combinations of choices, by position on the grid (n, places), with what speaks for each."""

    positions: torch.Tensor
    misses: torch.Tensor
    log_probs: torch.Tensor
    moves: torch.Tensor

    def best(self, count: int = 1) -> list[int]:
        """Rows, best first: budgets met, then the most probable; or else the nearest to them."""
        met = self.misses <= AIM
        keys = zip(
            (~met).tolist(),
            torch.where(met, -self.log_probs, self.misses).tolist(),
            self.moves.tolist(),
            self.misses.tolist(),
            range(len(self.misses)),
            strict=True,
        )
        return [key[-1] for key in sorted(keys)[:count]]


class _Search:
    """Scores combinations of choices of one decision against budgets, many at a time."""

    def __init__(self, grid: Grid, budgets: Budgets, cost: CostModel, picks: Sequence[Mixture]):
        self.grid, self.budgets, self.cost = grid, budgets, cost
        self.choices = [grid.choices[place.axis] for place in grid.places]
        likely = [pick.probs.detach().cpu().double() for pick in picks]
        self.log_probs = [probs.clamp_min(1e-30).log() for probs in likely]
        self.start = torch.tensor([int(probs.argmax()) for probs in likely])

    def score(self, positions: torch.Tensor) -> _Scored:
        """Exact cost of every row of positions."""
        columns = [
            torch.tensor(choices, dtype=torch.float64)[positions[:, i]]
            for i, choices in enumerate(self.choices)
        ]
        misses = budget_miss(self.grid.widths(columns), self.budgets, self.cost)
        misses = torch.as_tensor(misses).double().expand(len(positions))
        log_probs = torch.zeros(len(positions), dtype=torch.float64)
        for i, values in enumerate(self.log_probs):
            log_probs += values[positions[:, i]]
        return _Scored(positions, misses, log_probs, (positions != self.start).sum(1))

    def widths(self, positions: torch.Tensor) -> Widths:
        """The widths at one row of positions."""
        chosen = [choices[p] for choices, p in zip(self.choices, positions.tolist(), strict=True)]
        return complete_widths(self.grid, chosen, self.cost.axis_map)

    def near(self, radius: int) -> _Scored:
        """Combinations within `radius` steps of the likeliest one on every place: all of them, or
        those that a beam of the best ones reaches place by place."""
        allowed = [
            list(range(max(at - radius, 0), min(at + radius + 1, len(choices))))
            for at, choices in zip(self.start.tolist(), self.choices, strict=True)
        ]
        if math.prod(map(len, allowed)) <= EXHAUSTIVE:
            return self.every(allowed)
        return self.beam(allowed)

    def every(self, allowed: Sequence[Sequence[int]]) -> _Scored:
        """All combinations of the allowed positions."""
        positions = torch.cartesian_prod(*map(torch.tensor, allowed))
        return self.score(positions.reshape(-1, len(allowed)))

    def beam(self, allowed: Sequence[Sequence[int]]) -> _Scored:
        """The best combinations that changes of one place after the other lead to."""
        beam = self.score(self.start[None])
        for _ in range(len(allowed)):
            rows = [beam.positions]
            for place, options in enumerate(allowed):
                for option in options:
                    moved = beam.positions.clone()
                    moved[:, place] = option
                    rows.append(moved)
            scored = self.score(torch.cat(rows).unique(dim=0))
            kept = scored.best(BEAM)
            before = beam.best()
            improved = [(scored.misses[kept[0]] <= AIM).item(), scored.log_probs[kept[0]].item()]
            last = [(beam.misses[before[0]] <= AIM).item(), beam.log_probs[before[0]].item()]
            beam = _Scored(
                scored.positions[kept], scored.misses[kept], scored.log_probs[kept],
                scored.moves[kept],
            )  # fmt: skip
            if improved == last and improved[0]:
                break
        return beam


def commit(
    decision: Decision,
    budgets: Budgets,
    cost: CostModel,
    grid: Grid,
    possible: float | None = None,
    *,
    radius: int = 1,
) -> Commitment:
    """Fixes a size's widths: the router's argmax, every place moved at most `radius` grid steps.

    Of all widths that near, takes the most probable (by the router) that meets the budgets
    within 0.5 %, else the nearest to them.
    """
    search = _Search(grid, budgets, cost, decision.picks)
    scored = search.near(radius)
    positions = scored.positions[scored.best()[0]]
    repair: dict[str, int] = {}
    for place, steps in zip(grid.places, (search.start - positions).tolist(), strict=True):
        if steps:
            repair[place.axis] = repair.get(place.axis, 0) + steps
    widths = search.widths(positions)
    return Commitment(widths, float(budget_miss(widths, budgets, cost)), repair, possible)


def nearest_possible(budgets: Budgets, cost: CostModel, grid: Grid) -> tuple[float, Widths]:
    """The smallest miss that is found for any widths of the grid, and those widths.

    Grids with too many combinations are thinned alike on every axis. Where layers decide for
    themselves, the search goes on from the best of the widths that are the same in all layers.
    """
    alike = replace(grid, per_layer={})
    allowed = [list(range(len(widths))) for widths in grid.choices.values()]
    while math.prod(map(len, allowed)) > EXHAUSTIVE:
        longest = max(range(len(allowed)), key=lambda axis: len(allowed[axis]))
        allowed[longest] = sorted({*allowed[longest][::2], allowed[longest][-1]})
    search = _Search(alike, budgets, cost, _one_hots(alike, [0] * len(allowed)))
    scored = search.every(allowed)
    best = int(scored.misses.argmin())
    miss, nearest = float(scored.misses[best]), search.widths(scored.positions[best])
    if grid.per_layer and miss > AIM:
        of_axis = dict(zip(grid.choices, scored.positions[best].tolist(), strict=True))
        start = [of_axis[place.axis] for place in grid.places]
        search = _Search(grid, budgets, cost, _one_hots(grid, start))
        found = search.beam([range(len(choices)) for choices in search.choices])
        best = int(found.misses.argmin())
        if found.misses[best] < miss:
            return float(found.misses[best]), search.widths(found.positions[best])
    return miss, nearest


def _one_hots(grid: Grid, positions: Sequence[int]) -> list[Mixture]:
    """A mixture for every place that is sure of one choice."""
    return [
        Mixture(
            grid.choices[place.axis],
            F.one_hot(torch.tensor(position), len(grid.choices[place.axis])).double(),
        )
        for place, position in zip(grid.places, positions, strict=True)
    ]


def settle(router: Router, budget_N: torch.Tensor, budgets: Budgets, cost: CostModel) -> Commitment:
    """Fixes the widths of the size that the budget vector stands for.

    Where the router's argmax cannot be moved onto the budgets within one grid step per place, a
    copy of the router first takes up to `SETTLE_STEPS` gradient steps that no data sees: its
    expected cost onto the budgets or, where it is there, one place onto the width next to its
    expected one, those whose grid steps cost most first, so that the finer ones can make up for it.
    If that does not bring it into reach, places move further than one step; `repair` tells. The
    router that is given is left as it is.
    """
    router, grid = copy.deepcopy(router), router.grid
    possible, _ = nearest_possible(budgets, cost, grid)
    enough = max(AIM, possible)
    order = sorted(
        range(len(grid.places)), key=lambda i: _step_cost(grid, i, budgets, cost), reverse=True
    )
    best = commit(router.decide(budget_N, SETTLED), budgets, cost, grid, possible)
    for step in range(SETTLE_STEPS):
        if best.miss <= enough * (1 + 1e-9):
            break
        decision = router.decide(budget_N, SETTLED)
        loss = budget_loss(decision, budgets, cost)
        if loss <= REACH:
            picks = [decision.picks[i] for i in order]
            for pick in [pick for pick in picks if pick.probs.max() < DECIDED][:1]:
                offsets = pick.probs.new_tensor(pick.choices) - pick.expected().detach()
                loss = loss - pick.probs[offsets.abs().argmin()].log()
        _descend(router, loss)
        if loss > REACH and step % LOOK_EVERY:
            continue  # far from the budget no neighbour meets it
        now = commit(router.decide(budget_N, SETTLED), budgets, cost, grid, possible)
        best = min(best, now, key=lambda fixed: fixed.miss)
    decision = router.decide(budget_N, SETTLED)
    for radius in range(2, max(map(len, grid.choices.values()))):
        if best.miss <= enough * (1 + 1e-9):
            break
        now = commit(decision, budgets, cost, grid, possible, radius=radius)
        best = min(best, now, key=lambda fixed: fixed.miss)
    return best


def _descend(router: Router, loss: torch.Tensor) -> None:
    """One gradient step of fixed length."""
    parameters = list(router.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= SETTLE_RATE / max(norm.item(), 1e-12) * gradient


def _step_cost(grid: Grid, number: int, budgets: Budgets, cost: CostModel) -> float:
    """Relative cost of a place's mean grid step, summed over the budgets' metrics."""
    place, full = grid.places[number], cost.axis_map.full
    widest = [grid.choices[p.axis][0] for p in grid.places]
    narrow = [*widest]
    narrow[number] = grid.choices[place.axis][-1]
    whole, least = cost.count(full), cost.count({**full, **grid.widths(narrow)})
    saved = sum(1 - least.metric(m) / whole.metric(m) for m in budgets)
    return saved / max(len(grid.choices[place.axis]) - 1, 1)


def settle_between(
    router: Router, trained: Sequence[Budgets], asked: Budgets, cost: CostModel
) -> Commitment:
    """Widths for budgets between two trained ones, by interpolating their budget vectors.

    `trained` are the budgets the router was trained at, in its order. Raises BudgetError for
    budgets outside the trained range or metrics that no trained size has.
    """
    if len(asked) != 1:
        raise BudgetError("give one budget, for example active=0.6, to find widths between sizes")
    ((metric, fraction),) = asked.items()
    known = sorted((b[metric], number) for number, b in enumerate(trained) if metric in b)
    if len(known) < 2 or not known[0][0] <= fraction <= known[-1][0]:
        reach = f"{known[0][0]:.4g} to {known[-1][0]:.4g}" if len(known) > 1 else "none"
        raise BudgetError(
            f"{metric}={fraction:.4g} lies outside the range of {metric} that this router was "
            f"trained for ({reach}); ask for a budget inside it, or train a size there"
        )
    below = max(pair for pair in known if pair[0] <= fraction)
    above = min(pair for pair in known if pair[0] >= fraction)
    span = above[0] - below[0]
    share = (fraction - below[0]) / span if span else 0.0
    vector = (1 - share) * router.one_hot(below[1]) + share * router.one_hot(above[1])
    return settle(router, vector, asked, cost)
