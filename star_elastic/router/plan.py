"""Plans: the best widths that fit a limit, and what stands around them.

Limits are amounts (bytes of memory, milliseconds per token) that may not be passed. The search is
the router's (`search.py`), over the same grid and with the same exact counts; the objective is what
a cut loses (`objective.py`). Nothing here knows files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from star_elastic.axes.widths import Widths
from star_elastic.cost.amounts import show_amount
from star_elastic.cost.count import Cost, CostModel, Memory, Workload
from star_elastic.errors import BudgetError
from star_elastic.router.budget import Limits
from star_elastic.router.grid import Grid
from star_elastic.router.objective import Objective
from star_elastic.router.search import best_within

NEAR = (0.5, 0.75, 0.9, 1.1, 1.25, 1.5)
"""Shares of a plan's memory at which its neighbours are looked for."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Some widths, what they cost, and the share of importance that they lose: on every axis that
    can be or is cut, and as the mean over those that can be (`mean_lost`), by which plans are
    compared."""

    widths: Widths
    cost: Cost
    memory: Memory
    lost: Mapping[str, float]
    mean_lost: float

    def fits(self, limits: Limits) -> bool:
        """Whether it costs no more than the limits."""
        return all(self.cost.metric(metric) <= limit for metric, limit in limits.items())


@dataclass(frozen=True, slots=True)
class Neighbour:
    """What another limit or workload would give; no `plan` where nothing fits."""

    name: str
    plan: Plan | None


@dataclass(frozen=True)
class Planner:
    """Plans over one grid, by one objective."""

    grid: Grid
    cost: CostModel
    objective: Objective

    def describe(self, widths: Mapping) -> Plan:
        """Given widths as a plan. Raises ShapeError for widths that cannot be."""
        complete = self.cost.axis_map.complete(widths)
        whole = self.objective.lost(complete)
        lost = {a: share for a, share in whole.items() if share or a in self.grid.choices}
        mean = sum(lost.values()) / max(len(self.grid.choices), 1)
        return Plan(complete, self.cost.count(complete), self.cost.memory(complete), lost, mean)

    def best(self, limits: Limits) -> Plan:
        """The plan that loses least of those within the limits: the parent if it is. Raises
        BudgetError, which says the least that there is, if nothing is within them."""
        whole = self.describe({})
        if whole.fits(limits):
            return whole
        least = self.describe(self.grid.narrowest())
        if not least.fits(limits):
            raise BudgetError(self._too_small(least, limits))
        scores = self.objective.grid_scores(self.grid)
        found = self.describe(best_within(self.grid, self.cost, limits, scores).widths)
        assert found.fits(limits), (found.widths, limits)
        return found

    def _too_small(self, least: Plan, limits: Limits) -> str:
        """What the narrowest widths cost, and what to do."""
        load, memory = self.cost.workload, least.memory
        if least.cost.bytes > limits.get("bytes", least.cost.bytes):
            return (
                f"{show_amount(limits['bytes'], 'bytes')} is too little for any size of these "
                f"choices: the smallest takes {memory.total:,} bytes ({memory.weight_bytes:,} of "
                f"weights, {memory.state_bytes:,} of states at context {load.context:,} x batch "
                f"{load.batch:,}); give more memory, less context or batch, or a smaller parent"
            )
        return (
            f"no size of these choices needs at most {limits['ms']:.4g} ms per token: the smallest "
            f"needs {least.cost.ms:.4g}; ask for fewer tokens per second, or take a smaller parent"
        )

    def neighbours(self, plan: Plan, limits: Limits) -> Iterator[Neighbour]:
        """Plans of less and of more memory, next to the given one; then those of the same limits
        at twice the context and twice the batch. Those with the same widths as the one before are
        left out."""
        rows = [
            (share, self._found({**limits, "bytes": share * plan.memory.total})) for share in NEAR
        ]
        seen = [plan.widths]
        for share, found in rows:
            if found is not None and found.widths not in seen:
                seen.append(found.widths)
                yield Neighbour(f"memory x {share:g}", found)
        load = self.cost.workload
        twice = {
            f"context {2 * load.context:,}": replace(load, context=2 * load.context),
            f"batch {2 * load.batch:,}": replace(load, batch=2 * load.batch),
        }
        for name, more in twice.items():
            if more != load:
                yield Neighbour(name, self._with(more)._found(limits))

    def _with(self, load: Workload) -> Planner:
        return replace(self, cost=self.cost.at(load))

    def _found(self, limits: Limits) -> Plan | None:
        try:
            return self.best(limits)
        except BudgetError:
            return None
