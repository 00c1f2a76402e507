"""What a run config means for its parent: all that can be said, and refused, before work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from star_elastic.architectures import ModelConfig, read_config
from star_elastic.architectures.config_file import Config
from star_elastic.axes import AxisMap
from star_elastic.axes.widths import parse_widths
from star_elastic.checkpoints.companions import LATENCY
from star_elastic.checkpoints.elastic import ElasticCheckpoint
from star_elastic.checkpoints.layouts import CONFIG_KEY, stored_map
from star_elastic.checkpoints.manifest import Manifest, Size, require_order
from star_elastic.checkpoints.stored import StoredModel, most_common_dtype
from star_elastic.cost.amounts import parse_budget, show_amount
from star_elastic.cost.count import CostModel
from star_elastic.cost.latency import LatencyTable, load_table
from star_elastic.errors import BudgetError, ConfigError
from star_elastic.files.paths import exists, is_file
from star_elastic.models.load import require_loadable
from star_elastic.models.model_config import longest_context, require_context
from star_elastic.models.model_config import model_config as transformers_config
from star_elastic.nesting.rotate import check_rotatable
from star_elastic.quant.scheme import Scheme, make_scheme
from star_elastic.router.budget import REACH, Budgets, budget_miss, describe
from star_elastic.router.commit import Commitment
from star_elastic.router.grid import Grid, default_choices, make_grid, rank_grid
from star_elastic.router.reach import check_budgets, check_reach
from star_elastic.strict import require
from star_elastic.train.config import CalibrationConfig, RunConfig
from star_elastic.train.state import has_state


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What a run config means for its parent: the parent's config and table, grid, costs, budgets
    as fractions of them, widths that are given, and the dtypes that its tensors are stored in."""

    model_config: ModelConfig
    grid: Grid
    cost: CostModel
    budgets: Mapping[str, Mapping[str, float]]
    fixed: Mapping[str, Commitment]
    dtypes: Mapping[str, torch.dtype]
    scheme: Scheme | None = None

    @property
    def axis_map(self) -> AxisMap:
        """The parent's table."""
        return self.model_config.axis_map

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the parent's weights are stored in, and the family's will be."""
        return most_common_dtype(self.dtypes, self.axis_map)

    def ranked_grid(self, depth: tuple[int, ...]) -> Grid:
        """The router's grid, once the layers are ranked. Raises BudgetError for budgets and
        ConfigError for numbers of layers that this ranking cannot meet."""
        if self.grid.is_ranked:
            return self.grid
        grid = rank_grid(self.grid, depth, self.axis_map)
        for name, given in self.budgets.items() if not self.fixed else ():
            check_budgets(name, given, self.cost, grid)
        return grid


def check(config: RunConfig, world_size: int = 1) -> RunSpec:
    """Checks a run config against its parent's config.json and the headers of its weights.

    Raises ConfigError, ShapeError, BudgetError or CheckpointError for whatever would go wrong.
    """
    model_config, manifest, grid = read_parent(config)
    axis_map = model_config.axis_map
    stored = StoredModel(Path(config.parent), axis_map, model_config.architecture)
    stored.require_whole()
    require_loadable(Path(config.parent), model_config)
    require_context(transformers_config(model_config), **_lengths(config))
    if config.calibration.basis == "principal":
        check_rotatable(axis_map)
    table = load_table(latency_file(config), axis_map) if config.latency else None
    if table and any("ms" in budgets for budgets in config.sizes.values()):
        require_covered(table, grid)
    cost = CostModel(axis_map, config.workload, table.milliseconds if table else None)
    budgets = _shares(config, cost)
    require_order(budgets)
    given = {
        name: Size(axis_map.complete(parse_widths(text)), widths_from="config")
        for name, text in config.router.fixed.items()
    }
    if manifest:
        given = {name: manifest.size(name) for name in budgets}
    fixed = {name: _fixed(name, size, budgets[name], cost) for name, size in given.items()}
    scheme = None
    if config.quant.format:
        scheme = make_scheme(axis_map, config.quant.format, config.quant.keep)
        for size in fixed.values():
            axis_map.at(size.widths)  # one width per axis
            stored_map(axis_map, scheme).require_edges(size.widths)
    for name, own in budgets.items() if not fixed else ():
        (check_budgets if grid.is_ranked else check_reach)(name, own, cost, grid)
    _require_shared(config, world_size)
    return RunSpec(model_config, grid, cost, budgets, fixed, stored.dtypes, scheme)


def _shares(config: RunConfig, cost: CostModel) -> dict[str, dict[str, float]]:
    """The sizes' budgets as fractions of the parent's cost. Raises ConfigError for more than all of
    it."""
    shares: dict[str, dict[str, float]] = {}
    for name, budgets in config.sizes.items():
        shares[name] = {}
        for metric, amount in budgets.items():
            whole = cost.full.metric(metric)
            share = parse_budget(amount, metric, f"sizes.{name}.").fraction_of(whole)
            require(
                share <= 1,
                f"sizes.{name}.{metric}={amount!r} is more than the parent's "
                f"{show_amount(whole, metric)}; lower it, or write 1.0 for all of the parent",
            )
            shares[name][metric] = share
    return shares


def _require_shared(config: RunConfig, world_size: int) -> None:
    """Raises ConfigError unless so many ranks can share the windows of a step."""
    for number, stage in enumerate(config.stages):
        of_group = stage.batch_size // stage.groups
        if of_group % world_size:
            raise ConfigError(
                f"stages[{number}].batch_size={stage.batch_size} in {stage.groups} groups cannot "
                f"be shared by {world_size} ranks; start as many as divide {of_group}, or use a "
                f"multiple of {stage.groups * world_size} in another run"
            )
    if world_size > 1 and config.engine.workers > 1:
        raise ConfigError(
            f"engine.workers={config.engine.workers} threads on {world_size} ranks; use 1 worker"
        )


def read_parent(config: RunConfig) -> tuple[ModelConfig, Manifest | None, Grid]:
    """The parent's config, the family that the run trains on from, if any, and the grid
    of widths to choose from. Raises ConfigError, ShapeError or CheckpointError."""
    for key in ("parent", "family"):
        path = getattr(config, key)
        if path and not exists(path):
            raise ConfigError(
                f"{key}={path!r} does not exist; name a directory on this machine (a model of a "
                "hub is downloaded first: hf download NAME --local-dir DIRECTORY)"
            )
    model_config = read_config(config.parent)
    axis_map = model_config.axis_map
    if model_config.get(CONFIG_KEY):
        raise ConfigError(f"{config.parent} is quantised; train on the checkpoint it was made from")
    manifest = _family(config, axis_map) if config.family else None
    asked = manifest or config
    choices = dict(asked.choices) or default_choices(axis_map)
    depth = manifest.depth if manifest else ()
    grid = make_grid(choices, axis_map, per_layer=asked.per_layer, depth=depth)
    return model_config, manifest, grid


def require_covered(table: LatencyTable, grid: Grid) -> None:
    """Raises ConfigError unless a latency table was measured over all of a grid: where it was not,
    widths would seem to cost nothing, or less than nothing."""
    for axis, choices in grid.choices.items():
        for measured in [table.fixed, *table.parts.values()]:
            if axis not in measured.axes or len(choices) == 1:
                continue
            points = measured.points[measured.axes.index(axis)]
            if points[0] > choices[-1] or points[-1] < choices[0]:
                raise ConfigError(
                    f"the latency table covers {axis} from {points[0]} to {points[-1]}, and the "
                    f"choices reach from {choices[-1]} to {choices[0]}; measure one for this run: "
                    "star-elastic latency --for RUN.toml --out TABLE.json"
                )


def _positions_of(model_config: Config) -> int | None:
    """The positions that a model was made for, if it has any."""
    # transformers' own class knows the default of its model type.
    return longest_context(transformers_config(model_config))


def ranking_context(config: RunConfig, model_config: Config) -> int:
    """Tokens at which rows are cut for ranking: as the config says, but no more than the parent has
    positions."""
    asked = config.calibration.context
    return min(asked, _positions_of(model_config) or asked)


def beyond_positions(config: RunConfig, model_config: ModelConfig) -> list[str]:
    """A line for every length of text in the config that is beyond the positions that the parent
    was made for. It runs there (positions are rotary or come from Mamba layers), but untrained, and
    no text as long as that is ever generated."""
    most = _positions_of(model_config)
    return [
        f"{name}={length:,} is beyond the {most:,} positions of the parent, which was not trained "
        "on longer texts; lower it"
        for name, length in _lengths(config).items()
        if most is not None and length > most
    ]


def _lengths(config: RunConfig) -> dict[str, int]:
    """The lengths of text in a config, by their keys; but for a default, which nobody asked for and
    which is cut to what the parent reads (`ranking_context`)."""
    lengths = {f"stages[{n}].context": stage.context for n, stage in enumerate(config.stages)}
    if config.calibration.context != CalibrationConfig().context:
        lengths["calibration.context"] = config.calibration.context
    return lengths


def _family(config: RunConfig, axis_map: AxisMap) -> Manifest:
    """The family to train on from. Raises ConfigError unless it is one of this parent's."""
    family = ElasticCheckpoint(config.family)
    if family.is_quantised:
        raise ConfigError(f"{config.family} is quantised; train on the family it was made from")
    if family.axis_map.tensors != axis_map.tensors:
        raise ConfigError(
            f"{config.family} is not a family of {config.parent}: its tensors are others; name the "
            "parent it was made from"
        )
    StoredModel(family.path, axis_map, family.config.architecture).require_whole()
    return family.manifest


def latency_file(config: RunConfig) -> Path:
    """The latency table: a run that has begun keeps its own copy."""
    own = Path(config.out) / LATENCY
    return own if is_file(own) and has_state(Path(config.out)) else Path(config.latency)


def _fixed(name: str, size: Size, budgets: Budgets, cost: CostModel) -> Commitment:
    """Widths that the config or the family gives. Raises BudgetError if they are far from their
    budget."""
    miss = float(budget_miss(size.widths, budgets, cost))
    if miss > REACH:
        counted = cost.count(size.widths)
        costs = describe({m: counted.metric(m) / cost.full.metric(m) for m in budgets})
        raise BudgetError(
            f"router.fixed.{name} costs {costs}, which misses {describe(budgets)} by {miss:.1%}; "
            "change the widths or the budget"
        )
    return Commitment(
        size.widths, miss, size.repair, argmax=size.argmax,
        data_free_steps=size.data_free_steps, widths_from=size.widths_from,
    )  # fmt: skip
