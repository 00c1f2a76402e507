"""`star-elastic plan`: from what a user has to the best widths that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Option

from star_elastic.architectures import ModelConfig
from star_elastic.axes import AxisMap
from star_elastic.bundled import name_of
from star_elastic.checkpoints.companions import is_elastic
from star_elastic.cli.count import read_countable
from star_elastic.cli.options import AsJson, Batch, DtypeBytes, Model, SsmDtypeBytes
from star_elastic.cli.plan_tables import Known, Told
from star_elastic.cli.terminal import show
from star_elastic.cost.amounts import parse_bytes
from star_elastic.cost.count import CostModel, Workload
from star_elastic.cost.latency import LatencyTable, load_table
from star_elastic.errors import ConfigError
from star_elastic.files.paths import is_folder
from star_elastic.strict import MOST_TOKENS
from star_elastic.tables import Table

if TYPE_CHECKING:
    from star_elastic.checkpoints.elastic import ElasticCheckpoint
    from star_elastic.router.objective import Kept

DEFAULT_CONTEXT = 4096
SCORES = "scores.safetensors"
"""What the scores of a run are called in its directory."""


def plan(
    model: Model,
    memory: str = Option(help="What weights and states may take: 16GB (10^9), 24GiB (2^30)."),
    context: int | None = Option(
        None,
        min=0,
        max=MOST_TOKENS,
        help="Tokens of each sequence; by default 4096, or as many as the model has positions for.",
    ),
    batch: Batch = 1,
    tokens_per_second: float | None = Option(
        None, help="And the least speed of each sequence; needs a latency table.", min=1e-6, max=1e9
    ),
    latency: Path | None = Option(
        None, help="Table of star-elastic latency; by default the family's own."
    ),
    importance: Path | None = Option(
        None, help="Scores of star-elastic rank, or a run's directory that has them."
    ),
    dtype_bytes: DtypeBytes = 2,
    ssm_dtype_bytes: SsmDtypeBytes = 4,
    as_json: AsJson = False,
) -> None:
    """The best widths that fit a memory, with the bytes of all that they hold; needs no weights.

    Of a parent, widths from full to half are tried, of a family its own choices. Not counted: the
    activations of a step, what an allocator reserves, and a GPU's own context.
    """
    limits: dict[str, float] = {"bytes": parse_bytes(memory, "--memory")}
    if tokens_per_second is not None:
        limits["ms"] = 1e3 / tokens_per_second
    config = read_countable(model)
    if context is None:
        context = min(DEFAULT_CONTEXT, positions(config) or DEFAULT_CONTEXT)
    load = Workload(context, batch, dtype_bytes, ssm_dtype_bytes)
    asked = _Asked(model, config, limits, load)
    asked.read(latency, importance)
    show(as_json, *asked.answer())


def positions(config: ModelConfig) -> int | None:
    """The positions that a model was made for, if its config says so."""
    most = config.get("max_position_embeddings")
    return most if isinstance(most, int) and most > 0 else None


class _Asked:
    """What a user has and asks for, read from files; and the answer to it."""

    def __init__(
        self, model: Path, config: ModelConfig, limits: Mapping[str, float], load: Workload
    ):
        self.model, self.config, self.limits, self.load = model, config, limits, load
        self.name = name_of(model)
        self.family: ElasticCheckpoint | None = None
        self.notes: list[str] = []
        most = positions(config)
        if most is not None and load.context > most:
            self.notes.append(
                f"context {load.context:,} is beyond the {most:,} positions of the model, which "
                "was not trained on longer texts"
            )

    @property
    def axis_map(self) -> AxisMap:
        """The table of the model at full width."""
        return self.config.axis_map

    def read(self, latency: Path | None, importance: Path | None) -> None:
        """Reads all files. Raises ConfigError or CheckpointError for what cannot be used."""
        from star_elastic.checkpoints.elastic import ElasticCheckpoint
        from star_elastic.router.files import family_grid
        from star_elastic.router.grid import default_choices, make_grid
        from star_elastic.router.objective import Objective
        from star_elastic.router.plan import Planner
        from star_elastic.train.check import require_covered

        if is_elastic(self.model):
            self.family = ElasticCheckpoint(self.model, self.config)
            if self.family.is_quantised:
                raise ConfigError(
                    f"{self.model} is quantised, and what its codes take depends on the device "
                    "that multiplies them; plan with the family that it was made from"
                )
        if self.family is not None and self.family.manifest.choices:
            grid = family_grid(self.family)
        else:
            grid = make_grid(default_choices(self.axis_map), self.axis_map)
        table = self._table(latency)
        if table is not None:
            require_covered(table, grid)
        scores, self.measured = self._scores(importance)
        cost = CostModel(self.axis_map, self.load, table.milliseconds if table else None)
        self.planner = Planner(grid, cost, Objective(self.axis_map, scores))

    def _table(self, file: Path | None) -> LatencyTable | None:
        """The latency table, if there is one. Raises ConfigError if one is needed, or for times of
        a prefill."""
        if file is not None:
            table = load_table(file, self.axis_map)
        else:
            table = self.family.latency if self.family is not None else None
        if table is None:
            if "ms" in self.limits:
                raise ConfigError(
                    "--tokens-per-second needs a latency table, because speed is measured and not "
                    f"counted; star-elastic latency {self.name} --out TABLE.json makes one for "
                    "--latency TABLE.json"
                )
            return None
        if table.phase != "decode":
            raise ConfigError(
                f"the latency table has the times of a {table.phase}; measure one with --phase "
                "decode"
            )
        if (table.batch, table.context) != (self.load.batch, self.load.context):
            self.notes.append(
                f"milliseconds are those of batch {table.batch:,} at context {table.context:,}, "
                f"with which {table.machine.device} was measured"
            )
        return table

    def _scores(self, given: Path | None) -> tuple[Kept, str]:
        """Scores in the order in which units are kept, and what they were measured on."""
        if given is None:
            return {}, ""
        from star_elastic.importance.files import load_scores
        from star_elastic.importance.orders import orders_from_scores
        from star_elastic.train.fingerprint import digest_weights

        file = given / SCORES if is_folder(given) else given
        scores, info = load_scores(file, self.axis_map)
        measured = f"{file} ({info.num_samples:,} rows of {info.source})"
        orders = orders_from_scores(scores, self.axis_map)
        if self.family is None:
            return {key: scores[key][order] for key, order in orders.items()}, measured
        if info.weights and info.weights == digest_weights(self.model):
            return scores, measured  # units lie in the order in which they are kept
        orders = {**orders, **self.family.orders}
        kept = {key: scores[key][order] for key, order in orders.items()}
        if self.family.basis is not None and kept.pop("hidden", None) is not None:
            self.notes.append(
                "hidden was rotated when the family was made: the parent's scores say nothing of it"
            )
        return kept, measured

    def answer(self) -> tuple[dict[str, Any], *tuple[Table | str, ...]]:
        """All that is found, as plain data, then as tables and lines. Raises BudgetError if nothing
        fits."""
        from star_elastic.router.search import is_exhaustive, num_combinations

        found = self.planner.best(self.limits)
        near = list(self.planner.neighbours(found, self.limits))
        known = self._known()
        count = num_combinations(self.planner.grid)
        if not is_exhaustive(self.planner.grid):
            self.notes.append(
                f"the choices have {count:,} combinations: a beam search, which may miss the best"
            )
        told = Told(self.planner, self.limits, found)
        content = {
            "family": self.axis_map.model_type,
            "limits": dict(self.limits),
            "workload": {name: getattr(self.load, name) for name in self.load.__slots__},
            "objective": {"measured_on": self.measured or None, **told.axes_known()},
            "combinations": count,
            "is_parent": found.widths == self.axis_map.full,
            **told.json(found),
            "given_up": told.given_up(),
            "neighbours": [
                {"name": row.name, "plan": row.plan and told.json(row.plan)} for row in near
            ],
            "known": [{"name": row.name, **row.origin, **told.json(row.plan)} for row in known],
            "notes": self.notes,
        }
        tables = [told.widths_table(self.name), told.certificate()]
        rows = [("this plan", found), *((row.name, row.plan) for row in near)]
        tables.append(told.comparison("neighbours", rows))
        if known:
            own = [(row.name, row.plan) for row in known]
            tables.append(told.comparison("sizes of the family", own))
        lines = [self._objective_line(told), *self._next(told, known)]
        return content, *tables, *lines, *(f"note: {note}" for note in self.notes)

    def _known(self) -> list[Known]:
        """The trained sizes of a family, and what its router says at the largest budget that
        fits."""
        if self.family is None:
            return []
        from star_elastic.router.files import widths_within

        planner = self.planner
        rows = [
            Known(name, {"trained": True}, planner.describe(size.widths))
            for name, size in self.family.manifest.sizes.items()
        ]
        found = widths_within(self.family, lambda w: planner.describe(w).fits(self.limits))
        if found is not None:
            ((metric, share),), widths = found[0].items(), found[1].widths
            said = f"router, {metric}={share:.4g}"
            rows.append(Known(said, {"trained": False}, planner.describe(widths)))
        return rows

    def _objective_line(self, told: Told) -> str:
        if not self.planner.grid.choices:
            return "no axis of this model can be cut"
        known = told.axes_known()
        assumed = ", ".join(known["assumed"])
        falls = f"importance is taken to fall evenly along {assumed}"
        if not self.measured:
            return (
                f"objective: the least mean importance lost; none was measured, so {falls}, and a "
                "cut of a share c loses c^2 (star-elastic rank measures it)"
            )
        more = f"; {falls}" if assumed else ""
        return f"objective: the least mean importance lost, as in {self.measured}{more}"

    def _next(self, told: Told, known: Sequence[Known]) -> list[str]:
        """What to do with the answer."""
        lines, found = [], told.found
        trained = [row for row in known if row.origin["trained"] and row.plan.fits(self.limits)]
        if trained:
            best = min(trained, key=lambda row: row.plan.mean_lost)
            lines.append(
                f"trained: {best.name} loses least of the trained sizes that fit: star-elastic "
                f"slice {self.name} --size {best.name} --out DIR"
            )
        elif known:
            lines.append("trained: no trained size fits")
        if found.widths == self.axis_map.full:
            return [*lines, "the parent itself fits: nothing has to be cut"]
        if self.family is not None:
            if found.widths not in [row.plan.widths for row in trained]:
                widths = told.cut(found)
                lines.append(
                    f"untrained: star-elastic slice {self.name} --widths {widths} --out DIR"
                )
            return lines
        share = found.cost.total / self.planner.cost.full.total
        return [
            *lines,
            f"to train it, in a run config: sizes.planned.total = {share:.4f}, "
            f'router.fixed.planned = "{told.cut(found)}"',
        ]
