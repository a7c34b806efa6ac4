"""What the report shows of the evaluation: whether the models have learnt, line by line, and pictures side by side."""

from __future__ import annotations

import io
from collections.abc import Container, Mapping, Sequence
from typing import Any

from pipeline.evaluate.figure import LINES, difference, measured, short
from pipeline.graph.artifacts import Artifact
from pipeline.report.markup import attempt, figure, note, number, section, table, text
from pipeline.report.pictures import Album
from pipeline.store import Store
from pipeline.store.records import read_blob

LOOK = (
    "All of this is measured on rows that taught nothing. A tick is a claim that holds, a cross one that fails; the "
    "difference is that of value and baseline, ± its standard error or with its 95% interval."
)
MARKS = {True: '<span title="holds">✓</span>', False: '<span title="fails">✗</span>', None: "–"}
DRAWN = {
    "decoder": "the decoder from the image's own embedding",
    "ar_prior": "AR prior and decoder from the caption",
    "diffusion_prior": "diffusion prior and decoder from the caption",
}


def evaluation_section(store: Store, artifacts: Mapping[str, Artifact], album: Album) -> str:
    """The table of claims, and the grid; "" before there is an evaluation."""
    if "evaluation" not in artifacts:
        return ""
    artifact = artifacts["evaluation"]
    if not measured(artifact.metrics["figures"]):
        why = note(f"{artifact.metrics['holds']}.")
        return section("evaluation", "Does it learn?", "Claims are measured on held-out rows.", why)
    summary = attempt("The summary of the evaluation", _summary, artifact)
    claims = attempt("The table of the evaluation", _table, artifact)
    grid = attempt("comparison.png of the evaluation", _comparison, store, artifact, album)
    guided = attempt("guidance.png of the evaluation", _guidance, store, artifact, album)
    return section("evaluation", "Does it learn?", LOOK, summary, claims, grid, guided)


def _summary(artifact: Artifact) -> str:
    return f"<p>{text(artifact.metrics['holds'])}.</p>\n"


def _table(artifact: Artifact) -> str:
    rows = [_row(found) for found in artifact.metrics["figures"]]
    shown = {found["line"] for found in artifact.metrics["figures"]}
    return table(("", "claim", "value", "baseline", "difference", "rows"), rows, numeric=(2, 3, 5)) + _legend(shown)


def _row(found: Mapping[str, Any]) -> tuple[str, ...]:
    said = f"({text(found['line'])}) <bdi>{text(found['says'])}</bdi>"
    if found["holds"] is None:
        why = f"not measured: {found['note']}"
        return MARKS[None], f"{said} <span class='quiet'>{text(why)}</span>", "", "", "", ""
    values = (text(short(found["value"])), text(short(found["baseline"])), text(difference(found)))
    return MARKS[found["holds"]], said, *values, f"{number(found['rows'])} {text(found['split'])}"


def _legend(shown: Container[str]) -> str:
    items = "".join(f"<li>({line}) {text(claim)}</li>\n" for line, claim in LINES.items() if line in shown)
    return f"<details><summary>What the lines claim</summary>\n<ul>\n{items}</ul>\n</details>\n"


def _comparison(store: Store, artifact: Artifact, album: Album) -> str:
    """The pictures of some captions, below one another the ways to make them."""
    models = [found["model"] for found in artifact.metrics["figures"]]
    lines = ["the real picture", *(said for name, said in DRAWN.items() if name in models)]
    said = f"From above: {'; '.join(lines)}."
    return strips(store, artifact, "comparison.png", artifact.metrics["captions"], "Held-out captions", said, album)


def _guidance(store: Store, artifact: Artifact, album: Album) -> str:
    """What the decoder's guidance does to the same embeddings and noise; "" where that was not drawn."""
    if "guidance.png" not in artifact.blobs:
        return ""
    weights = ", ".join(f"{weight:g}" for weight in artifact.metrics["guidances"])
    said = f"The decoder from the images' own embeddings and the same noise. From above: guidance {weights}."
    return strips(store, artifact, "guidance.png", artifact.metrics["captions"], "Guidance", said, album)


def strips(
    store: Store, artifact: Artifact, name: str, captions: Sequence[str], title: str, said: str, album: Album
) -> str:
    """The columns of the grid ``name``, each with its caption below.

    Of a grid with other people's pictures, which has licences, only the columns that may be shown.
    """
    from PIL import Image

    if name not in artifact.blobs:
        return note(f"There is no {name}: there were no held-out pictures to draw.")
    licenses = artifact.metrics["licenses"].get(name)
    grid = Image.open(io.BytesIO(read_blob(store, artifact.blobs[name]))).convert("RGB")
    side = grid.width // len(captions)
    cells = []
    for i, caption in enumerate(captions):
        if licenses is None or album.may_show(licenses[i]):
            strip = io.BytesIO()
            grid.crop((side * i, 0, side * (i + 1), grid.height)).save(strip, "PNG")
            picture = album.image(strip.getvalue(), grid.height, f"{title}: {caption}", most=100_000)
            cells.append(figure(picture, f"<bdi>{text(caption, 90)}</bdi>"))
    return f'<h3>{title}</h3>\n<p>{said}</p>\n<div class="strips">\n{"".join(cells)}</div>\n'
