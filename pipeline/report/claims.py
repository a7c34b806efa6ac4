"""Shows claims that hold or fail: grouped, those that fail first, each with its interval against the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.evaluate.figure import LINES, difference, short
from pipeline.report.html import number, template, text

NORMAL_95 = 1.96  # standard errors on either side of a 95% interval
MANY = 3.0  # standard errors that some claims have to clear
VARIANCE, VARIANCE_BAND = ", from 0.5 to 1.5", 0.5  # of the claim that a ratio is near 1
HALF = 110  # SVG units from the middle of a bar to its end
CLAIMS = template("claims.html")


class Bar(NamedTuple):
    """A difference on its own scale, in SVG units right of the baseline; what is better stands to the right.

    Attributes:
        middle: The difference.
        thick: Its 95% interval.
        thin: Three standard errors on either side, no longer than the dot where only the interval is known.
        band: Half the width around the baseline in which a claim holds, 0 where it has to be right of it.
        kind: "good", "bad" or "rest".
        said: What it shows, for a pointer and for screen readers.
    """

    middle: float
    thick: tuple[float, float]
    thin: tuple[float, float]
    band: float
    kind: str
    said: str


def claims(metrics: Mapping[str, Any]) -> Markup:
    """Shows every claim of an evaluation, in groups; what was not measured in one box; all numbers to be unfolded."""
    groups: dict[str, list[dict[str, Any]]] = {line: [] for line in LINES}
    unknown: dict[str, list[str]] = {}
    for figure in metrics["figures"]:
        if figure["holds"] is None:
            unknown.setdefault(figure["note"], []).append(f"({figure['line']}) {figure['says']}")
        else:
            groups.setdefault(figure["line"], []).append(shown_figure(figure))
    found = [
        (
            line,
            LINES.get(line, line),
            sum(figure["holds"] for figure in of_line),
            sorted(of_line, key=lambda figure: bool(figure["holds"])),
        )
        for line, of_line in groups.items()
        if of_line
    ]
    found.sort(key=lambda group: group[2] == len(group[3]))
    numbers = [{**figure, **numbers_of(figure)} for figure in metrics["figures"] if figure["holds"] is not None]
    return CLAIMS.claims(found, unknown, numbers)


def shown_figure(figure: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a figure with its bar and three digits of its values, its model apart from what it says."""
    says = str(figure["says"]).removeprefix(f"{figure['model']}: ")
    value, baseline = (
        f"{number:.3g}" if (number := figure[name]) is not None else "" for name in ("value", "baseline")
    )
    state = {True: "holds", False: "does not hold"}.get(figure["holds"], "for information")
    return {**figure, "says": says, "value": value, "baseline": baseline, "bar": bar_of(figure), "state": state}


def numbers_of(figure: Mapping[str, Any]) -> dict[str, str]:
    """Formats all numbers of one figure."""
    values = {name: short(figure[name]) if figure[name] is not None else "" for name in ("value", "baseline")}
    rows = f"{number(figure['rows'])} {text(figure['split'])}"
    return {**values, "difference": difference(figure), "rows": rows}


def bar_of(figure: Mapping[str, Any]) -> Bar | None:
    """Returns the bar of a figure's difference, None where it has none."""
    middle, error, says = figure["difference"], figure["error"] or 0.0, str(figure["says"])
    if middle is None:
        return None
    thick = figure["interval"] or (middle - NORMAL_95 * error, middle + NORMAL_95 * error)
    thin = (middle - MANY * error, middle + MANY * error)
    band = VARIANCE_BAND if VARIANCE in says else 0.0
    unit = HALF / (max(map(abs, (*thick, *thin, 1.2 * band))) or 1.0)
    falls = figure["claim"] == "below" or ", below " in says or figure.get("name") == "share_nearer"
    better = -unit if falls else unit
    ends = [(min(a * better, b * better), max(a * better, b * better)) for a, b in (thick, thin)]
    said = f"difference {difference(figure)}"
    kind = {True: "good", False: "bad"}.get(figure["holds"], "rest")
    return Bar(middle * better, ends[0], ends[1], band * unit, kind, said)
