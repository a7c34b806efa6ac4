"""Shows the samples: the final images with their captions."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from markupsafe import Markup

from pipeline.graph.artifacts import Artifact
from pipeline.report.html import Section, attempt, facts, template, text
from pipeline.report.inputs import ReportInput

SHOWN = 12
SAMPLES = template("samples.html")


def samples_section(given: ReportInput) -> Markup:
    """Shows the first images, each with its caption and the decoder's output if it was kept; empty before the first."""
    if "samples" not in given.artifacts:
        return Markup()
    artifact = given.artifacts["samples"]
    names = sample_names(artifact)
    cells = [attempt(f"Sample {name}", _sample, given, artifact, name) for name in names[:SHOWN]]
    settings = attempt("The settings of the samples", _settings, given, artifact, names[:SHOWN])
    return Section.of(SAMPLES.samples, "samples", "Samples", [SAMPLES.grid(cells, len(names) - SHOWN), settings])


def sample_names(samples: Artifact) -> list[str]:
    """Returns the names of the images among the blobs, in order."""
    return sorted(name for name in samples.blobs if re.fullmatch(r"\d+\.png", name))


def asked_for(samples: Artifact, name: str) -> tuple[str | None, int | None]:
    """Returns caption and seed of an image. The number in its name is its place in both lists of the metrics."""
    place = int(name.removesuffix(".png"))
    lists = (samples.metrics.get("captions"), samples.metrics.get("seeds"))
    caption, seed = (values[place] if isinstance(values, list) and place < len(values) else None for values in lists)
    return caption, seed


def _sample(given: ReportInput, artifact: Artifact, name: str) -> Markup:
    caption, seed = asked_for(artifact, name)
    place = int(name.removesuffix(".png"))
    alt = f"sample for: {caption}" if caption is not None else f"sample {place}"
    image = attempt(f"Sample {name}", sample_image, given, artifact.blobs[name], 512, alt)
    small = name.replace(".png", "-64.png")  # as pipeline.sampling.drawing names it
    base = Markup()
    if small in artifact.blobs:
        base = attempt(f"Sample {small}", sample_image, given, artifact.blobs[small], 64, f"sample {place} at 64 px")
    file = f"samples/{name}" if given.folder and (given.folder / "samples" / name).exists() else ""
    return SAMPLES.sample(image, base, caption, seed, file)


def sample_image(given: ReportInput, blob: str, side: int, alt: str) -> Markup:
    """Returns an image of a sample's blob."""
    return given.album.image(given.read(blob), side, alt, most=110_000)


def _settings(given: ReportInput, artifact: Artifact, names: Sequence[str]) -> Markup:
    """Shows the commands that draw the same again, of captions that fit into a line, and the settings."""
    commands = []
    own = given.folder is not None and (given.folder / "bundle.json").exists()
    source = f" --from {shlex.quote(str(given.folder))}" if own else ""
    for name in names:
        caption, seed = asked_for(artifact, name)
        if isinstance(caption, str) and isinstance(seed, int) and text(caption) == caption:
            commands.append(f"unclip sample{source} --seed {seed} -- {shlex.quote(caption)}")
    settings = artifact.metrics.get("settings")
    return SAMPLES.settings(commands, facts(settings) if settings else "") if commands or settings else Markup()
