"""How plans look: as plain data, and as the tables that say the same to people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from star_elastic.axes import LAYERS, Width, Widths
from star_elastic.cli.sizes import width_text
from star_elastic.cost.amounts import show_amount
from star_elastic.tables import Table

if TYPE_CHECKING:
    from star_elastic.router.plan import Plan, Planner

STATES = {"key_value": "KV cache", "ssm": "SSM states", "conv": "conv states"}


@dataclass(frozen=True, slots=True)
class Known:
    """A size that a family has, or its router would give."""

    name: str
    origin: Mapping[str, bool]
    plan: Plan


class Told:
    """A plan in numbers and in words."""

    def __init__(self, planner: Planner, limits: Mapping[str, float], found: Plan):
        self.planner, self.limits, self.found = planner, limits, found
        self.axis_map, self.full = planner.cost.axis_map, planner.cost.full

    def axes_known(self) -> dict[str, list[str]]:
        """The axes whose importance was measured, and the others."""
        is_known = self.planner.objective.is_measured
        axes = list(self.planner.grid.choices)
        return {
            "measured": [axis for axis in axes if axis != LAYERS and is_known(axis)],
            "assumed": [axis for axis in axes if axis == LAYERS or not is_known(axis)],
        }

    def json(self, plan: Plan) -> dict[str, Any]:
        """A plan as plain data; amounts in bytes, parameters and milliseconds per token."""
        cost, memory, ms = plan.cost, plan.memory, plan.cost.ms
        return {
            "widths": dict(plan.widths), "fits": plan.fits(self.limits),
            "total": cost.total, "active": cost.active,
            "memory": {
                "weights": memory.weights, "fp32_weights": memory.fp32_weights,
                "buffers": memory.buffers, "states": dict(memory.states), "total": memory.total,
                "left": self.limits["bytes"] - memory.total,
            },
            "lost": plan.mean_lost,
            "ms": ms, "tokens_per_second": None if ms is None else 1e3 / ms,
        }  # fmt: skip

    def cut(self, plan: Plan) -> str:
        """The widths of the axes that are cut, as options and run configs take them."""
        full = self.axis_map.full
        return str(Widths({a: width for a, width in plan.widths.items() if width != full[a]}))

    def given_up(self) -> dict[str, dict[str, Any]]:
        """For every axis that can be or is cut: the parent's width, the plan's, the share of units
        kept and that of importance lost; then of all parameters."""
        found = {}
        for axis, lost in self.found.lost.items():
            parent, chosen = self._units(self.axis_map.full, axis), self.found.widths[axis]
            kept = self._units(self.found.widths, axis) / parent
            if axis == LAYERS:
                chosen = round(kept * parent)
            found[axis] = {"parent": parent, "plan": chosen, "kept": kept, "lost": lost}
        for name in ("total", "active"):
            parent, own = getattr(self.full, name), getattr(self.found.cost, name)
            found[name] = {"parent": parent, "plan": own, "kept": own / parent, "lost": None}
        return found

    def _units(self, widths: Mapping[str, Width], axis: str) -> float:
        """How many units there are on an axis, of all layers on average."""
        if axis == LAYERS:
            return len(self.axis_map.kept_layers(widths))
        width = widths[axis]
        return sum(width) / len(width) if isinstance(width, tuple) else width

    def widths_table(self, name: str) -> Table:
        """What was given up."""
        load = self.planner.cost.workload
        known = self.axes_known()["measured"]

        def lost(axis: str, share: float | None) -> str:
            return "" if share is None else f"{share:.2%}" + " (assumed)" * (axis not in known)

        rows = [
            [axis, f"{own['parent']:,}",
             width_text(own["plan"]) if isinstance(own["plan"], tuple) else f"{own['plan']:,}",
             f"{own['kept']:.1%}", lost(axis, own["lost"])]
            for axis, own in self.given_up().items()
        ]  # fmt: skip
        limit = show_amount(self.limits["bytes"], "bytes")
        if "ms" in self.limits:
            limit += f" and {1e3 / self.limits['ms']:.4g} tokens/s"
        title = f"{name}  in {limit}, context {load.context:,} x batch {load.batch:,}"
        return Table(title, ["", "parent", "plan", "kept", "importance lost"], rows)

    def certificate(self) -> Table:
        """Every byte."""
        memory, load = self.found.memory, self.planner.cost.workload
        parts = {
            f"weights, {load.dtype_bytes} bytes each": memory.weights,
            f"weights kept in {load.fp32_bytes} bytes each": memory.fp32_weights,
            "buffers": memory.buffers,
            **{STATES.get(kind, kind): held for kind, held in memory.states.items()},
        }
        limit = self.limits["bytes"]
        total = {"together": memory.total, "left": limit - memory.total}
        rows = [
            [name, f"{held:,.0f}", f"{held / limit:.1%}"]
            for name, held in {**{n: h for n, h in parts.items() if h}, **total}.items()
        ]
        return Table("memory, without activations", ["", "bytes", "of the limit"], rows)

    def comparison(self, title: str, plans: Sequence[tuple[str, Plan | None]]) -> Table:
        """Plans side by side: memory beside what they lose."""
        rows = []
        for name, plan in plans:
            if plan is None:
                rows.append([name, "nothing fits", *[""] * 6])
                continue
            cost, ms = plan.cost, plan.cost.ms
            rows.append([
                name, show_amount(plan.memory.total, "bytes"),
                "yes" if plan.fits(self.limits) else "no",
                f"{cost.total / self.full.total:.1%}", f"{cost.active / self.full.active:.1%}",
                f"{plan.mean_lost:.2%}", "" if ms is None else f"{1e3 / ms:.4g}",
                self.cut(plan) or "the parent",
            ])  # fmt: skip
        columns = ["", "memory", "fits", "total", "active", "lost", "tokens/s", "widths"]
        if self.full.ms is None:  # no speeds are known
            place = columns.index("tokens/s")
            columns, *rows = ([*row[:place], *row[place + 1 :]] for row in (columns, *rows))
        return Table(title, columns, rows)
