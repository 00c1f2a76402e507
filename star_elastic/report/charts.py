"""Charts, drawn by matplotlib: plots in files (PNG), and the same charts inside a page (SVG).

On a page a chart is part of the HTML: its colours are the page's variables, so that it follows day
and night, its texts can be selected, and its marks tell their plan under the pointer.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from star_elastic.errors import ConfigError
from star_elastic.evaluate.accuracy import Evaluation, Kind
from star_elastic.files.writing import replaced
from star_elastic.report.findings import COST_NAMES

COLOURS = {
    "card": "#ffffff", "text": "#1d2126", "soft": "#5d6670", "line": "#e0e2e0",
    "single": "#1f6fb4", "pair": "#c8640a", "policy": "#2c8a4b",
}  # fmt: skip
"""By day, as files have them; a page names its variables alike and has others for the night."""
KINDS: dict[Kind, tuple[str, str]] = {
    "single": ("o", "one size"),
    "pair": ("D", "think > answer"),
    "policy": ("^", "small ~ large, by difficulty"),
}
"""Marker and name of every kind of plan."""
UNITS = {"flops": "FLOP", "seconds": "s"}
"""Of the costs, per problem, that accuracy is drawn against."""
LABELS_SAY = (
    "a>b: a thinks, b answers   a~b 5%: b writes 5 % of the tokens, where a is unsure   "
    "@64: at most 64 tokens of thinking"
)
LOG_RATIO = 4
"""Costs that differ by more than this are drawn on a logarithmic axis."""
MAX_LABELLED = 40
"""Plans of which all are labelled where there is room; of more only those that stand out."""
PLACES = [
    (distance * dx, distance * dy - 3, align)
    for distance in (9, 16, 26, 38, 52)
    for dx, dy, align in (
        (1, 0, "left"), (-1, 0, "right"), (0.7, 0.9, "left"), (-0.7, 0.9, "right"),
        (0.7, -0.9, "left"), (-0.7, -0.9, "right"), (0, 1, "center"), (0, -1, "center"),
    )
]  # fmt: skip
"""Where a label may stand, in points from its marker, best first."""
DPI = 80
STYLE: Any = {  # pyright knows every one of matplotlib's keys, and no name for their kind
    "font.size": 12, "legend.fontsize": 12, "axes.titlesize": 12, "axes.titlelocation": "left",
    "legend.frameon": False, "lines.markersize": 6.5,
    "text.color": COLOURS["soft"], "axes.labelcolor": COLOURS["soft"],
    "xtick.labelcolor": COLOURS["soft"], "ytick.labelcolor": COLOURS["soft"],
    "xtick.bottom": False, "ytick.left": False, "axes.axisbelow": True, "axes.grid": True,
    "grid.color": COLOURS["line"], "svg.fonttype": "none",
    **{f"axes.spines.{side}": False for side in ("top", "right", "bottom", "left")},
}  # fmt: skip


@contextmanager
def drawn_to(file: str | Path, columns: int, size: tuple[int, int], **shared: Any) -> Iterator[Any]:
    """A figure and its panels, side by side, which are written as a PNG when the block ends.

    `size` in points, `shared` as of matplotlib's `subplots`. Raises CheckpointError if the file
    cannot be written.
    """
    with rc_context(STYLE):
        figure, panels = _figure(columns, size, DPI, **shared)
        yield figure, panels
        with replaced(Path(file)) as temporary:
            figure.savefig(temporary, format="png")


def _figure(columns: int, size: tuple[int, int], dpi: int, **shared: Any) -> tuple[Figure, Any]:
    """A figure of a size in points, and its panel, or panels."""
    width, height = size
    figure = Figure(figsize=(width / 72, height / 72), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, **shared)


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


def plot_plans(
    plans: Sequence[Evaluation],
    file: str | Path,
    *,
    title: str = "",
    reference: Collection[str] = (),
) -> None:
    """Two panels as one PNG: accuracy against seconds, and against operations, per problem.

    See `PlansChart`. Raises ConfigError if there is nothing to plot, CheckpointError if the file
    cannot be written.
    """
    if not plans:
        raise ConfigError("there is no result to plot; evaluate at least one plan")
    with drawn_to(file, 2, (1100, 480), sharey=True) as (figure, panels):
        figure.suptitle(title, color=COLOURS["text"])
        charts = [PlansChart(plans, cost, reference) for cost in ("seconds", "flops")]
        _draw_plans(figure, dict(zip(charts, panels, strict=True)), ncols=5, title=LABELS_SAY)


def _draw_plans(figure: Figure, charts: Mapping[PlansChart, Any], **legend: Any) -> None:
    """Draws charts, each in its panel, under which they share a legend."""
    for chart, panel in charts.items():
        chart.draw(panel)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", **legend)
    # Labels are placed in pixels: from here on the panels stay where they are.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for chart, panel in charts.items():
        chart.write_labels(panel)


@dataclass(frozen=True, eq=False)
class PlansChart:
    """Plans by accuracy and one cost (of `UNITS`).

    Every plan is a marker with its interval. Lines join the plans that no other beats, of all and
    of those labelled as in `reference`. These and the `named` plans are written out where there is
    room.
    """

    plans: Sequence[Evaluation]
    cost: str
    reference: Collection[str]
    named: Collection[str] = ()

    def svg(self) -> str:
        """For a page; every mark tells its plan under the pointer."""
        with rc_context(STYLE):
            figure, panel = _figure(1, (560, 420), 72)
            _draw_plans(figure, {self: panel}, ncols=3)
            told = {f"plan {number}": self._told(plan) for number, plan in enumerate(self.plans)}
            return _as_svg(figure, f"accuracy against {COST_NAMES[self.cost]}", told)

    def draw(self, panel: Any) -> None:
        """Markers with error bars, the fronts behind them."""
        points, cost_name = self._points(), f"{COST_NAMES[self.cost]} per problem"
        names = ("best of all plans", "the largest size alone")
        styles = ({"color": COLOURS["soft"], "linestyle": "--"}, {"color": COLOURS["single"]})
        for front, name, style in zip(self._fronts(), names, styles, strict=True):
            if front:
                steps = zip(*(points[i] for i in front), strict=True)
                panel.step(*steps, where="post", label=name, zorder=1, **style)
        seen: set[Kind] = set()
        for number, plan in enumerate(self.plans):
            marker, name = KINDS[plan.kind]
            low, high = plan.interval
            # An accuracy of 0 or 1 may lie outside its interval by rounding.
            reach = [[max(plan.accuracy - low, 0)], [max(high - plan.accuracy, 0)]]
            bar = panel.errorbar(
                *points[number], reach, fmt=marker, color=COLOURS[plan.kind], elinewidth=0.8,
                zorder=2, label=None if plan.kind in seen else name,
            )  # fmt: skip
            bar[0].set_gid(f"plan {number}")
            seen.add(plan.kind)
        costs = [x for x, _ in points]
        if min(costs) > 0 and max(costs) > LOG_RATIO * min(costs):
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_minor_locator(NullLocator())
        else:
            panel.locator_params(axis="x", nbins=6)
        if self.cost == "seconds":
            batches = sorted({plan.batch_size for plan in self.plans})
            cost_name += f" (in batches of {', '.join(map(str, batches))})"
        panel.set(title="accuracy", xlabel=cost_name)
        panel.xaxis.set_major_formatter(EngFormatter(UNITS[self.cost]))
        panel.yaxis.set_major_formatter(_percent)
        panel.margins(x=0.12, y=0.1)

    def write_labels(self, panel: Any) -> None:
        """Writes each label at the first place where it hides nothing and stays inside the panel,
        those of the fronts first; what finds no place is left out."""
        renderer = panel.get_figure().canvas.get_renderer()
        frame = panel.get_window_extent(renderer)
        taken = [bar.lines[0].get_window_extent(renderer) for bar in panel.containers]
        for bar in panel.containers:  # a collection does not know where it is in pixels
            reach = bar.lines[2][0].get_datalim(panel.transData)
            taken.append(reach.transformed(panel.transData))
        points, (front, alone) = self._points(), self._fronts()
        named = [number for number, plan in enumerate(self.plans) if plan.label in self.named]
        others = range(len(points)) if len(points) <= MAX_LABELLED else ()
        for number in dict.fromkeys([*front, *alone, *named, *others]):
            plan = self.plans[number]
            label = panel.annotate(
                plan.label, points[number], (0, 0), textcoords="offset points",
                color=COLOURS[plan.kind], fontweight="bold" if number in front else "normal",
                bbox={"facecolor": COLOURS["card"], "alpha": 0.7, "linewidth": 0, "pad": 0},
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": COLOURS["soft"]},
            )  # fmt: skip
            for dx, dy, align in PLACES:
                label.set(position=(dx, dy), horizontalalignment=align)
                label.update_positions(renderer)
                box = Text.get_window_extent(label, renderer)  # without the line to its marker
                is_inside = frame.contains(*box.min) and frame.contains(*box.max)
                if is_inside and not box.count_overlaps(taken):
                    taken.append(box)
                    break
            else:
                label.remove()

    def _points(self) -> list[tuple[float, float]]:
        return [(getattr(plan, self.cost), plan.accuracy) for plan in self.plans]

    def _fronts(self) -> tuple[list[int], list[int]]:
        """Indices of the plans that no other beats: of all, and of those of the reference."""
        points = self._points()
        own = [number for number, plan in enumerate(self.plans) if plan.label in self.reference]
        return pareto_front(points), [own[i] for i in pareto_front([points[i] for i in own])]

    def _told(self, plan: Evaluation) -> str:
        low, high = plan.interval
        amount = EngFormatter(UNITS[self.cost], places=1)(getattr(plan, self.cost))
        interval = f"({100 * low:.1f} to {100 * high:.1f})"
        return f"{plan.label}: {plan.accuracy:.1%} {interval} at {amount}"


def curves_chart(curves: Mapping[str, Sequence[tuple[float, float]]], pair: str) -> str:
    """What choice by difficulty finds, as SVG for a page: the share of the tokens at which a `pair`
    of sizes differs that the larger one writes, against the share of all tokens that it writes.

    `curves` are points (share of all, share of the differing) by when the smaller size looks,
    before every `token` or `line`. The diagonal is what choosing tokens by chance would find.
    """
    with rc_context(STYLE):
        figure, panel = _figure(1, (340, 320), 72)
        panel.plot((0, 1), (0, 1), ":", color=COLOURS["soft"], label="tokens chosen by chance")
        for look, colour in (("token", "policy"), ("line", "pair")):
            points = np.array(curves[look]).reshape(-1, 2)
            panel.plot(*points.T, color=COLOURS[colour], label=f"looks before every {look}")
        panel.set_title("of differing tokens")
        panel.set_xlabel("tokens that the larger writes")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(_percent)
        figure.legend(loc="outside lower center")
        return _as_svg(figure, f"{pair}: share of differing tokens that the larger writes", {})


def _percent(share: float, _: object = None) -> str:
    return f"{100 * share:.4g}%"


def _as_svg(figure: Figure, title: str, told: Mapping[str, str]) -> str:
    """A figure as part of an HTML page; `told` are titles by the ids of what they are of.

    What only a file of its own needs is left out, and with it all addresses.
    """
    whole = io.BytesIO()
    with rc_context({"svg.hashsalt": title}):  # one chart has the same ids whenever it is drawn
        figure.savefig(whole, format="svg", transparent=True)
    root = ElementTree.fromstring(whole.getvalue())
    for element in list(root.iter()):
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style", "}clipPath")):
                element.remove(child)
        element.tag, element.tail = element.tag.partition("}")[2], None
        if element.tag != "text":
            element.text = None
        name = element.get("id", "")
        element.attrib = _attributes(element)
        if name in told:
            ElementTree.SubElement(element, "title").text = told[name]
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(element: ElementTree.Element) -> dict[str, str]:
    """An element's attributes in a page, which has the fonts and the colours."""
    kept = {}
    for key, value in element.items():
        key = key.replace("{http://www.w3.org/1999/xlink}", "xlink:")
        if key == "style":
            value = re.sub(r"font-(size|family): [^;]*;? ?", "", value)
            for name, colour in COLOURS.items():
                value = value.replace(colour, f"var(--{name})")
        if key in ("d", "x", "y"):
            value = re.sub(r"(\.\d)\d+", r"\1", " ".join(value.split()))  # tenths of a point
        if key not in ("clip-path", "transform") and (key != "id" or element.tag == "path"):
            kept[key] = value
    return kept
