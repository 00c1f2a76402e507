"""The search over the grid: of all widths that meet a size's budgets, the likeliest ones.

A router's decision says how likely each width of each place is. Fixing a size means to choose one
width for every place, so that the budgets are met by exact count and the product of the
probabilities is as large as can be. Small grids are tried out. Large ones are swept: a price on
what a budget is overspent by, rising from nothing, gives ever cheaper (or dearer) widths, and a
beam search goes on from the best of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from star_elastic.axes.widths import Widths
from star_elastic.cost.count import CostModel
from star_elastic.nesting.gate import Mixture
from star_elastic.router.budget import AIM, Budgets, overspent
from star_elastic.router.grid import Grid, complete_widths

EXHAUSTIVE = 200_000
"""Combinations of widths up to this many are counted one and all."""
BEAM = 64
ROUND = 50_000
"""Combinations that a round of a beam search counts, about."""
PRICES = 64
"""Prices of a sweep, each twice the one before, around the one that moves a place by a half."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Combinations of choices, by position on the grid (n, places), with what speaks for each:
    the relative distance to the budgets `misses` (n,), `log_probs` (n,), and the number of places
    `moves` (n,) that differ from the router's own choice."""

    positions: torch.Tensor
    misses: torch.Tensor
    log_probs: torch.Tensor
    moves: torch.Tensor

    def best(self, count: int = 1) -> list[int]:
        """Rows, best first: budgets met, then the most probable; or else the nearest to them."""
        met = self.misses <= AIM
        order = torch.arange(len(self.misses))
        # Sorted by the least important key first; sorts are stable.
        for key in (self.misses, self.moves, torch.where(met, -self.log_probs, self.misses), ~met):
            order = order[key[order].to(torch.float64).argsort(stable=True)]
        return order[:count].tolist()

    def rows(self, chosen: Sequence[int]) -> Scored:
        """Some of the rows."""
        return Scored(
            self.positions[chosen], self.misses[chosen], self.log_probs[chosen], self.moves[chosen]
        )

    def key(self) -> tuple[bool, float]:
        """What the best row is worth, the first of a sorted `Scored`."""
        met = bool(self.misses[0] <= AIM)
        return not met, float(-self.log_probs[0] if met else self.misses[0])


class Search:
    """Scores combinations of choices against budgets, many at a time.

    `log_probs` holds for every place of the grid how likely each of its choices is (choices,).
    """

    def __init__(
        self, grid: Grid, budgets: Budgets, cost: CostModel, log_probs: Sequence[torch.Tensor]
    ):
        self.grid, self.budgets, self.cost, self.log_probs = grid, budgets, cost, log_probs
        self.places = grid.places
        self.choices = [grid.choices[place.axis] for place in self.places]
        self.start = torch.tensor([int(values.argmax()) for values in log_probs])

    @classmethod
    def of(cls, picks: Sequence[Mixture], grid: Grid, budgets: Budgets, cost: CostModel) -> Search:
        """The search for a router's decision."""
        likely = [pick.probs.detach().cpu().double() for pick in picks]
        return cls(grid, budgets, cost, [probs.clamp_min(1e-30).log() for probs in likely])

    @classmethod
    def indifferent(cls, grid: Grid, budgets: Budgets, cost: CostModel) -> Search:
        """The search for whom all widths are equally likely."""
        sizes = [len(grid.choices[place.axis]) for place in grid.places]
        return cls(grid, budgets, cost, [torch.zeros(size, dtype=torch.float64) for size in sizes])

    def score(self, positions: torch.Tensor) -> Scored:
        """Exact cost of every row of positions."""
        misses = self._overspent(positions).abs().amax(0)
        log_probs = torch.zeros(len(positions), dtype=torch.float64)
        for i, values in enumerate(self.log_probs):
            log_probs += values[positions[:, i]]
        return Scored(positions, misses, log_probs, (positions != self.start).sum(1))

    def _overspent(self, positions: torch.Tensor) -> torch.Tensor:
        """Relative distances to the budgets (budgets, n), above zero where a row costs more."""
        columns = [
            torch.tensor(choices, dtype=torch.float64)[positions[:, i]]
            for i, choices in enumerate(self.choices)
        ]
        values = overspent(self.grid.widths(columns), self.budgets, self.cost)
        rows = [torch.as_tensor(value).double().expand(len(positions)) for value in values]
        return torch.stack(rows)

    def widths(self, positions: torch.Tensor) -> Widths:
        """The widths at one row of positions."""
        chosen = [choices[p] for choices, p in zip(self.choices, positions.tolist(), strict=True)]
        return complete_widths(self.grid, chosen, self.cost.axis_map)

    def within(self, radius: int) -> Scored:
        """Combinations within `radius` steps of the router's own choice on every place, best
        first: all of them, or those that the search finds."""
        return self.among([
            range(max(at - radius, 0), min(at + radius + 1, len(choices)))
            for at, choices in zip(self.start.tolist(), self.choices, strict=True)
        ])  # fmt: skip

    def anywhere(self) -> Scored:
        """Combinations of the whole grid, best first: all of them, or those the search finds."""
        return self.among([range(len(choices)) for choices in self.choices])

    def among(self, allowed: Sequence[Sequence[int]]) -> Scored:
        """Combinations of the allowed positions of every place, best first."""
        if math.prod(map(len, allowed)) <= EXHAUSTIVE:
            scored = self.every(allowed)
            return scored.rows(scored.best(BEAM))
        return self.beam(allowed, torch.cat([self.sweep(allowed), self.thinned(allowed)]))

    def nearest(self) -> tuple[float, torch.Tensor]:
        """The smallest miss that is found for any combination, however unlikely, and its positions
        (places,).

        Where layers decide for themselves, first for widths that are the same in all layers.
        """
        seeds = self.score(self.thinned([range(len(choices)) for choices in self.choices]))
        if self.grid.per_layer and seeds.misses.min() > AIM:
            blind = Search.indifferent(self.grid, self.budgets, self.cost)
            seeds = blind.anywhere()
        best = int(seeds.misses.argmin())
        return float(seeds.misses[best]), seeds.positions[best]

    def every(self, allowed: Sequence[Sequence[int]]) -> Scored:
        """All combinations of the allowed positions."""
        positions = torch.cartesian_prod(*(torch.tensor(list(options)) for options in allowed))
        return self.score(positions.reshape(-1, len(allowed)))

    def sweep(self, allowed: Sequence[Sequence[int]]) -> torch.Tensor:
        """The router's own choice, and the likeliest positions at each price (prices + 1, places).

        What a choice costs is counted from the router's own choice, one place at a time, and
        weighs as much as the budget is overspent there (negative where it is not used up).
        """
        rows = [self.start]
        for place, options in enumerate(allowed):
            for option in options:
                rows.append(self.start.clone())
                rows[-1][place] = option
        distances = self._overspent(torch.stack(rows))
        need, saved = distances[:, 0], distances[:, :1] - distances
        worth = (need[:, None] * saved).sum(0)[1:].split([len(options) for options in allowed])
        largest = max(float(torch.cat(worth).abs().max()), 1e-12)
        prices = 2.0 ** torch.arange(-PRICES // 2, PRICES // 2) / largest
        chosen = []
        for place, (options, gain) in enumerate(zip(allowed, worth, strict=True)):
            likely = self.log_probs[place][list(options)]
            best = (likely + prices[:, None] * gain).argmax(1)
            chosen.append(torch.tensor(list(options))[best])
        return torch.cat([self.start[None], torch.stack(chosen, 1)]).unique(dim=0)

    def thinned(self, allowed: Sequence[Sequence[int]]) -> torch.Tensor:
        """The best combinations (n, places), and the nearest to the budgets, of those that are the
        same in all layers; if there are too many, of every second one, fourth one and so on."""
        axes = list(self.grid.choices)
        column = torch.tensor([axes.index(place.axis) for place in self.places])
        likely = [torch.zeros(len(choices)).double() for choices in self.grid.choices.values()]
        kept = [set(range(len(choices))) for choices in self.grid.choices.values()]
        for place, axis in enumerate(column.tolist()):
            likely[axis] = likely[axis] + self.log_probs[place]
            kept[axis] &= set(allowed[place])
        options = [sorted(positions) for positions in kept]
        if not all(options):
            return self.start[None]
        while math.prod(map(len, options)) > EXHAUSTIVE:
            longest = max(range(len(options)), key=lambda axis: len(options[axis]))
            options[longest] = sorted({*options[longest][::2], options[longest][-1]})
        alike = Search(replace(self.grid, per_layer={}), self.budgets, self.cost, likely)
        scored = alike.every(options)
        chosen = [*scored.best(BEAM), int(scored.misses.argmin())]
        return scored.positions[chosen][:, column]

    def beam(self, allowed: Sequence[Sequence[int]], seeds: torch.Tensor) -> Scored:
        """The best combinations that changes lead to from `seeds`: of one place in every round, and
        where these do not help any more, of two places at once."""
        changes = [(place, to) for place, options in enumerate(allowed) for to in options]
        pairs = [(a, b) for a, b in itertools.combinations(changes, 2) if a[0] != b[0]]
        singly = [(change,) for change in changes]
        beam = self.score(seeds)
        beam = beam.rows(beam.best(BEAM))
        for _ in range(2 * len(allowed)):
            for moves in (singly, pairs):
                rows = beam.positions[: max(ROUND // max(len(moves), 1), 1)]
                moved = torch.cat([rows, *(_change(rows, move) for move in moves)])
                scored = self.score(moved.unique(dim=0))
                last, beam = beam, scored.rows(scored.best(BEAM))
                if beam.key() < last.key():
                    break
            else:
                break
        return beam


def _change(rows: torch.Tensor, moves: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Rows of positions with some places put elsewhere."""
    changed = rows.clone()
    for place, to in moves:
        changed[:, place] = to
    return changed
