"""Small charts as inline SVG, which take their colours from the page they stand in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from star_elastic.evaluate.accuracy import Kind
from star_elastic.evaluate.pareto import pareto_front

CHARACTER = 0.62
"""Mean width of a character, in font sizes."""
FONT = 12
LOG_RATIO = 4
"""Costs that differ by more than this are drawn on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class Point:
    """One plan: cost, accuracy and the ends of its interval (all shares), and what it is."""

    x: float
    y: float
    low: float
    high: float
    kind: Kind
    label: str


@dataclass(frozen=True, slots=True)
class Frame:
    """The area of a chart: where numbers are drawn. Sizes in units of the view box."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool = False
    left: int = 46
    right: int = 20
    top: int = 24
    bottom: int = 42

    def x(self, value: float) -> float:
        """Where a cost stands."""
        low, high = map(self._along, self.x_range)
        share = (self._along(value) - low) / (high - low)
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Where a share stands."""
        low, high = self.y_range
        share = (value - low) / (high - low)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def _along(self, value: float) -> float:
        return math.log(value) if self.log else value


def scatter(
    points: Sequence[Point], reference: Sequence[str], marked: Sequence[str], *, x_title: str
) -> str:
    """Accuracy against a cost. The reference's own front is a line, that of all plans a dashed one.

    The reference's plans and the `marked` ones are written out where there is room; every plan
    tells its name under the pointer.
    """
    frame = _frame_of(points)
    alone = [point for point in points if point.label in reference]
    parts = [
        _axes(frame, x_title, "accuracy", _cost_ticks(frame), _share_ticks(frame.y_range)),
        _steps(frame, _front(points), "front"),
        _steps(frame, _front(alone), "alone"),
        *(_marker(frame, point) for point in points),
        *_labels(frame, points, [*(p.label for p in _front(alone)), *marked]),
    ]
    return _svg(frame, f"accuracy against {x_title}", parts)


def curves(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], *, x_title: str) -> str:
    """Lines between shares from 0 to 1, by style and points, with the diagonal behind them."""
    frame = Frame(300, 250, (0.0, 1.0), (0.0, 1.0))
    ticks = [(share, f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    parts = [_axes(frame, x_title, "of differing tokens", ticks, ticks)]
    parts.append(_line(frame, [(0.0, 0.0), (1.0, 1.0)], "chance"))
    parts += [_line(frame, line, f"curve {style}") for style, line in lines]
    return _svg(frame, f"share of differing tokens against {x_title}", parts)


def _svg(frame: Frame, title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _frame_of(points: Sequence[Point]) -> Frame:
    """A frame that holds all points with their error bars."""
    costs = [point.x for point in points]
    log = min(costs) > 0 and max(costs) > LOG_RATIO * min(costs)
    if log:
        x_range = min(costs) / 1.15, max(costs) * 1.15
    else:
        margin = 0.06 * (max(costs) - min(costs)) or 0.1 * max(costs) or 1.0
        x_range = min(costs) - margin, max(costs) + margin
    low, high = min(point.low for point in points), max(point.high for point in points)
    margin = max(0.05 * (high - low), 0.01)
    return Frame(560, 400, x_range, (low - margin, high + margin), log)


def _cost_ticks(frame: Frame) -> list[tuple[float, str]]:
    low, high = frame.x_range
    if frame.log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if high > 20 * low else (1, 1.5, 2, 3, 4, 5, 7)
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    else:
        ticks = _even_ticks(low, high)
    return [(tick, f"{tick:,.10g}") for tick in ticks if low <= tick <= high]


def _share_ticks(share_range: tuple[float, float]) -> list[tuple[float, str]]:
    low, high = share_range
    ticks = _even_ticks(max(low, 0.0), min(high, 1.0))
    digits = 0 if all(abs(100 * tick - round(100 * tick)) < 1e-6 for tick in ticks) else 1
    return [(tick, f"{tick:.{digits}%}") for tick in ticks]


def _even_ticks(low: float, high: float) -> list[float]:
    """Round numbers in a range, about five."""
    rough = (high - low) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _axes(
    frame: Frame,
    x_title: str,
    y_title: str,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
) -> str:
    left, right = frame.left, frame.width - frame.right
    top, bottom = frame.top, frame.height - frame.bottom
    parts = []
    for value, text in y_ticks:
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(_text(left - 6, y + 4, text, "tick", "end"))
    for value, text in x_ticks:
        x = frame.x(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(_text(x, bottom + 16, text, "tick", "middle"))
    middle = (left + right) / 2
    parts.append(_text(middle, frame.height - 6, x_title, "axis", "middle"))
    parts.append(_text(left, top - 9, y_title, "axis", "start"))
    return "".join(parts)


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{escape(text)}</text>'


def _front(points: Sequence[Point]) -> list[Point]:
    return [points[i] for i in pareto_front([(point.x, point.y) for point in points])]


def _steps(frame: Frame, front: Sequence[Point], style: str) -> str:
    if not front:
        return ""
    path = f"M{frame.x(front[0].x):.1f} {frame.y(front[0].y):.1f}"
    path += "".join(f"H{frame.x(p.x):.1f}V{frame.y(p.y):.1f}" for p in front[1:])
    return f'<path class="{style}" d="{path}H{frame.width - frame.right}"/>'


def _line(frame: Frame, line: Sequence[tuple[float, float]], style: str) -> str:
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line)
    return f'<polyline class="{style}" points="{path}"/>'


def _circle(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>'


def _diamond(x: float, y: float) -> str:
    return f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"/>'


def _triangle(x: float, y: float) -> str:
    return f'<path d="M{x:.1f} {y - 6:.1f}l6 10.5h-12z"/>'


SHAPES: dict[Kind, Callable[[float, float], str]] = {
    "single": _circle,
    "pair": _diamond,
    "policy": _triangle,
}


def _marker(frame: Frame, point: Point) -> str:
    x, y = frame.x(point.x), frame.y(point.y)
    high, low = frame.y(point.high), frame.y(point.low)
    told = f"{point.label}: {point.y:.1%} ({100 * point.low:.1f} to {100 * point.high:.1f})"
    told += f" at {point.x:,.4g}"
    return (
        f'<g class="{point.kind}"><title>{escape(told)}</title>'
        f'<path class="bar" d="M{x:.1f} {high:.1f}V{low:.1f}"/>{SHAPES[point.kind](x, y)}</g>'
    )


def legend_marker(kind: Kind) -> str:
    """The marker of a kind, for a legend outside the chart."""
    return f'<svg class="key" viewBox="0 0 16 16"><g class="{kind}">{SHAPES[kind](8, 8)}</g></svg>'


Box = tuple[float, float, float, float]
PLACES = [
    (dx, dy, anchor)
    for distance in (9, 16, 26, 38)
    for dx, dy, anchor in (
        (distance, 4, "start"),
        (-distance, 4, "end"),
        (distance * 0.7, -distance * 0.7, "start"),
        (-distance * 0.7, -distance * 0.7, "end"),
        (distance * 0.7, distance + 3, "start"),
        (-distance * 0.7, distance + 3, "end"),
        (0, -distance, "middle"),
        (0, distance + 8, "middle"),
    )
]
"""Where a label may stand, from its marker, best first."""


def _labels(frame: Frame, points: Sequence[Point], labels: Sequence[str]) -> list[str]:
    """The labels of these points, each at the first place where it hides nothing, or not at all."""
    taken: list[Box] = []
    for point in points:
        x, y = frame.x(point.x), frame.y(point.y)
        high, low = frame.y(point.high), frame.y(point.low)
        taken += [(x - 6, y - 6, x + 6, y + 6), (x - 1, high, x + 1, low)]
    by_label = {point.label: point for point in points}
    written = []
    for label in dict.fromkeys(labels):
        point = by_label[label]
        for dx, dy, anchor in PLACES:
            x, y = frame.x(point.x) + dx, frame.y(point.y) + dy
            box = _box(x, y, label, anchor)
            if _is_inside(frame, box) and not any(_overlap(box, other) for other in taken):
                written.append(_text(x, y, label, f"label {point.kind}", anchor))
                taken.append(box)
                break
    return written


def _box(x: float, y: float, text: str, anchor: str) -> Box:
    """About where a text stands."""
    width = CHARACTER * FONT * len(text)
    start = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
    return start, y - 0.8 * FONT, start + width, y + 0.25 * FONT


def _is_inside(frame: Frame, box: Box) -> bool:
    inside = frame.left, frame.top, frame.width - 2, frame.height - frame.bottom
    return (
        inside[0] <= box[0] and inside[1] <= box[1] and box[2] <= inside[2] and box[3] <= inside[3]
    )


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
