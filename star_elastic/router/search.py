"""The search over the grid: of all widths that meet some budgets, or keep within some limits, those
with the highest score.

A score is a number for every width of every place of the grid, and their sum counts: how likely a
router finds each (its log-probability), or whatever else speaks for a width. Nothing here knows a
router. What widths cost is counted exactly.

A grid with few combinations is tried out. Of a larger one, all widths that are alike in all
layers are tried (thinned out if these are too many), and a beam search goes on, place by place,
from the best of them and from the best scored widths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from star_elastic.axes.widths import Widths
from star_elastic.cost.count import CostModel
from star_elastic.router.budget import AIM, Budgets, Limits, beyond, overspent
from star_elastic.router.grid import Grid

EXHAUSTIVE = 200_000
"""Combinations of widths up to this many are counted one and all."""
BEAM = 64
ROUND = 50_000
"""Combinations that a round of a beam search counts, about."""

Misses = Callable[[Mapping], list[Any]]
"""For widths by axis (tensors of many), how far they are off each thing that is asked of their
cost: numbers or tensors, none below zero."""
Scores = Sequence[Sequence[float] | torch.Tensor]
"""For every place of a grid, a score of each of its choices."""


@dataclass(frozen=True, slots=True)
class Found:
    """The widths that a search ends with; the number of the choice at every place of the grid, the
    sum of their scores, and the largest relative distance of the exact cost to a budget."""

    widths: Widths
    positions: tuple[int, ...]
    score: float
    miss: float


def search(
    grid: Grid, cost: CostModel, budgets: Budgets, scores: Scores, *, steps: int | None = None
) -> Found:
    """The widths with the highest score of those that meet the budgets within `AIM`; if none do,
    the nearest to the budgets. With `steps`, only those at most so many choices away from the best
    scored one, on every place."""
    look = _Search(grid, cost, _distance(budgets, cost), scores)
    allowed = look.all
    if steps is not None:
        allowed = [own[max(at - steps, 0) : at + steps + 1] for own, at in zip(
            allowed, look.start.tolist(), strict=True
        )]  # fmt: skip
    return look.found(look.among(allowed), 0)


def best_within(grid: Grid, cost: CostModel, limits: Limits, scores: Scores) -> Found:
    """The widths with the highest score of those that cost no more than the limits, whatever they
    leave of them; if none do, the nearest. `miss` is 0 if they do.

    Of a grid with more than `EXHAUSTIVE` combinations the best that the search found. It finds some
    that fit if any do, because the narrowest are among those that it begins with.
    """
    look = _Search(grid, cost, partial(beyond, limits=limits, cost=cost), scores, aim=0.0)
    return look.found(look.among(look.all), 0)


def is_exhaustive(grid: Grid) -> bool:
    """Whether a search over a grid counts all its combinations."""
    return num_combinations(grid) <= EXHAUSTIVE


def num_combinations(grid: Grid) -> int:
    """How many combinations of widths a grid has."""
    return math.prod(len(grid.choices[place.axis]) for place in grid.places)


def _distance(budgets: Budgets, cost: CostModel) -> Misses:
    """The distance to budgets, above or below."""

    def misses(widths: Mapping) -> list[Any]:
        return [abs(value) for value in overspent(widths, budgets, cost)]

    return misses


def nearest(grid: Grid, cost: CostModel, budgets: Budgets) -> Found:
    """The widths whose cost is nearest to the budgets, whatever speaks for them.

    Where layers decide for themselves, widths alike in all layers that meet the budgets within
    `AIM` are good enough.
    """
    scores = [[0.0] * len(grid.choices[place.axis]) for place in grid.places]
    look = _Search(grid, cost, _distance(budgets, cost), scores)
    tried = look.count(look.alike(look.all))
    if grid.per_layer and tried.misses.min() > AIM:
        tried = look.among(look.all)
    return look.found(tried, int(tried.misses.argmin()))


@dataclass(frozen=True, slots=True)
class _Counted:
    """Combinations by position on the grid (n, places); the distance to the budgets `misses` (n,)
    and whether that is near enough, `met` (n,); `scores` (n,), and the number of places `moves`
    (n,) at which another choice scores higher."""

    positions: torch.Tensor
    misses: torch.Tensor
    met: torch.Tensor
    scores: torch.Tensor
    moves: torch.Tensor

    def best(self, count: int) -> list[int]:
        """Rows, best first: budgets met, then the highest score; or else the nearest to them."""
        met = self.met
        order = torch.arange(len(self.misses))
        # Sorted by the least important key first; sorts are stable. Among equals, fewer places at
        # which the router is overruled are better.
        for key in (self.misses, self.moves, torch.where(met, -self.scores, self.misses), ~met):
            order = order[key[order].to(torch.float64).argsort(stable=True)]
        return order[:count].tolist()

    def beam(self) -> _Counted:
        """The best rows."""
        kept = self.best(BEAM)
        columns = (self.positions, self.misses, self.met, self.scores, self.moves)
        return _Counted(*(column[kept] for column in columns))

    def key(self) -> tuple[bool, float]:
        """What the first row of a beam is worth; less is better."""
        met = bool(self.met[0])
        return not met, float(-self.scores[0] if met else self.misses[0])


class _Search:
    """Counts many combinations at a time. `misses` says how far widths are off what is asked of
    their cost, `aim` how far they may be. `start` is the best scored choice of every place."""

    def __init__(
        self, grid: Grid, cost: CostModel, misses: Misses, scores: Scores, aim: float = AIM
    ):
        self.grid, self.cost, self.misses, self.aim = grid, cost, misses, aim
        self.scores = [torch.as_tensor(own, dtype=torch.float64) for own in scores]
        self.choices = [grid.choices[place.axis] for place in grid.places]
        self.all = [range(len(choices)) for choices in self.choices]
        self.start = torch.tensor([int(own.argmax()) for own in self.scores])

    def found(self, rows: _Counted, number: int) -> Found:
        """One of some rows."""
        at = tuple(rows.positions[number].tolist())
        widths = self.grid.at(at, self.cost.axis_map)
        return Found(widths, at, float(rows.scores[number]), float(rows.misses[number]))

    def count(self, positions: torch.Tensor) -> _Counted:
        """The exact cost of every row of positions (n, places) beside what is asked."""
        columns = [
            torch.tensor(choices, dtype=torch.float64)[own]
            for choices, own in zip(self.choices, positions.T, strict=True)
        ]
        misses = torch.zeros(len(positions), dtype=torch.float64)
        for value in self.misses(self.grid.widths(columns)):
            # a number where no width in question changes the metric
            misses = torch.maximum(misses, torch.as_tensor(value).double())
        scores = torch.zeros_like(misses)
        for own, column in zip(self.scores, positions.T, strict=True):
            scores += own[column]
        moves = (positions != self.start).sum(1)
        return _Counted(positions, misses, misses <= self.aim, scores, moves)

    def among(self, allowed: Sequence[Sequence[int]]) -> _Counted:
        """Combinations of the allowed positions of every place, best first."""
        if math.prod(map(len, allowed)) <= EXHAUSTIVE:
            return self.count(_product(allowed)).beam()
        return self.climb(allowed, torch.cat([self.start[None], self.alike(allowed)]))

    def alike(self, allowed: Sequence[Sequence[int]]) -> torch.Tensor:
        """The best combinations (n, places), and the nearest to the budgets, of those that are the
        same in all layers; if there are too many, of every second one, fourth one and so on."""
        axes = list(self.grid.choices)
        column = [axes.index(place.axis) for place in self.grid.places]
        scores = [torch.zeros(len(choices)).double() for choices in self.grid.choices.values()]
        kept = [set(range(len(choices))) for choices in self.grid.choices.values()]
        for axis, own, options in zip(column, self.scores, allowed, strict=True):
            scores[axis] = scores[axis] + own
            kept[axis] &= set(options)
        options = [sorted(positions) for positions in kept]
        if not all(options):  # layers' allowed positions have none in common
            return self.start[None]
        while math.prod(map(len, options)) > EXHAUSTIVE:
            longest = max(range(len(options)), key=lambda axis: len(options[axis]))
            options[longest] = sorted({*options[longest][::2], options[longest][-1]})
        grid = replace(self.grid, per_layer={})
        plain = _Search(grid, self.cost, self.misses, scores, self.aim)
        counted = plain.count(_product(options))
        chosen = [*counted.best(BEAM), int(counted.misses.argmin())]
        return counted.positions[chosen][:, column]

    def climb(self, allowed: Sequence[Sequence[int]], seeds: torch.Tensor) -> _Counted:
        """The best combinations that changes lead to from `seeds`: of one place in every round, and
        where these do not help any more, of two places at once."""
        changes = [(place, to) for place, options in enumerate(allowed) for to in options]
        pairs = [(a, b) for a, b in itertools.combinations(changes, 2) if a[0] != b[0]]
        singly = [(change,) for change in changes]
        beam = self.count(seeds).beam()
        for _ in range(2 * len(allowed)):
            # One place alone seldom keeps a budget that is met: what one place saves another must
            # spend. Pairs do both at once, but are many, so they are tried last.
            for moves in (singly, pairs):
                rows = beam.positions[: max(ROUND // max(len(moves), 1), 1)]
                moved = torch.cat([rows, *(_change(rows, move) for move in moves)])
                last, beam = beam, self.count(moved.unique(dim=0)).beam()
                if beam.key() < last.key():
                    break
            else:
                break
        return beam


def _product(options: Sequence[Sequence[int]]) -> torch.Tensor:
    """All combinations of the positions of every place (n, places)."""
    columns = torch.cartesian_prod(*(torch.tensor(list(own)) for own in options))
    return columns.reshape(-1, len(options))


def _change(rows: torch.Tensor, moves: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Rows of positions with some places put elsewhere."""
    changed = rows.clone()
    for place, to in moves:
        changed[:, place] = to
    return changed
