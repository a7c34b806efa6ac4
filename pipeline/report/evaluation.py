"""Shows the evaluation: a line for each claim with its figures, and generated images below the real ones."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from PIL import Image

from pipeline.evaluate.figure import NAMES, STRIP, by_claim, count, difference, holds, measured, short
from pipeline.graph.artifacts import Artifact
from pipeline.progress import counted
from pipeline.report.html import PARTS, Section, attempt, note, number, template, text
from pipeline.report.inputs import ReportInput

TITLE = "Held-out captions"
STATES = {True: ("good", "✓", "holds"), False: ("bad", "✗", "does not hold"), None: ("rest", "·", "not measured")}
BY_CHANCE = 0.025  # of the figures of models without an effect: what a 95% interval leaves on the side that is claimed
EVALUATION = template("evaluation.html")


def evaluation_section(given: ReportInput) -> Markup:
    """Shows the table of claims, and images; empty before there is an evaluation."""
    if "evaluation" not in given.artifacts:
        return Markup()
    artifact = given.artifacts["evaluation"]
    parts = [attempt("The table of the evaluation", lambda: claims(artifact.metrics["figures"]))]
    if STRIP in artifact.blobs:
        parts.append(attempt(f"{STRIP} of the evaluation", _strip, given, artifact))
    return Section.of(EVALUATION.evaluation, "evaluation", "Does it learn?", parts)


def claims(figures: Sequence[Mapping[str, Any]]) -> Markup:
    """Shows a line for each claim, those that fail first, with its figures; their intervals are to be unfolded."""
    if not measured(figures):
        return note(f"{count(figures)}.")
    found = [
        (of_claim[0]["text"], STATES[holds(of_claim)], [shown_figure(figure) for figure in of_claim])
        for of_claim in by_claim(figures)
    ]
    found.sort(key=lambda claim: claim[1] != STATES[False])
    known = sum(figure["holds"] is not None for figure in figures)
    return EVALUATION.claims(found, counted(known, "figure"), short(known * BY_CHANCE))


def shown_figure(figure: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a figure with all its numbers as text, "" where it has none, and how its state is shown."""
    shown = {name: short(figure[name], "") for name in ("value", "baseline", "trained")}
    shown["difference"] = difference(figure["value"], figure["baseline"], figure["interval"])
    shown["rows"] = f"{number(figure['rows'])} {text(figure['split'])}"
    return {**figure, **shown, "state": STATES[figure["holds"]]}


def _strip(given: ReportInput, artifact: Artifact) -> Markup:
    """Shows what was drawn for the first held-out captions; of other people's images only those that may be shown."""
    shown = artifact.metrics["shown"]
    drawn = (NAMES.get(model, model).rstrip(",") for model in shown["models"])
    said = f"From above: {'; '.join(['the real image', *drawn])}."
    grid = Image.open(io.BytesIO(given.read(artifact.blobs[STRIP]))).convert("RGB")
    side = grid.width // len(shown["captions"])
    cells = []
    for i, (caption, license) in enumerate(zip(shown["captions"], shown["licenses"], strict=True)):
        if given.album.may_show(license):
            strip = io.BytesIO()
            grid.crop((side * i, 0, side * (i + 1), grid.height)).save(strip, "PNG")
            said_of = f"{TITLE}: {caption}"
            cells.append((given.album.image(strip.getvalue(), grid.height, said_of, most=100_000), caption))
    return PARTS.folded(TITLE, EVALUATION.strips(said, cells), STRIP.removesuffix(".png"), True)
