"""Tests that charts are well-formed SVG and draw what was given."""

import math
import random
import re
from xml.etree import ElementTree

import pytest

from pipeline.report.charts import (
    BOTTOM,
    LEFT,
    MOST_POINTS,
    RIGHT,
    WIDTH,
    bars,
    histogram,
    line_chart,
    log_ticks,
    nice_ticks,
    thin,
    tick_label,
)


def parse(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root[0].tag == "title"
    assert root[0].text
    return root


def series_paths(svg: str) -> list[list[tuple[float, float]]]:
    """Returns the points of each drawn series."""
    paths = [p for p in parse(svg).iter("path") if "fill:none" in p.get("style", "")]
    return [[(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", p.get("d", ""))] for p in paths]


def lengths(svg: str, side: str) -> list[float]:
    return [float(rect.get(side, "")) for rect in parse(svg).iter("rect")]


@pytest.mark.parametrize("seed", range(20))
def test_ticks_are_few_round_and_inside(seed: int) -> None:
    rng = random.Random(seed)
    low = rng.uniform(-1, 1) * 10 ** rng.randint(-4, 6)
    high = low + rng.random() * 10 ** rng.randint(-3, 6) + 1e-4
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    margin = 1e-6 * (high - low)
    assert all(low - margin <= tick <= high + margin for tick in ticks)
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6


def test_logarithmic_ticks_and_labels() -> None:
    assert log_ticks(0.004, 2.0) == [0.01, 0.1, 1.0]
    assert log_ticks(0.03, 1.0) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1.0])
    assert 2 <= len(log_ticks(1e-30, 1e30)) <= 6
    labels = {0: "0", 0.25: "0.25", 1000: "1000", 20_000: "20k", 1_500_000: "1.5M", 2.5e9: "2.5G", 1e-5: "1e-05"}
    assert {value: tick_label(value) for value in labels} == labels


def test_thinning_keeps_ends_order_and_mean() -> None:
    rng = random.Random(1)
    points = [(float(x), rng.random()) for x in range(2 + 298 * 7)]
    thinned = thin(rng.sample(points, len(points)))
    assert len(thinned) == MOST_POINTS
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])
    assert thinned == sorted(thinned)
    inner = [y for _, y in points[1:-1]]
    assert sum(y for _, y in thinned[1:-1]) / 298 == pytest.approx(sum(inner) / len(inner), abs=1e-12)
    assert thin(points[:5]) == points[:5]
    long = [(float(i), 1 + math.sin(i)) for i in range(100_000)]
    assert len(line_chart("t", "x", "y", {"a": long, "b": long})) < 26_000


def test_line_chart_draws_to_scale() -> None:
    [points] = series_paths(line_chart("t", "x", "y", {"only": [(0, 1.0), (50, 2.0), (100, 3.0)]}))
    assert [x for x, _ in points] == [LEFT, (LEFT + RIGHT) / 2, RIGHT]
    assert points[0][1] > points[1][1] > points[2][1]  # larger values are higher up
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.11)
    assert points[0][1] < BOTTOM


def test_line_chart_turns_logarithmic_for_wide_ranges_only() -> None:
    wide = line_chart("t", "x", "loss", {"train": [(0, 1.0), (1, 0.1), (2, 0.01)]})
    assert "log scale" in wide
    [points] = series_paths(wide)
    assert points[1][1] - points[0][1] == pytest.approx(points[2][1] - points[1][1], abs=0.11)
    for last in (0.5, -0.01):
        assert "log scale" not in line_chart("t", "x", "loss", {"train": [(0, 1.0), (1, last)]})


def test_line_chart_tells_two_series_apart_without_colour_and_leaves_out_what_is_not_finite() -> None:
    given = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
    svg = line_chart("t", "x", "y", {"train": given, "validation": [(0, 2), (1, 3)], "none": []})
    assert [len(points) for points in series_paths(svg)] == [2, 2]
    assert "stroke-dasharray" in svg
    assert "validation from 2 to 3" in svg


@pytest.mark.parametrize("points", [[(5, 2.0)], [(0, 0.0), (1, 0.0)], [(3, 7.0), (3, 7.0)]])
def test_line_chart_of_one_value(points: list[tuple[float, float]]) -> None:
    for path in series_paths(line_chart("t", "x", "y", {"a": points})):
        assert all(math.isfinite(x) and math.isfinite(y) for x, y in path)


def test_nothing_to_draw_is_refused() -> None:
    for nothing in ([], [math.nan]):
        for draw in (
            lambda: line_chart("t", "x", "y", {"a": [(0, value) for value in nothing]}),  # noqa: B023
            lambda: histogram("t", "x", nothing),  # noqa: B023
            lambda: bars("t", [("a", value) for value in nothing]),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="no finite values"):
                draw()


def test_names_are_escaped() -> None:
    parse(line_chart("<t>", "<x>", "&y", {"<a>": [(0, 1), (1, 2)], '"b"': [(0, 1)]}))
    parse(bars("<t>", [("<script>", 3)]))
    parse(histogram("&", "<x>", [1.0, 2.0]))


def test_histogram_counts_every_value() -> None:
    rng = random.Random(0)
    values = [rng.gauss(0.3, 0.1) for _ in range(5000)]
    heights = lengths(histogram("t", "x", [*values, math.nan]), "height")
    counts = [0] * 40
    for value in values:
        counts[min(int((value - min(values)) / (max(values) - min(values)) * 40), 39)] += 1
    expected = [n / max(counts) * max(heights) for n in counts if n]
    assert heights == pytest.approx(expected, abs=0.11)  # SVG units, printed with one decimal
    assert len(lengths(histogram("t", "x", [0.5] * 10), "height")) == 1


def test_bars_are_as_long_as_their_values() -> None:
    svg = bars("t", [("list", 200), ("kept", 50), ("none", 0)])
    widths = lengths(svg, "width")
    assert widths[1] == pytest.approx(widths[0] / 4, abs=0.1)
    assert widths[2] == 1
    assert "50 (25.0%)" in "".join(parse(svg).itertext())
    small = bars("t", [("first", 0.02), ("second", 0.0811111), ("below", -0.01)], counts=False)
    widths = lengths(small, "width")
    assert widths[1] == WIDTH - 4
    assert widths[0] == pytest.approx(widths[1] * 0.02 / 0.0811111, abs=0.1)
    assert widths[2] == 1
    assert "second 0.08111" in small
    assert "%" not in "".join(parse(small).itertext())
    parse(bars("t", [("nothing at all", 0)]))
