"""Shows the samples: the final images with their captions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from pipeline.report.html import attempt, facts, template
from pipeline.report.inputs import ReportInput

SHOWN = 12
SAMPLES = template("samples.html")


def samples_section(given: ReportInput) -> Markup:
    """Shows the first images, each with its caption and its 64 px beginning if it was kept; empty before the first."""
    if "samples" not in given.artifacts:
        return Markup()
    artifact = given.artifacts["samples"]
    names = sorted(name for name in artifact.blobs if re.fullmatch(r"\d+\.png", name))
    cells = [attempt(f"Sample {name}", _sample, given, name) for name in names[:SHOWN]]
    settings = attempt("The settings of the samples", _settings, artifact.metrics)
    return SAMPLES.samples([SAMPLES.grid(cells, len(names) - SHOWN), settings])


def _sample(given: ReportInput, name: str) -> Markup:
    """Shows one image. The number in its name is its place in the ``captions`` and ``seeds`` of the metrics."""
    artifact = given.artifacts["samples"]
    place = int(name.removesuffix(".png"))
    caption = _at(artifact.metrics.get("captions"), place)
    seed = _at(artifact.metrics.get("seeds"), place)
    alt = f"sample for: {caption}" if caption is not None else f"sample {place}"
    image = attempt(f"Sample {name}", _image, given, artifact.blobs[name], 512, alt)
    small = name.replace(".png", "-64.png")
    begun = Markup()
    if small in artifact.blobs:
        begun = attempt(f"Sample {small}", _image, given, artifact.blobs[small], 64, f"sample {place} at 64 px")
    return SAMPLES.sample(image, begun, caption, seed)


def _image(given: ReportInput, blob: str, side: int, alt: str) -> Markup:
    return given.album.image(given.read(blob), side, alt, most=110_000)


def _at(values: Any, place: int) -> Any:
    return values[place] if isinstance(values, list) and place < len(values) else None


def _settings(metrics: Mapping[str, Any]) -> Markup:
    settings = metrics.get("settings")
    return SAMPLES.settings(facts(settings)) if settings else Markup()
