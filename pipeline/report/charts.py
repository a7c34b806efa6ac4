"""Draws charts as SVG, without script, legible in light and dark and to colour-blind readers.

Colours come from the page's custom properties, with fallbacks so that a chart also stands alone. Points are thinned,
so that a figure stays small however long its data. Every function raises ValueError if there is nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from pipeline.progress import counted
from pipeline.report.html import template

WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 54, 388, 30, 190  # edges of the plot inside the chart
BAR_STEP = 44  # from one horizontal bar to the next
MOST_POINTS = 300
MARKED = 40  # a series of at most this many points shows each of them
SMOOTH = 60  # points of a longer one's line: means, above all of its points in a faint colour
HOVERED = 32  # places at most where a chart says its values under a pointer
TICKS = 5  # of a linear axis, about
LOG_RATIO = 20  # positive values that span more than this factor are drawn on a logarithmic axis

Point = tuple[float, float]


class Axis(NamedTuple):
    """An axis: its label, its mapping from values to SVG units, and the values that have a tick."""

    label: str
    place: Callable[[float], float]
    values: list[float]

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Returns place and label of each tick."""
        return [(self.place(value), tick_label(value)) for value in self.values]


class Series(NamedTuple):
    """A named line in SVG units. ``style`` chooses colour and dashes; a ``marked`` one shows its points.

    ``faint`` are all points of a line that is smoothed.
    """

    style: int
    name: str
    points: list[Point]
    marked: bool
    faint: list[Point]


class Hint(NamedTuple):
    """A tooltip of the strip from ``left`` to ``right``: its text, and the ``points`` that are marked with it."""

    left: float
    right: float
    words: str
    points: list[tuple[int, Point]]


def path(points: Sequence[Point]) -> Markup:
    """Returns the commands that draw a line."""
    return Markup("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points))


CHART = template("chart.svg", path=path)


def line_chart(title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Point]]) -> Markup:
    """Draws one or two named series of (x, y), without the points that are not finite.

    The y axis is logarithmic, and says so, when all values are positive and span more than a factor of 20.
    """
    clean = [(i, name, thin(_finite(points))) for i, (name, points) in enumerate(series.items())]
    clean = [entry for entry in clean if entry[2]]
    if not clean:
        raise ValueError("no finite values to draw")
    xs, ys = zip(*(point for _, _, points in clean for point in points), strict=True)
    x = _linear(x_label, min(xs), max(xs), LEFT, RIGHT, margin=0.0)
    if min(ys) > 0 and max(ys) > LOG_RATIO * min(ys):
        y = _logarithmic(f"{y_label}, log scale", min(ys), max(ys), BOTTOM, TOP)
    else:
        y = _linear(y_label, min(ys), max(ys), BOTTOM, TOP)
    lines, hints = [], _hints(clean, x, y)
    for i, name, points in clean:
        every, smooth = ([(x.place(a), y.place(b)) for a, b in line] for line in (points, thin(points, SMOOTH)))
        lines.append(Series(i, name, smooth, len(points) <= MARKED, every if len(points) > SMOOTH else []))
    said = "; ".join(f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for _, name, points in clean)
    return CHART.line_chart(f"{title}: {said}", x, y, lines, hints, len(series) > 1)


def _hints(series: Sequence[tuple[int, str, list[Point]]], x: Axis, y: Axis) -> list[Hint]:
    """Returns what to say at the places of the series with most points: its value, and the other's nearest one."""
    lines = [(i, name, thin(points, HOVERED)) for i, name, points in series]
    places = [a for a, _ in max((points for _, _, points in lines), key=len)]
    middles = [x.place((a + b) / 2) for a, b in pairwise(places)]
    hints = []
    for at, left, right in zip(places, [LEFT, *middles], [*middles, RIGHT], strict=True):
        found = [(i, name, min(points, key=lambda point: abs(point[0] - at))) for i, name, points in lines]
        words = ", ".join(f"{name} {b:.4g}" for _, name, (_, b) in found)
        hints.append(
            Hint(left, right, f"{tick_label(at)}: {words}", [(i, (x.place(a), y.place(b))) for i, _, (a, b) in found])
        )
    return hints


def histogram(title: str, x_label: str, values: Sequence[float]) -> Markup:
    """Draws counts of ``values`` in equal bins from the smallest to the largest: about sqrt(n) bins, from 8 to 40."""
    finite = [float(v) for v in values if math.isfinite(v)]
    if not finite:
        raise ValueError("no finite values to draw")
    low, high = _span(min(finite), max(finite))
    counts, edges = np.histogram(finite, min(max(math.isqrt(len(finite)), 8), 40), (low, high))
    x = _linear(x_label, low, high, LEFT, RIGHT, margin=0.0)
    y = _linear("rows", 0, int(counts.max()), BOTTOM, TOP, margin=0.0)
    ends = zip(edges, edges[1:], counts, strict=False)
    columns = [(x.place(a), y.place(n), f"{a:.4g} to {b:.4g}: {counted(int(n), 'row')}") for a, b, n in ends if n]
    said = f"{title}: {len(finite):,} values from {min(finite):.3g} to {max(finite):.3g}"
    return CHART.histogram(said, x, y, columns, (RIGHT - LEFT) / len(counts) - 1)


def bars(title: str, values: Sequence[tuple[str, float]], counts: bool = True) -> Markup:
    """Draws horizontal bars, each under its name and its number; one below zero has no length.

    Args:
        title: Title for screen readers.
        values: Names and finite values, from above.
        counts: Values are counts: those after the first show their share of the largest.
    """
    if not all(math.isfinite(value) for _, value in values) or not values:
        raise ValueError("no finite values to draw")
    largest = max(max(value for _, value in values), 0) or 1
    shown = [f"{value:,.0f}" if counts else f"{value:.4g}" for _, value in values]
    rows = [
        # A pixel at least, so that one of a million rows can be seen.
        (name, said + (f" ({value / largest:.1%})" if counts and i else ""), max(value / largest * (WIDTH - 4), 1))
        for i, ((name, value), said) in enumerate(zip(values, shown, strict=True))
    ]
    said = ", ".join(f"{name} {value}" for (name, _), value in zip(values, shown, strict=True))
    return CHART.bars(f"{title}: {said}", rows, BAR_STEP)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Returns at most ``most`` points in order of x: means of equal runs between the first and the last point."""
    points = sorted(points)
    if len(points) <= most:
        return points
    inner, runs = np.array(points[1:-1]), most - 2
    # np.array_split would put the longer runs first, and half of the noise would seem to vanish there.
    cuts = [len(inner) * i // runs for i in range(1, runs)]
    means = [(float(x), float(y)) for x, y in (run.mean(axis=0) for run in np.split(inner, cuts))]
    return [points[0], *means, points[-1]]


def nice_ticks(low: float, high: float) -> list[float]:
    """Returns about TICKS round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    power = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step = next(m * power for m in (1, 2, 5, 10) if (high - low) / (m * power) <= TICKS)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns at most six powers of ten inside [low, high]; with their doubles and fives if they are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 2, 5)):
        ticks = [t for e in range(first, last + 1) for f in factors if low <= (t := f * 10.0**e) <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 6)]


def tick_label(value: float) -> str:
    """Formats a value briefly, such as 20k, 1.5M, 0.25 or 1e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _span(low: float, high: float) -> Point:
    """Returns the range itself, or one around a single value."""
    if high > low:
        return low, high
    around = abs(low) * 0.1 or 1.0
    return low - around, high + around


def _linear(label: str, low: float, high: float, start: float, stop: float, margin: float = 0.05) -> Axis:
    low, high = _span(low, high)
    low, high = low - margin * (high - low), high + margin * (high - low)
    return Axis(label, lambda v: start + (v - low) / (high - low) * (stop - start), nice_ticks(low, high))


def _logarithmic(label: str, low: float, high: float, start: float, stop: float) -> Axis:
    low, high = low / 1.2, high * 1.2
    length = math.log(high / low)
    return Axis(label, lambda v: start + math.log(v / low) / length * (stop - start), log_ticks(low, high))
