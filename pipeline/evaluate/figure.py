"""One measured figure, and the table of those that hold or fail. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LINES = {
    "a": "every conditional model uses its condition",
    "b": "the AR prior knows more than the codes' frequencies",
    "c": "samples of the priors are near the right image embeddings and spread like them, palette aside too",
    "d": "the decoder paints the background that the caption names",
    "e": "the upsamplers beat bicubic interpolation",
    "f": "CLIP ranks real above trained above early above shuffled",
    "g": "images of captions that differ in the name alone are told apart",
}


@dataclass(frozen=True)
class Figure:
    """What one line of the evaluation found for one ``model``.

    ``says`` is the claim in plain words. ``value`` is compared with ``baseline``, over ``rows`` rows of ``split``;
    ``difference`` is value - baseline, with its standard ``error`` or its 95% ``interval``. ``holds`` is None where
    there is nothing to hold: a figure for information, or one that was not measured, and ``note`` says why.
    ``values`` are those of each row, to six digits, whose mean is ``value``, and ``claim`` says on which side of the
    baseline they should be ("above" or "below"): where both are given, bundles can be compared row by row.
    """

    line: str
    model: str
    name: str
    says: str
    value: float | None = None
    baseline: float | None = None
    difference: float | None = None
    error: float | None = None
    interval: tuple[float, float] | None = None
    holds: bool | None = None
    rows: int = 0
    split: str = ""
    note: str = ""
    claim: str | None = None
    values: tuple[float, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns plain values; numbers that are not finite become None."""
        return finite(asdict(self))


def finite(value: Any) -> Any:
    """Returns a JSON value with null in place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(name): finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def judged(figures: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the figures, as JSON, that claim something: they hold, fail or could not be measured."""
    return [figure for figure in figures if figure["holds"] is not None or figure["note"]]


def measured(figures: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether any claim of the figures, as JSON, holds or fails."""
    return any(figure["holds"] is not None for figure in figures)


def without_values(figures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the figures, as JSON, for a record, which is small: the values of rows are in evaluation.json."""
    return [{name: value for name, value in figure.items() if name != "values"} for figure in figures]


def mark(figure: Mapping[str, Any]) -> str:
    """Returns "yes", "NO", or "-" for what was not measured."""
    return {True: "yes", False: "NO"}.get(figure["holds"], "-")


def short(value: float | None) -> str:
    """Returns four digits, and no more than four places."""
    if value is None:
        return "?"
    return f"{value:.4f}".rstrip("0").rstrip(".") if 0.001 <= abs(value) < 10 else f"{value:.4g}"


def difference(figure: Mapping[str, Any]) -> str:
    """Returns for example '+0.12 ± 0.01' (standard error) or '+0.12 (0.1 to 0.14)' (95% interval)."""
    if figure["difference"] is None:
        return ""
    text = ("+" if figure["difference"] >= 0 else "") + short(figure["difference"])
    if figure["error"] is not None:
        return f"{text} ± {short(figure['error'])}"
    if figure["interval"] is not None:
        return f"{text} ({short(figure['interval'][0])} to {short(figure['interval'][1])})"
    return text


def count(figures: Sequence[Mapping[str, Any]]) -> str:
    """Returns for example '18 of 20 hold, 2 not measured', or that nothing was measured, and why."""
    known = [figure["holds"] for figure in judged(figures) if figure["holds"] is not None]
    missing = [figure["note"] for figure in judged(figures) if figure["holds"] is None]
    if not known:
        return f"Nothing was measured: {'; '.join(dict.fromkeys(missing))}"
    return f"{sum(known)} of {len(known)} hold" + (f", {len(missing)} not measured" if missing else "")


def as_text(figures: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table as plain text, under a heading for each line; one line where nothing was measured."""
    out = [f"Does it learn? {count(figures)}"]
    for line, claim in LINES.items() if measured(figures) else ():
        of_line = [figure for figure in judged(figures) if figure["line"] == line]
        out += [f"({line}) {claim}"] if of_line else []
        for figure in of_line:
            found = f"{short(figure['value'])} against {short(figure['baseline'])}, {difference(figure)}"
            rest = f"{found}, {figure['rows']} {figure['split']} rows"
            if figure["holds"] is None:
                rest = f"not measured: {figure['note']}"
            out.append(f"  {mark(figure):4}{figure['says']}: {rest}")
    return "\n".join(out)
