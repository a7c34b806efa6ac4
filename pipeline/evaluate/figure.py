"""One measured figure, and the table of claims that such figures hold up. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Json = Mapping[str, Any]  # of one figure
DOCUMENT = "evaluation.json"  # the files of an evaluation
STRIP = "held-out.png"
NAMES = {
    "decoder": "the decoder, given the image's own embedding,",
    "ar_prior": "the AR prior",
    "diffusion_prior": "the diffusion prior",
    "upsampler_256": "the upsampler to 256 px",
    "upsampler_1024": "the upsampler to 1024 px",
}


@dataclass(frozen=True)
class Figure:
    """Compares a value of one model with a baseline, on rows of one split.

    Attributes:
        claim: Name of the claim that the figure belongs to; figures of one claim are one line of the table.
        text: Sentence of that claim.
        model: Model that is measured.
        name: Name of the figure, one of its model's.
        says: Name of the figure within its claim, such as "top" or "ridge regression".
        value: Mean over the rows.
        baseline: The same without the model, or without what it claims to use.
        interval: 95% interval of value - baseline.
        holds: Outcome: True where the figure is as its claim says; None if it was not measured.
        rows: Number of rows.
        split: Their split.
        note: Reason why it was not measured, or a remark that a reader needs.
        trained: The same value of rows that the models were trained on; None where it was not measured.
        better: Side of the baseline on which the value should be, "above" or "below".
        values: Values of the rows, to six digits: bundles are compared row by row. None where they cannot be.
        groups: Group of each row of ``values``, as a number.
    """

    claim: str
    text: str
    model: str
    name: str
    says: str
    value: float | None = None
    baseline: float | None = None
    interval: tuple[float, float] | None = None
    holds: bool | None = None
    rows: int = 0
    split: str = ""
    note: str = ""
    trained: float | None = None
    better: str = "above"
    values: tuple[float, ...] | None = None
    groups: tuple[int, ...] | None = None

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


def by_claim(figures: Sequence[Json]) -> list[list[Json]]:
    """Returns the figures of each claim, in order of their first."""
    found: dict[str, list[Json]] = {}
    for figure in figures:
        found.setdefault(figure["claim"], []).append(figure)
    return list(found.values())


def holds(of_claim: Sequence[Json]) -> bool | None:
    """Returns whether a claim holds: all its figures that were measured do; None where none was."""
    known = [figure["holds"] for figure in of_claim if figure["holds"] is not None]
    return all(known) if known else None


def measured(figures: Sequence[Json]) -> bool:
    """Returns whether any figure was measured."""
    return any(figure["holds"] is not None for figure in figures)


def without_values(figures: Sequence[Json]) -> list[dict[str, Any]]:
    """Returns the figures without values of rows, for a record, which has to be small; evaluation.json has them."""
    return [{name: value for name, value in figure.items() if name not in ("values", "groups")} for figure in figures]


def short(value: float | None, unknown: str = "?") -> str:
    """Returns a number with four digits, and no more than four decimals; ``unknown`` for None."""
    if value is None:
        return unknown
    return f"{value:.4f}".rstrip("0").rstrip(".") if 0.001 <= abs(value) < 10 else f"{value:.4g}"


def difference(value: float | None, baseline: float | None, interval: Sequence[float | None] | None) -> str:
    """Returns for example '+0.12 (0.1 to 0.14)', the difference and its 95% interval."""
    if value is None or baseline is None:
        return ""
    text = ("+" if value >= baseline else "") + short(value - baseline)
    return f"{text} ({short(interval[0])} to {short(interval[1])})" if interval else text


def count(figures: Sequence[Json]) -> str:
    """Returns for example '14 of 15 claims hold on held-out rows, 1 not measured', or why nothing was measured."""
    known = [holds(of_claim) for of_claim in by_claim(figures)]
    if not measured(figures):
        return f"Nothing was measured: {'; '.join(dict.fromkeys(figure['note'] for figure in figures))}"
    missing = f", {known.count(None)} not measured" if None in known else ""
    return f"{known.count(True)} of {len(known) - known.count(None)} claims hold on held-out rows{missing}"


def as_text(figures: Sequence[Json]) -> str:
    """Returns the claims as plain text, a line each; one line in all where nothing was measured.

    The line of a claim that does not hold names the figures that fail, each with its baseline; the report has the rest.
    """
    out = [f"Does it learn? {count(figures)}"]
    for of_claim in by_claim(figures) if measured(figures) else ():
        held = holds(of_claim)
        mark = {True: "yes", False: "NO", None: "-"}[held]
        out.append(f"  {mark:4}{of_claim[0]['text']}{'' if held else ': ' + _why_not(of_claim)}")
    return "\n".join(out)


def _why_not(of_claim: Sequence[Json]) -> str:
    failing = [figure for figure in of_claim if figure["holds"] is False]
    figures = [f"{figure['says']} {short(figure['value'])} ({short(figure['baseline'])})" for figure in failing]
    return "; ".join(figures or dict.fromkeys(figure["note"] for figure in of_claim))
