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


def test_logarithmic_ticks() -> None:
    assert log_ticks(0.004, 2.0) == [0.01, 0.1, 1.0]
    assert log_ticks(0.03, 1.0) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1.0])
    assert 2 <= len(log_ticks(1e-30, 1e30)) <= 6


def test_tick_labels_are_short() -> None:
    assert [tick_label(v) for v in (0, 0.25, 1000, 20_000, 1_500_000, 2.5e9, 1e-5)] == [
        *("0", "0.25", "1000", "20k", "1.5M", "2.5G", "1e-05")
    ]


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
    assert "log scale" not in line_chart("t", "x", "loss", {"train": [(0, 1.0), (1, 0.5)]})
    assert "log scale" not in line_chart("t", "x", "loss", {"train": [(0, 100.0), (1, -0.01)]})


def test_line_chart_tells_two_series_apart_without_colour() -> None:
    svg = line_chart("t", "x", "y", {"train": [(0, 1), (1, 2)], "validation": [(0, 2), (1, 3)]})
    assert len(series_paths(svg)) == 2
    assert "stroke-dasharray" in svg
    assert "train" in svg
    assert "validation from 2 to 3" in svg


def test_line_chart_leaves_out_what_is_not_finite() -> None:
    given = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
    [points] = series_paths(line_chart("t", "x", "y", {"a": given, "b": []}))
    assert len(points) == 2


@pytest.mark.parametrize("points", [[(5, 2.0)], [(0, 0.0), (1, 0.0)], [(3, 7.0), (3, 7.0)]])
def test_line_chart_of_one_value(points: list[tuple[float, float]]) -> None:
    for path in series_paths(line_chart("t", "x", "y", {"a": points})):
        assert all(math.isfinite(x) and math.isfinite(y) for x, y in path)


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(0, math.nan)]}])
def test_line_chart_of_nothing_is_refused(series: dict[str, list[tuple[float, float]]]) -> None:
    with pytest.raises(ValueError, match="no finite values"):
        line_chart("t", "x", "y", series)


def test_a_long_series_stays_small() -> None:
    points = [(float(i), 1 + math.sin(i)) for i in range(100_000)]
    assert len(line_chart("t", "x", "y", {"a": points, "b": points})) < 26_000


def test_names_are_escaped() -> None:
    parse(line_chart("<t>", "<x>", "&y", {"<a>": [(0, 1), (1, 2)], '"b"': [(0, 1)]}))
    parse(bars("<t>", [("<script>", 3)]))
    parse(histogram("&", "<x>", [1.0, 2.0]))


def test_histogram_counts_every_value() -> None:
    rng = random.Random(0)
    values = [rng.gauss(0.3, 0.1) for _ in range(5000)] + [math.nan]
    root = parse(histogram("t", "x", values))
    heights = [float(rect.get("height", "")) for rect in root.iter("rect")]
    low, high = min(values[:-1]), max(values[:-1])
    counts = [0] * 40
    for value in values[:-1]:
        counts[min(int((value - low) / (high - low) * 40), 39)] += 1
    expected = [n / max(counts) * max(heights) for n in counts if n]
    assert heights == pytest.approx(expected, abs=0.11)  # SVG units, printed with one decimal


def test_histogram_of_equal_values_and_of_none() -> None:
    assert len(list(parse(histogram("t", "x", [0.5] * 10)).iter("rect"))) == 1
    with pytest.raises(ValueError, match="no finite values"):
        histogram("t", "x", [math.nan])


def test_bars_are_as_long_as_their_values() -> None:
    root = parse(bars("t", [("list", 200), ("kept", 50), ("none", 0)]))
    widths = [float(rect.get("width", "")) for rect in root.iter("rect")]
    assert widths[1] == pytest.approx(widths[0] / 4, abs=0.1)
    assert widths[2] == 1
    assert "50 (25.0%)" in "".join(root.itertext())
    parse(bars("t", [("nothing at all", 0)]))
    for nothing in ([], [("a", 1.0), ("b", math.nan)]):
        with pytest.raises(ValueError, match="no finite values"):
            bars("t", nothing)


def test_bars_of_small_values_have_their_digits_and_no_share() -> None:
    root = parse(bars("t", [("first", 0.02), ("second", 0.0811111), ("below", -0.01)], counts=False))
    widths = [float(rect.get("width", "")) for rect in root.iter("rect")]
    assert widths[1] == WIDTH - 4
    assert widths[0] == pytest.approx(widths[1] * 0.02 / 0.0811111, abs=0.1)
    assert widths[2] == 1
    said = "".join(root.itertext())
    assert "second 0.08111" in said
    assert "%" not in said
