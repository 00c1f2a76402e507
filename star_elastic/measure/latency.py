"""Measures the latency table of a model on this machine, and how well it predicts whole models.

Blocks are timed where they work: whole models are built at every point of a grid of widths, and
clocks around their blocks split each step into the time of every kind of block and the rest
(embedding, final norm, LM head, overhead). Blocks alone in a loop find their weights in the
processor's cache, where a whole model does not: their sum was 18 to 42 % too low for a hybrid of
67M parameters that decodes one sequence. One model gives a point of every kind's grid at once, so a
hybrid needs as many models as its largest kind has points. Models are visited in shuffled rounds,
so that a machine that slows down slows all points alike; held-out widths are measured without
clocks in the same rounds.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from star_elastic.architectures.config_file import Config
from star_elastic.axes.widths import Widths
from star_elastic.cost.latency import Grid, LatencyTable, kind_axes, layout_digest
from star_elastic.measure.latency_bench import REST, Bench, ClockedModel, Progress, Setting
from star_elastic.measure.latency_grid import Points, grid_points, grid_widths, random_widths


@dataclass(frozen=True, slots=True)
class Check:
    """A held-out model: milliseconds per token that the table predicts, and that it takes."""

    widths: Widths
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the prediction; positive if it is too high."""
        return self.predicted / self.measured - 1


def measure(
    config: Config,
    setting: Setting,
    *,
    choices: Mapping[str, Sequence[int]] | None = None,
    num_checks: int = 6,
    progress: Progress | None = None,
) -> tuple[LatencyTable, list[Check]]:
    """The latency table of a model, and its predictions at held-out widths beside their times.

    The grid spans the `choices` of the axes that have any (an elastic checkpoint's) and leaves
    others at full width; without choices every axis goes from half to full width. Raises
    ConfigError for a config that no architecture serves.
    """
    bench = Bench(config, setting)
    points = grid_points(bench.axis_map, choices)
    models = [bench.model(widths, clocked=True) for widths in grid_widths(bench.axis_map, points)]
    held_out = random_widths(bench.axis_map, points, num_checks, setting.seed)
    checked = [bench.model(widths, clocked=False) for widths in held_out]
    bench.run([*models, *checked], progress)
    table = _table(bench, points, models)
    return table, [_check(table, model) for model in checked]


def _check(table: LatencyTable, model: ClockedModel) -> Check:
    built = model.bench.widths(model.widths)
    predicted = table.milliseconds(built, model.bench.axis_map)
    return Check(model.widths, predicted, model.milliseconds)


def _table(bench: Bench, points: Points, models: Sequence[ClockedModel]) -> LatencyTable:
    """What was measured at every point of every grid: the median over the models that have it."""
    axis_map, setting = bench.axis_map, bench.setting
    splits = [model.split() for model in models]

    def grid(axes: tuple[str, ...], kind: str) -> Grid:
        times: dict[tuple, list[float]] = defaultdict(list)
        for model, split in zip(models, splits, strict=True):
            times[tuple(model.widths[axis] for axis in axes)].append(split[kind])
        shape = tuple(points[axis] for axis in axes)
        medians = (statistics.median(times[at]) for at in itertools.product(*shape))
        return Grid(axes, shape, tuple(medians))

    first = {kind: bench.kinds.index(kind) for kind in bench.kinds}
    shared = tuple(name for name in points if axis_map.axes[name].is_global)
    return LatencyTable(
        family=axis_map.model_type,
        full={name: axis.size for name, axis in axis_map.axes.items()},
        layers=bench.kinds,
        digest=layout_digest(axis_map),
        machine=setting.machine,
        dtype=str(setting.dtype).removeprefix("torch."),
        phase=setting.phase,
        batch=setting.batch,
        context=setting.context,
        parts={kind: grid(kind_axes(axis_map, layer), kind) for kind, layer in first.items()},
        fixed=grid(shared, REST),
    )
