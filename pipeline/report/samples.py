"""What the report shows of the samples: the final pictures with their captions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.graph.artifacts import Artifact
from pipeline.report.markup import attempt, facts, figure, note, number, section, text
from pipeline.report.pictures import Album
from pipeline.store import Store
from pipeline.store.records import read_blob

SHOWN = 12
LOOK = (
    "Look for pictures that show what their captions name, in colour and place; where only the detail is wrong, "
    "compare with the small picture: the decoder made that one, the upsamplers the rest."
)


def samples_section(store: Store, artifacts: Mapping[str, Artifact], album: Album) -> str:
    """The first pictures, each with its caption and, if it was kept, its 64 px beginning; "" before there are any."""
    if "samples" not in artifacts:
        return ""
    artifact = artifacts["samples"]
    names = sorted(name for name in artifact.blobs if re.fullmatch(r"\d+\.png", name))
    cells = [attempt(f"Sample {name}", _sample, store, artifact, name, album) for name in names[:SHOWN]]
    grid = f'<div class="samples">\n{"".join(cells)}</div>\n' if cells else note("It has no pictures among its files.")
    more = note(f"{len(names) - SHOWN} more are in the folder of samples.") if len(names) > SHOWN else ""
    settings = attempt("The settings of the samples", _settings, artifact.metrics)
    return section("samples", "Samples", LOOK, grid, more, settings)


def _sample(store: Store, artifact: Artifact, name: str, album: Album) -> str:
    """A picture and what it was asked for. The place in ``captions`` and ``seeds`` is the number in the name."""
    place = int(name.removesuffix(".png"))
    caption = _at(artifact.metrics.get("captions"), place)
    seed = _at(artifact.metrics.get("seeds"), place)
    alt = f"sample for: {caption}" if caption is not None else f"sample {place}"
    picture = attempt(f"Sample {name}", _picture, store, artifact, name, 512, alt, album)
    small = name.replace(".png", "-64.png")
    begun = ""
    if small in artifact.blobs:
        begun = attempt(f"Sample {small}", _picture, store, artifact, small, 64, f"sample {place} at 64 px", album)
    said = f"<bdi>{text(caption, 200)}</bdi>" if caption is not None else "no caption recorded"
    seeded = f' <span class="quiet">seed {number(seed)}</span>' if seed is not None else ""
    return figure(picture, f"{begun}<span>{said}{seeded}</span>")


def _picture(store: Store, artifact: Artifact, name: str, side: int, alt: str, album: Album) -> str:
    return album.image(read_blob(store, artifact.blobs[name]), side, alt, most=110_000)


def _at(values: Any, place: int) -> Any:
    return values[place] if isinstance(values, list) and place < len(values) else None


def _settings(metrics: Mapping[str, Any]) -> str:
    settings = metrics.get("settings")
    return f"<details><summary>Sampling settings</summary>\n{facts(settings)}</details>\n" if settings else ""
