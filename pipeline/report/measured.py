"""What the evaluation measured besides its claims: more figures by model, and whether pictures are copies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluate.figure import difference, short
from pipeline.graph.artifacts import Artifact
from pipeline.progress import counted
from pipeline.report.evaluation import strips
from pipeline.report.markup import attempt, number, section, table, text
from pipeline.report.pictures import Album
from pipeline.store import Store
from pipeline.store.records import read_blob

FIGURES = "evaluation.json"
MEMORISATION = "m"  # the line of its figures
LOOK = (
    "For information: nothing here holds or fails. The difference is that of value and baseline, with its 95% interval "
    "where a figure has a value for each row."
)
LOOK_FOR_COPIES = (
    "Drawn pictures that are nearer to training pictures than held-out ones are would be remembered, not made. "
    "Distances are 1 - cosine, by the bundle's CLIP."
)


def measured_sections(store: Store, artifacts: Mapping[str, Artifact], album: Album) -> str:
    """Memorisation, and more figures; "" before there is an evaluation, or where it has none."""
    if "evaluation" not in artifacts or FIGURES not in artifacts["evaluation"].blobs:
        return ""
    artifact = artifacts["evaluation"]
    document = json.loads(read_blob(store, artifact.blobs[FIGURES]))
    plain = [figure for figure in document["figures"] if figure["holds"] is None and not figure["note"]]
    copies = [figure for figure in plain if figure["line"] == MEMORISATION]
    others = [figure for figure in plain if figure["line"] != MEMORISATION]
    made = ""
    if copies or "nearest.png" in artifact.blobs:
        distances = table(HEAD, map(_row, copies), numeric=(1, 2, 4)) if copies else ""
        closest = attempt("nearest.png of the evaluation", _closest, store, artifact, album)
        made += section("memorisation", "Made or remembered?", LOOK_FOR_COPIES, distances, closest)
    if others:
        made += section("more-figures", "More figures", LOOK, _by_model(others))
    return made


HEAD = ("figure", "value", "baseline", "difference", "rows")


def _by_model(figures: Sequence[Mapping[str, Any]]) -> str:
    """A table a model, to be unfolded."""
    parts = []
    for model in dict.fromkeys(figure["model"] for figure in figures):
        rows = [_row(figure, model) for figure in figures if figure["model"] == model]
        inner = table(HEAD, rows, numeric=(1, 2, 4))
        many = counted(len(rows), "figure")
        parts.append(f"<details><summary>{text(model)}: {many}</summary>\n{inner}</details>\n")
    return "".join(parts)


def _row(figure: Mapping[str, Any], model: str = "") -> tuple[str, ...]:
    """One figure; its sentence without the ``model`` that stands above the table."""
    said = f"<bdi>{text(str(figure['says']).removeprefix(f'{model}: '))}</bdi>"
    values = (text(short(figure[name])) if figure[name] is not None else "" for name in ("value", "baseline"))
    return said, *values, text(difference(figure)), f"{number(figure['rows'])} {text(figure['split'])}"


def _closest(store: Store, artifact: Artifact, album: Album) -> str:
    closest = artifact.metrics["closest"]
    captions = [f"{short(pair['distance'])}: {pair['caption']}" for pair in closest]
    said = (
        "Above, of all pictures drawn from captions alone, those that are nearest to a training picture, the nearest "
        "first; below, that training picture. The number is their distance."
    )
    title = "Drawn pictures and the training pictures nearest to them"
    return strips(store, artifact, "nearest.png", captions, title, said, album)
