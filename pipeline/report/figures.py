"""Charts as SVG text: pure functions, no script, legible in light and dark and to colour-blind readers.

Colours come from the page's custom properties, with fallbacks so that a chart also stands alone. Points are thinned,
so that a figure stays small however long its data. Every function raises ValueError if there is nothing to draw.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 30, 46  # margins around the plot
MOST_POINTS = 300
MARKED = 40  # a series of at most this many points shows each of them
LOG_RATIO = 20  # positive values that span more than this factor are drawn on a logarithmic axis

Point = tuple[float, float]


class Scale(NamedTuple):
    """A mapping from values to SVG units, with the ticks of its axis."""

    place: Callable[[float], float]
    ticks: list[float]


def line_chart(title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Point]]) -> str:
    """One or two named series of (x, y). Points that are not finite are left out.

    The y axis is logarithmic, and says so, when all values are positive and span more than a factor of 20.
    """
    clean = [(i, name, thin(_finite(points))) for i, (name, points) in enumerate(series.items())]
    clean = [entry for entry in clean if entry[2]]
    if not clean:
        raise ValueError("there are no finite values")
    xs = [x for _, _, points in clean for x, _ in points]
    ys = [y for _, _, points in clean for _, y in points]
    logarithmic = min(ys) > 0 and max(ys) > LOG_RATIO * min(ys)
    x = _linear(min(xs), max(xs), LEFT, WIDTH - RIGHT, margin=0.0)
    y = (_logarithmic if logarithmic else _linear)(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    parts = [_axes(x, y, x_label, y_label + (", log scale" if logarithmic else ""))]
    for i, name, points in clean:
        parts.append(_line(i, [(x.place(a), y.place(b)) for a, b in points]))
        if len(series) > 1:
            parts.append(_legend(i, name))
    said = "; ".join(f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for _, name, points in clean)
    return _svg(f"{title}: {said}", HEIGHT, parts)


def histogram(title: str, x_label: str, values: Sequence[float]) -> str:
    """Counts of ``values`` in equal bins from the smallest to the largest: about sqrt(n) bins, from 8 to 40."""
    finite = [float(v) for v in values if math.isfinite(v)]
    if not finite:
        raise ValueError("there are no finite values")
    low, high = _span(min(finite), max(finite))
    bins = min(max(math.isqrt(len(finite)), 8), 40)
    counts = [0] * bins
    for value in finite:
        counts[min(int((value - low) / (high - low) * bins), bins - 1)] += 1
    x = _linear(low, high, LEFT, WIDTH - RIGHT, margin=0.0)
    y = _linear(0, max(counts), HEIGHT - BOTTOM, TOP, margin=0.0)
    wide = (WIDTH - RIGHT - LEFT) / bins
    rects = [
        f'<rect x="{LEFT + i * wide:.1f}" y="{y.place(n):.1f}" width="{wide - 1:.1f}" '
        f'height="{HEIGHT - BOTTOM - y.place(n):.1f}" style="fill:{_colour(0)}"/>'
        for i, n in enumerate(counts)
        if n
    ]
    said = f"{title}: {len(finite):,} values from {min(finite):.3g} to {max(finite):.3g}"
    return _svg(said, HEIGHT, [_axes(x, y, x_label, "rows"), *rects])


def bars(title: str, values: Sequence[tuple[str, float]], counts: bool = True) -> str:
    """Horizontal bars, each under its name and its number: ``counts``, with their share of the largest after the first,
    or any finite values. One below zero has no length."""
    if not all(math.isfinite(value) for _, value in values) or not values:
        raise ValueError("there are no finite values")
    largest = max(max(value for _, value in values), 0) or 1
    shown = [f"{value:,.0f}" if counts else f"{value:.4g}" for _, value in values]
    step, parts = 44, []
    for i, (name, value) in enumerate(values):
        top = 8 + i * step
        length = max(value / largest * (WIDTH - 4), 1)
        share = f" ({value / largest:.1%})" if counts and i else ""
        parts.append(_text(2, top + 11, name, _INK))
        parts.append(_text(WIDTH - 2, top + 11, shown[i] + share, _INK, "end"))
        fill = f"fill:{_colour(0)}"
        parts.append(f'<rect x="2" y="{top + 17}" width="{length:.1f}" height="14" rx="2" style="{fill}"/>')
    said = f"{title}: " + ", ".join(f"{name} {value}" for (name, _), value in zip(values, shown, strict=True))
    return _svg(said, len(values) * step + 8, parts)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` points in order of x: means of equal runs, with the first and the last point kept."""
    points = sorted(points)
    if len(points) <= most:
        return points
    inner, runs = points[1:-1], most - 2
    cuts = [len(inner) * i // runs for i in range(runs + 1)]
    blocks = [inner[a:b] for a, b in pairwise(cuts)]
    means = [(sum(x for x, _ in block) / len(block), sum(y for _, y in block) / len(block)) for block in blocks]
    return [points[0], *means, points[-1]]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 5, 10) if (high - low) / (m * power) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten inside [low, high], at most ``most``; with twice and five times them if those are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 2, 5)):
        ticks = [t for e in range(first, last + 1) for f in factors if low <= (t := f * 10.0**e) <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / most)]


def tick_label(value: float) -> str:
    """Short: 20k, 1.5M, 0.25, 1e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _span(low: float, high: float) -> Point:
    """The range itself, or one around a single value."""
    if high > low:
        return low, high
    around = abs(low) * 0.1 or 1.0
    return low - around, high + around


def _linear(low: float, high: float, start: float, stop: float, margin: float = 0.05) -> Scale:
    low, high = _span(low, high)
    low, high = low - margin * (high - low), high + margin * (high - low)
    return Scale(lambda v: start + (v - low) / (high - low) * (stop - start), nice_ticks(low, high))


def _logarithmic(low: float, high: float, start: float, stop: float) -> Scale:
    low, high = low / 1.2, high * 1.2
    length = math.log(high / low)
    return Scale(lambda v: start + math.log(v / low) / length * (stop - start), log_ticks(low, high))


_FONT = "font:13px system-ui,sans-serif"
_INK = f"{_FONT};fill:var(--ink,#222)"
_QUIET = f"{_FONT};fill:var(--quiet,#666)"


def _colour(i: int) -> str:
    """Blue and vermilion, which every kind of colour vision tells apart."""
    return ("var(--series-1,#0072b2)", "var(--series-2,#d55e00)")[i]


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in y.ticks:
        at = y.place(tick)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{right}" style="stroke:var(--line,#ddd)"/>')
        parts.append(_text(LEFT - 6, at + 4, tick_label(tick), _QUIET, "end"))
    for tick in x.ticks:
        at = x.place(tick)
        parts.append(f'<path d="M{at:.1f} {bottom}v4" style="stroke:var(--quiet,#666)"/>')
        # A label centred on the right edge would be cut.
        where, anchor = (WIDTH - 2, "end") if at > WIDTH - 24 else (at, "middle")
        parts.append(_text(where, bottom + 18, tick_label(tick), _QUIET, anchor))
    parts.append(f'<path d="M{LEFT} {bottom}H{right}" style="stroke:var(--quiet,#666)"/>')
    parts.append(_text((LEFT + right) / 2, HEIGHT - 8, x_label, _INK, "middle"))
    parts.append(_text(2, 14, y_label, _INK))
    return "".join(parts)


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{html.escape(text)}</text>'


def _line(i: int, points: Sequence[Point]) -> str:
    """The second series is dashed as well as of another colour; a short series shows its points."""
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dash = ";stroke-dasharray:5 3" if i else ""
    line = f'<path d="{path}" style="fill:none;stroke-width:1.8;stroke-linejoin:round;stroke:{_colour(i)}{dash}"/>'
    if len(points) > MARKED:
        return line
    return line + "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" style="fill:{_colour(i)}"/>' for x, y in points)


def _legend(i: int, name: str) -> str:
    """Above the plot, the second name at the right edge and the first one left of it."""
    x = WIDTH - RIGHT - (106 if i else 176)
    dash = ";stroke-dasharray:5 3" if i else ""
    line = f'<path d="M{x} 10h22" style="stroke-width:2.4;stroke:{_colour(i)}{dash}"/>'
    return line + _text(x + 27, 14, name, _INK)


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return f'<svg role="img" viewBox="0 0 {WIDTH} {height}"><title>{html.escape(title)}</title>\n{body}\n</svg>'
