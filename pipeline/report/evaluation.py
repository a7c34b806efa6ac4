"""Shows the evaluation: claims that hold or fail, further figures, copies, the current release, images side by side."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from PIL import Image

from pipeline.evaluate.figure import LINES, difference, measured, short
from pipeline.graph.artifacts import Artifact
from pipeline.graph.pointer import read_releases
from pipeline.release import compare
from pipeline.report.html import attempt, note, number, template, text
from pipeline.report.images import Album
from pipeline.store import Store
from pipeline.store.records import read_blob

FIGURES = "evaluation.json"
MEMORISATION = "m"  # the line of its figures
DRAWN = {
    "decoder": "the decoder from the image's own embedding",
    "ar_prior": "AR prior and decoder from the caption",
    "diffusion_prior": "diffusion prior and decoder from the caption",
}
EVALUATION = template("evaluation.html")


def evaluation_section(store: Store, artifacts: Mapping[str, Artifact], album: Album) -> Markup:
    """Shows the table of claims, and the grid; empty before there is an evaluation."""
    if "evaluation" not in artifacts:
        return Markup()
    artifact = artifacts["evaluation"]
    if not measured(artifact.metrics["figures"]):
        return EVALUATION.unmeasured([note(f"{artifact.metrics['holds']}.")])
    parts = [
        attempt("The table of the evaluation", _claims, artifact),
        attempt("comparison.png of the evaluation", _comparison, store, artifact, album),
        attempt("guidance.png of the evaluation", _guidance, store, artifact, album),
    ]
    return EVALUATION.evaluation(parts)


def _claims(artifact: Artifact) -> Markup:
    found = artifact.metrics["figures"]
    rows = [{**figure, **_numbers(figure)} for figure in found]
    lines = {figure["line"] for figure in found}
    legend = [(line, claim) for line, claim in LINES.items() if line in lines]
    return EVALUATION.claims(artifact.metrics["holds"], rows, legend)


def _numbers(figure: Mapping[str, Any]) -> dict[str, str]:
    """Formats the numbers of one figure."""
    values = {name: short(figure[name]) if figure[name] is not None else "" for name in ("value", "baseline")}
    rows = f"{number(figure['rows'])} {text(figure['split'])}"
    return {**values, "difference": difference(figure), "rows": rows}


def _comparison(store: Store, artifact: Artifact, album: Album) -> Markup:
    """Shows the images of some captions, below one another the ways to make them."""
    models = [found["model"] for found in artifact.metrics["figures"]]
    lines = ["the real image", *(said for name, said in DRAWN.items() if name in models)]
    said = f"From above: {'; '.join(lines)}."
    return strips(store, artifact, "comparison.png", artifact.metrics["captions"], "Held-out captions", said, album)


def _guidance(store: Store, artifact: Artifact, album: Album) -> Markup:
    """Shows what the decoder's guidance does to the same embeddings and noise; empty where that was not drawn."""
    if "guidance.png" not in artifact.blobs:
        return Markup()
    weights = ", ".join(f"{weight:g}" for weight in artifact.metrics["guidances"])
    said = f"The decoder from the images' own embeddings and the same noise. From above: guidance {weights}."
    return strips(store, artifact, "guidance.png", artifact.metrics["captions"], "Guidance", said, album)


def measured_sections(store: Store, artifacts: Mapping[str, Artifact], album: Album) -> Markup:
    """Shows memorisation, and more figures; empty before there is an evaluation, or where it has none."""
    if "evaluation" not in artifacts or FIGURES not in artifacts["evaluation"].blobs:
        return Markup()
    artifact = artifacts["evaluation"]
    document = json.loads(read_blob(store, artifact.blobs[FIGURES]))
    plain = [figure for figure in document["figures"] if figure["holds"] is None and not figure["note"]]
    copies = [{**figure, **_numbers(figure)} for figure in plain if figure["line"] == MEMORISATION]
    others = [figure for figure in plain if figure["line"] != MEMORISATION]
    made = Markup()
    if copies or "nearest.png" in artifact.blobs:
        closest = attempt("nearest.png of the evaluation", _closest, store, artifact, album)
        made += EVALUATION.memorisation([EVALUATION.figures(copies) if copies else "", closest])
    if others:
        made += EVALUATION.more([_by_model(others)])
    return made


def _by_model(figures: Sequence[Mapping[str, Any]]) -> Markup:
    """Shows a table a model, to be unfolded."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for figure in figures:
        # The model's name stands above the table.
        says = str(figure["says"]).removeprefix(f"{figure['model']}: ")
        tables.setdefault(figure["model"], []).append({**figure, "says": says, **_numbers(figure)})
    return EVALUATION.by_model(tables)


def _closest(store: Store, artifact: Artifact, album: Album) -> Markup:
    closest = artifact.metrics["closest"]
    captions = [f"{short(pair['distance'])}: {pair['caption']}" for pair in closest]
    said = (
        "Above, of all images drawn from captions alone, those that are nearest to a training image, the nearest "
        "first; below, that training image. The number is their distance."
    )
    title = "Drawn images and the training images nearest to them"
    return strips(store, artifact, "nearest.png", captions, title, said, album)


def strips(
    store: Store, artifact: Artifact, name: str, captions: Sequence[str], title: str, said: str, album: Album
) -> Markup:
    """Shows the columns of the grid ``name``, each with its caption below.

    Of a grid with other people's images, which has licences, only the columns that may be shown.
    """
    if name not in artifact.blobs:
        return note(f"{name} was not drawn: the evaluation had no held-out images.")
    licenses = artifact.metrics["licenses"].get(name)
    grid = Image.open(io.BytesIO(read_blob(store, artifact.blobs[name]))).convert("RGB")
    side = grid.width // len(captions)
    cells = []
    for i, caption in enumerate(captions):
        if licenses is None or album.may_show(licenses[i]):
            strip = io.BytesIO()
            grid.crop((side * i, 0, side * (i + 1), grid.height)).save(strip, "PNG")
            cells.append((album.image(strip.getvalue(), grid.height, f"{title}: {caption}", most=100_000), caption))
    return EVALUATION.strips(title, said, cells)


def release_section(store: Store, project: str, artifacts: Mapping[str, Artifact]) -> Markup:
    """Compares this bundle with the project's release; empty without an evaluation, or without another release."""
    if "evaluation" not in artifacts:
        return Markup()
    current = read_releases(store, project).current
    if current is None or current.bundle == artifacts["evaluation"].inputs["bundle"]:
        return Markup()
    new = compare.load_measured(store, artifacts["evaluation"])
    found = compare.evaluations(store, current.bundle)
    if new is None or not found:
        return EVALUATION.release([note(f"{current.bundle[:12]} has no evaluation here.")])
    old = compare.find_comparable(found, new)
    if old is None:
        obstacles = ", ".join(compare.obstacles(found[0], new))
        return EVALUATION.release([note(f"Not compared with {current.bundle[:12]}: {obstacles}.")])
    rows = [_changed(change) for change in compare.changes(old, new)]
    return EVALUATION.release([EVALUATION.changes(current.bundle[:12], new.bundle.key[:12], rows)])


def _changed(change: compare.Change) -> tuple[str, ...]:
    apart = difference({"difference": change.difference, "error": None, "interval": change.interval})
    values = short(change.then), short(change.now), apart, number(change.rows)
    return f"{change.model}: {change.name}", *values, change.verdict
