"""Charts as inline SVG, coloured by the page's style, so that they follow its light or dark scheme."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 28, 16, 40
_TICKS = 5
_MOST_DOTS = 80
_BAR_NAME, _BAR_VALUE = 130, 70

Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """One line.

    Attributes:
        name: for the legend; may be empty.
        points: (x, y); the line is broken where a y is None.
        labels: words beside the points, one for each, or none at all.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    labels: Sequence[str] = ()

    def unbroken(self) -> Iterator[list[tuple[float, float]]]:
        """The points between the breaks."""
        for has_value, part in itertools.groupby(self.points, key=lambda point: point[1] is not None):
            if has_value:
                yield [(across, up) for across, up in part if up is not None]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis.

    Attributes:
        title: what it shows.
        ticks: values that are marked, rising.
        low: value at its beginning.
        high: value at its end.
        place: from a value to a number that grows evenly along the axis.
        form: how a value is written.
    """

    title: str
    ticks: Sequence[float]
    low: float
    high: float
    place: Callable[[float], float]
    form: Format

    def share(self, value: float) -> float:
        """How far along the axis a value stands, from 0 to 1."""
        first, last = self.place(self.low), self.place(self.high)
        return (self.place(value) - first) / (last - first)


def linear_axis(title: str, high: float, form: Format) -> Axis:
    """From 0 to a round number at or above `high`."""
    step = _round_step(high / _TICKS if high > 0 else 1.0)
    count = max(1, math.ceil(high / step - 1e-9))
    return Axis(title, [number * step for number in range(count + 1)], 0.0, count * step, float, form)


def logarithmic_axis(title: str, low: float, high: float, form: Format) -> Axis:
    """Between powers of ten around `low` and `high`, both above 0; with steps of 1, 2, 5 where it spans few of them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [step * 10.0**power for power in range(first, last) for step in steps] + [10.0**last]
    return Axis(title, ticks, ticks[0], ticks[-1], math.log10, form)


def percentile_axis(title: str, high: float) -> Axis:
    """From 0 % on, each further nine as wide as the one before, up to the first of 90, 99, ... at or above `high`."""
    ticks = [0.0, 50.0, 90.0]
    while ticks[-1] < high and len(ticks) < 7:
        ticks.append(100 - (100 - ticks[-1]) / 10)

    def nines(percent: float) -> float:
        return -math.log10(1 - min(percent, ticks[-1]) / 100)

    return Axis(title, ticks, 0.0, ticks[-1], nines, lambda percent: f"{percent:.6g}")


def line_chart(title: str, x: Axis, y: Axis, lines: Sequence[Series], bands: Sequence[tuple[float, float]] = ()) -> str:
    """A figure with a legend; hovering over a point names its values.

    Args:
        title: of the figure.
        x: horizontal axis.
        y: vertical axis.
        lines: what is drawn.
        bands: stretches of x that are marked.
    """
    legend = "".join(
        f'<span><i class="swatch s{number}"></i>{escape(line.name)}</span>'
        for number, line in enumerate(lines)
        if line.name
    )
    body = "".join(_band(x, *band) for band in bands) + "".join(_grid(x, y))
    body += "".join(_line(number, line, x, y) for number, line in enumerate(lines))
    if not any(list(line.unbroken()) for line in lines):
        body += f'<text class="empty" x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT / 2}">none</text>'
    return _figure(title, legend, body)


def bar_chart(title: str, bars: Sequence[tuple[str, float]], form: Format) -> str:
    """A figure of named values, one under another."""
    most = max((value for _, value in bars), default=0.0) or 1.0
    height = (HEIGHT - 2 * _TOP) / max(len(bars), 1)
    parts = []
    for number, (name, value) in enumerate(bars):
        top = _TOP + number * height
        width = value / most * (WIDTH - _BAR_NAME - _BAR_VALUE)
        middle = top + height / 2 + 4
        parts.append(f'<text class="y" x="{_BAR_NAME - 6}" y="{middle:.1f}">{escape(name)}</text>')
        size = f'y="{top + height * 0.2:.1f}" width="{width:.1f}" height="{height * 0.6:.1f}"'
        parts.append(f'<rect class="s0" x="{_BAR_NAME}" {size}/>')
        parts.append(f'<text x="{_BAR_NAME + width + 6:.1f}" y="{middle:.1f}">{escape(form(value))}</text>')
    return _figure(title, "", "".join(parts))


def _figure(title: str, legend: str, body: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)}<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg></figure>'
    )


def _grid(x: Axis, y: Axis) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for tick in y.ticks:
        level = _down(y, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{level + 4:.1f}">{escape(y.form(tick))}</text>')
    for tick in x.ticks:
        place = _across(x, tick)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="x" x="{place:.1f}" y="{bottom + 16}">{escape(x.form(tick))}</text>')
    parts.append(f'<text class="x title" x="{(_LEFT + right) / 2}" y="{HEIGHT - 6}">{escape(x.title)}</text>')
    return parts


def _band(x: Axis, begin: float, end: float) -> str:
    left, right = _across(x, begin), _across(x, end)
    return (
        f'<rect class="band" x="{left:.1f}" width="{right - left:.1f}" y="{_TOP}" height="{HEIGHT - _BOTTOM - _TOP}"/>'
    )


def _line(number: int, line: Series, x: Axis, y: Axis) -> str:
    parts = []
    for points in line.unbroken():
        places = [f"{_across(x, across):.1f},{_down(y, up):.1f}" for across, up in points]
        # One point alone is a line of no length, whose round ends make a dot.
        parts.append(f'<polyline class="s{number}" points="{" ".join(places if places[1:] else places * 2)}"/>')
    if len(line.points) <= _MOST_DOTS:
        parts += [_dot(number, line.name, x, y, point) for part in line.unbroken() for point in part]
    for label, (across, up) in zip(line.labels, line.points, strict=False):
        if up is not None:
            place = f'x="{_across(x, across) + 6:.1f}" y="{_down(y, up) - 6:.1f}"'
            parts.append(f"<text {place}>{escape(label)}</text>")
    return "".join(parts)


def _dot(number: int, name: str, x: Axis, y: Axis, point: tuple[float, float]) -> str:
    words = escape(f"{name} {y.form(point[1])} at {x.form(point[0])}".strip())
    place = f'cx="{_across(x, point[0]):.1f}" cy="{_down(y, point[1]):.1f}"'
    return f'<circle class="s{number}" {place} r="2.5"><title>{words}</title></circle>'


def _across(axis: Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT)


def _down(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.share(value) * (HEIGHT - _BOTTOM - _TOP)


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least the step."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))
