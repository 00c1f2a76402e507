"""Which plans are worth having: accuracy against time and against counted cost."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from star_elastic.errors import ConfigError
from star_elastic.evaluate.accuracy import Evaluation, Kind

FRONT, REFERENCE = "#8a8a8a", "#1f6fb4"
KINDS: dict[Kind, tuple[str, str, str]] = {
    "single": ("o", "#1f6fb4", "one size"),
    "pair": ("D", "#d9730d", "think > answer"),
    "policy": ("^", "#3a9a5b", "small ~ large, by difficulty"),
}
"""Marker, colour and name of every kind of plan."""
LABELS_SAY = (
    "a>b: a thinks, b answers   a~b 5%: b writes 5 % of the tokens, where a is unsure   "
    "@64: at most 64 tokens of thinking   bold: on the Pareto front"
)
LABEL_SIZE = 7.5
MAX_LABELLED = 40
"""Results of which all are labelled; of more only those on a front."""
LABEL_OFFSETS = [
    (dx, dy, align)
    for distance in (1, 2, 3)
    for dx, dy, align in (
        (-6, 3 * distance, "right"),
        (6, -8 * distance, "left"),
        (6, -2.5, "left"),
        (-6, -2.5, "right"),
        (6 * distance, 5 * distance, "left"),
        (-6 * distance, -10 * distance, "right"),
        (12 * distance, -2.5, "left"),
        (-12 * distance, -2.5, "right"),
        (0, 10 * distance, "center"),
        (0, -16 * distance, "center"),
    )
]
"""Places to try for a label, in points from its marker, best first."""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, accuracy) points that no other beats, by rising cost.

    A point is beaten by one that costs no more and is no less accurate, and better in one of the
    two; of equal points the first is kept.
    """
    front: list[int] = []
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def plot_pareto(
    results: Sequence[Evaluation],
    file: str | Path,
    *,
    title: str = "",
    reference: Collection[str] = (),
) -> None:
    """Two panels as one PNG: accuracy against seconds, and against operations, per problem.

    Single sizes are circles, pairs diamonds, choices by difficulty triangles; the front is a line
    and its points are always labelled, other points where a label fits. The results labelled as in
    `reference` have a front of their own. Raises ConfigError if there is nothing to plot.
    """
    if not results:
        raise ConfigError("there is no result to plot; evaluate at least one plan")
    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    batches = ", ".join(str(size) for size in sorted({r.batch_size for r in results}))
    milliseconds = [1e3 * result.seconds for result in results]
    gigaflops = [result.flops / 1e9 for result in results]
    _draw_panel(left, results, milliseconds, reference)
    _draw_panel(right, results, gigaflops, reference)
    left.set_xlabel(f"measured time per problem (ms, batches of {batches})")
    left.set_ylabel("accuracy, mean over tasks (%)")
    right.set_xlabel("counted operations per problem (GFLOP)")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8,
        title=LABELS_SAY, title_fontsize=8,
    )  # fmt: skip
    if title:
        figure.suptitle(title, fontsize=11)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed in pixels: the panels stay where they are
    for panel, costs in ((left, milliseconds), (right, gigaflops)):
        _place_labels(canvas.get_renderer(), panel, results, costs, reference)
    _save(figure, Path(file))


def _draw_panel(
    panel: Axes, results: Sequence[Evaluation], costs: Sequence[float], reference: Collection[str]
) -> None:
    """Points with error bars, the fronts behind them."""
    points = [(cost, 100 * result.accuracy) for cost, result in zip(costs, results, strict=True)]
    panel.step(
        *zip(*(points[i] for i in pareto_front(points)), strict=True),
        where="post",
        color=FRONT,
        linewidth=1.2,
        linestyle="--",
        label="Pareto front",
        zorder=1,
    )
    alone = [points[i] for i in _reference_front(results, points, reference)]
    if alone:
        panel.step(
            *zip(*alone, strict=True),
            where="post",
            color=REFERENCE,
            linewidth=1.4,
            label="the largest size alone",
            zorder=1,
        )
    for kind, (marker, colour, name) in KINDS.items():
        chosen = [i for i, result in enumerate(results) if result.kind == kind]
        if chosen:
            panel.errorbar(
                [points[i][0] for i in chosen],
                [points[i][1] for i in chosen],
                yerr=list(zip(*(_reach(results[i]) for i in chosen), strict=True)),
                fmt=marker,
                color=colour,
                ecolor=colour,
                elinewidth=0.7,
                markersize=5,
                label=name,
                zorder=2,
            )
    if min(costs) > 0 and max(costs) > 4 * min(costs):
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.16, y=0.13)
    panel.grid(alpha=0.25)


def _reach(result: Evaluation) -> tuple[float, float]:
    """How far the interval of an accuracy reaches down and up, in points."""
    low, high = result.interval
    return max(100 * (result.accuracy - low), 0.0), max(100 * (high - result.accuracy), 0.0)


def _reference_front(
    results: Sequence[Evaluation],
    points: Sequence[tuple[float, float]],
    reference: Collection[str],
) -> list[int]:
    """Indices of the results that no other result of the reference beats, by rising cost."""
    own = [i for i, result in enumerate(results) if result.label in reference]
    return [own[i] for i in pareto_front([points[i] for i in own])]


def _place_labels(
    renderer: RendererAgg,
    panel: Axes,
    results: Sequence[Evaluation],
    costs: Sequence[float],
    reference: Collection[str],
) -> None:
    """Writes each label at the first place where it hides nothing and stays inside the frame.

    Points on the fronts come first; a label of the front that fits nowhere stands where it hides
    least, any other is left out.
    """
    points = [(x, 100 * r.accuracy) for x, r in zip(costs, results, strict=True)]
    front = pareto_front(points)
    taken = _obstacles(panel, points, [_reach(result) for result in results], front)
    frame = panel.get_window_extent(renderer)
    alone = _reference_front(results, points, reference)
    others = range(len(results)) if len(results) <= MAX_LABELLED else ()
    for index in dict.fromkeys([*front, *alone, *others]):
        label = panel.annotate(
            results[index].label,
            points[index],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=LABEL_SIZE,
            fontweight="bold" if index in front else "normal",
            color=KINDS[results[index].kind][1],
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": FRONT, "shrinkB": 4},
        )
        hidden: list[tuple[float, int]] = []
        for place, (dx, dy, align) in enumerate(LABEL_OFFSETS):
            label.set(position=(dx, dy), horizontalalignment=align)
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)
            outside = box.width * box.height - _overlap(box, frame)
            hidden.append((outside + sum(_overlap(box, other) for other in taken), place))
            if hidden[-1][0] == 0:
                break
        least, place = min(hidden)
        if least > 0 and index not in front:
            label.remove()
            continue
        dx, dy, align = LABEL_OFFSETS[place]
        label.set(position=(dx, dy), horizontalalignment=align)
        label.update_positions(renderer)
        taken.append(Text.get_window_extent(label, renderer))


def _obstacles(
    panel: Axes,
    points: Sequence[tuple[float, float]],
    reaches: Sequence[tuple[float, float]],
    front: Sequence[int],
) -> list[Bbox]:
    """What labels must not hide, in pixels: markers, error bars, the steps of the front."""
    boxes = []
    for (x, y), (below, above) in zip(points, reaches, strict=True):
        boxes.append(_box(panel, (x, y), (x, y), margin=5))
        boxes.append(_box(panel, (x, y - below), (x, y + above), margin=1))
    for (x0, y0), (x1, y1) in pairwise(points[i] for i in front):
        boxes.append(_box(panel, (x0, y0), (x1, y0), margin=1))
        boxes.append(_box(panel, (x1, y0), (x1, y1), margin=1))
    return boxes


def _box(
    panel: Axes, low: tuple[float, float], high: tuple[float, float], *, margin: float
) -> Bbox:
    """The box around two corners in data coordinates, in pixels."""
    (x0, y0), (x1, y1) = panel.transData.transform([low, high])
    return Bbox([[x0 - margin, y0 - margin], [x1 + margin, y1 + margin]])


def _overlap(one: Bbox, other: Bbox) -> float:
    """Area that two boxes share, in square pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)


def _save(figure: Figure, file: Path) -> None:
    """Writes the PNG under a temporary name, then renames it into place."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}); choose another") from None
    finally:
        temporary.unlink(missing_ok=True)
