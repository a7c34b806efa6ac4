"""Shows the evaluation: claims that hold or fail, further figures, copies, the current release, images side by side."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from PIL import Image

from pipeline.evaluate.figure import measured, short
from pipeline.report.claims import CLAIMS, claims, numbers_of, shown_figure
from pipeline.report.html import PARTS, attempt, note, template
from pipeline.report.inputs import ReportInput

FIGURES = "evaluation.json"
MEMORISATION = "m"  # the line of its figures
DRAWN = {
    "decoder": "the decoder from the image's own embedding",
    "ar_prior": "AR prior and decoder from the caption",
    "diffusion_prior": "diffusion prior and decoder from the caption",
}
MARK = {True: "trained on", False: "held out"}
OPEN = ("comparison.png", "nearest.png")  # the others are unfolded by a click
EVALUATION = template("evaluation.html")


def evaluation_section(given: ReportInput) -> Markup:
    """Shows the table of claims, and the grid; empty before there is an evaluation."""
    if "evaluation" not in given.artifacts:
        return Markup()
    artifact = given.artifacts["evaluation"]
    if not measured(artifact.metrics["figures"]):
        return EVALUATION.evaluation([attempt("The claims", claims, artifact.metrics)])
    parts = [
        attempt("The table of the evaluation", claims, artifact.metrics),
        attempt("names.png of the evaluation", _names, given),
        attempt("comparison.png of the evaluation", _comparison, given),
        attempt("guidance.png of the evaluation", _guidance, given),
    ]
    return EVALUATION.evaluation(parts)


def _names(given: ReportInput) -> Markup:
    """Shows what is drawn from captions of held-out rows beside those of training rows; empty where nothing is."""
    artifact = given.artifacts["evaluation"]
    if "names.png" not in artifact.blobs:
        return Markup()
    captions = [f"{MARK[row['split'] == 'train']}: {row['caption']}" for row in artifact.metrics["named"]]
    said = f"{_from_above(artifact.metrics, [name for name in DRAWN if name != 'decoder'])} Models were trained on the "
    said += "rows marked so, and on none of the others."
    return strips(given, "names.png", captions, "Held-out rows beside training rows", said)


def _from_above(metrics: Mapping[str, Any], names: Sequence[str]) -> str:
    models = [found["model"] for found in metrics["figures"]]
    return f"From above: {'; '.join(['the real image', *(DRAWN[name] for name in names if name in models)])}."


def _comparison(given: ReportInput) -> Markup:
    """Shows the images of some captions, below one another the ways to make them."""
    metrics = given.artifacts["evaluation"].metrics
    said = _from_above(metrics, list(DRAWN))
    return strips(given, "comparison.png", metrics["captions"], "Held-out captions", said)


def _guidance(given: ReportInput) -> Markup:
    """Shows what the decoder's guidance does to the same embeddings and noise; empty where that was not drawn."""
    artifact = given.artifacts["evaluation"]
    if "guidance.png" not in artifact.blobs:
        return Markup()
    weights = ", ".join(f"{weight:g}" for weight in artifact.metrics["guidances"])
    said = f"The decoder from the images' own embeddings and the same noise. From above: guidance {weights}."
    return strips(given, "guidance.png", artifact.metrics["captions"], "Guidance", said)


def measured_sections(given: ReportInput) -> Markup:
    """Shows memorisation, and more figures; empty before there is an evaluation, or where it has none."""
    if "evaluation" not in given.artifacts or FIGURES not in given.artifacts["evaluation"].blobs:
        return Markup()
    artifact = given.artifacts["evaluation"]
    document = json.loads(given.read(artifact.blobs[FIGURES]))
    plain = [figure for figure in document["figures"] if figure["holds"] is None and not figure["note"]]
    copies = [shown_figure(figure) for figure in plain if figure["line"] == MEMORISATION]
    others = [figure for figure in plain if figure["line"] != MEMORISATION]
    made = Markup()
    if copies or "nearest.png" in artifact.blobs:
        closest = attempt("nearest.png of the evaluation", _closest, given)
        made += EVALUATION.memorisation([CLAIMS.rows(copies) if copies else "", closest])
    if others:
        made += EVALUATION.more([_by_model(others)])
    return made


def _by_model(figures: Sequence[Mapping[str, Any]]) -> Markup:
    """Shows a table a model, to be unfolded."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for figure in figures:
        # The model's name stands above the table.
        says = str(figure["says"]).removeprefix(f"{figure['model']}: ")
        tables.setdefault(figure["model"], []).append({**figure, "says": says, **numbers_of(figure)})
    return EVALUATION.by_model(tables)


def _closest(given: ReportInput) -> Markup:
    closest = given.artifacts["evaluation"].metrics["closest"]
    captions = [f"{short(pair['distance'])}: {pair['caption']}" for pair in closest]
    said = (
        "Above, of all images drawn from captions alone, those that are nearest to a training image, the nearest "
        "first; below, that training image. The number is their distance."
    )
    title = "Drawn images and the training images nearest to them"
    return strips(given, "nearest.png", captions, title, said)


def strips(given: ReportInput, name: str, captions: Sequence[str], title: str, said: str) -> Markup:
    """Shows the columns of the grid ``name``, each with its caption below.

    Of a grid with other people's images, which has licences, only the columns that may be shown.
    """
    artifact = given.artifacts["evaluation"]
    if name not in artifact.blobs:
        return note(f"{name} was not drawn: the evaluation had no held-out images.")
    licenses = artifact.metrics["licenses"].get(name)
    grid = Image.open(io.BytesIO(given.read(artifact.blobs[name]))).convert("RGB")
    side = grid.width // len(captions)
    cells = []
    for i, caption in enumerate(captions):
        if licenses is None or given.album.may_show(licenses[i]):
            strip = io.BytesIO()
            grid.crop((side * i, 0, side * (i + 1), grid.height)).save(strip, "PNG")
            cells.append(
                (given.album.image(strip.getvalue(), grid.height, f"{title}: {caption}", most=100_000), caption)
            )
    return PARTS.folded(title, EVALUATION.strips(said, cells), name.removesuffix(".png"), name in OPEN)
