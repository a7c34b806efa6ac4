"""Shows the codec and each training: curves, previews, final numbers."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape
from PIL import Image

from pipeline.graph.artifacts import Artifact
from pipeline.held_out import FEWEST, too_few
from pipeline.progress import duration
from pipeline.report.charts import Point, bars, line_chart
from pipeline.report.html import PARTS, Section, attempt, facts, note, number, template
from pipeline.report.inputs import ReportInput

PREVIEWS_SHOWN = 4
TRAINING = template("training.html")
WORDS = {
    "loss": "training loss",
    "validation_loss": "validation loss",
    "validation_rows": "validation rows",
    "validation_recall_at_1": "validation: share of images whose own caption is nearest",
    "validation_condition_gap": "validation: loss with another row's condition, less the loss with its own",
    "validation_condition_gap_error": "its standard error",
    "gradient_norm": "norm of the gradient",
    "samples_seen": "samples seen",
    "wrapped_rows": "rows seen once more, to fill the lanes",
    "mse": "mean squared error",
    "vb": "variational bound",
    "image_to_text": "contrastive loss, image to caption",
    "text_to_image": "contrastive loss, caption to image",
}
QUARTERS = {1: "least noise", 2: "less", 3: "more", 4: "most noise"}


@dataclass
class Curve:
    """Holds the losses of a training by samples seen.

    Attributes:
        train: Training losses.
        validation: Validation losses.
        held_out: Validation rows of the latest validation pass, None before the first.
        quarters: Loss by quarter of the timesteps, 1 to 4, of the latest validation pass that measured any.
        quarters_at: Samples seen at that pass.
        unread: Number of lines that could not be used.
    """

    train: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    held_out: int | None = None
    quarters: dict[int, float] = field(default_factory=dict)
    quarters_at: float = 0
    unread: int = 0


def codec_section(given: ReportInput) -> Markup:
    """Shows the spectrum that the codec keeps and what it loses; empty before there is a codec."""
    if "codec" not in given.artifacts:
        return Markup()
    metrics = given.artifacts["codec"].metrics
    warnings = [note(f"Warning: {warning}") for warning in metrics.get("warnings", ())]
    rest = {name: value for name, value in metrics.items() if name not in ("explained_variance_ratio", "warnings")}
    chart = attempt("The spectrum", _spectrum, metrics)
    numbers = attempt("The codec's metrics", facts, rest)
    return Section.of(TRAINING.codec, "codec", "Codec", [*warnings, PARTS.beside([chart, numbers])])


def _spectrum(metrics: Mapping[str, Any]) -> Markup:
    points = [(i + 1, float(ratio)) for i, ratio in enumerate(metrics["explained_variance_ratio"])]
    series = {"share of variance": points}
    chart = line_chart("Spectrum of the image embeddings", "principal component", "share of variance", series)
    return PARTS.figure(chart, f"The share of variance that each of {len(points)} principal components holds.")


def training_section(given: ReportInput, trained: Sequence[Artifact], running: Sequence[Artifact] = ()) -> Markup:
    """Shows every trained model in order, below the ``running`` trainings; empty before the first."""
    parts = [_training(given, artifact, training_so_far(artifact)) for artifact in running]
    parts += [_training(given, artifact) for artifact in trained]
    return Section.of(TRAINING.training, "training", "Training", parts) if parts else Markup()


def training_so_far(running: Artifact) -> str:
    """Returns for example "8,192 of 53,248 samples"."""
    return f"{number(running.metrics['samples_seen'])} of {number(running.recipe['samples'])} samples"


def _training(given: ReportInput, artifact: Artifact, so_far: str = "") -> Markup:
    stage = artifact.stage
    summary = f"So far: {so_far}" if so_far else attempt(f"The summary of {stage}", _summary, artifact)
    losses = attempt(f"The loss curve of {stage}", _loss, given, artifact)
    numbers = attempt(f"The metrics of {stage}", _numbers, artifact)
    previews = attempt(f"The previews of {stage}", _previews, given, artifact)
    return TRAINING.model(stage, summary, losses, previews, numbers)


def _numbers(artifact: Artifact) -> Markup:
    """Shows where the time went, and the last numbers in words, to be unfolded."""
    shares = [(share, name.removeprefix("share_")) for name, share in artifact.times.items() if "share_" in name]
    spent = {f"time: {name}": f"{share:.1%}" for share, name in sorted(shares, reverse=True)}
    shown = {f"{name}: {WORDS[name]}" if name in WORDS else name: value for name, value in artifact.metrics.items()}
    return facts({**shown, **spent}) if shown or spent else Markup()


def _summary(artifact: Artifact) -> Markup:
    """Says in one line how many samples took how long, as far as it was recorded."""
    times = artifact.times
    said = [f"{number(artifact.metrics['samples_seen'])} samples"]
    if "seconds" in times:
        said.append(duration(times["seconds"]))
    if "samples_per_second" in times:
        said.append(f"{times['samples_per_second']:,.3g} a second")
    if "utilisation" in times:
        said.append(f"{times['utilisation']:.0%} of what matrix products reach there")
    return Markup(escape(", ".join(said) or "Numbers"))


def _loss(given: ReportInput, artifact: Artifact) -> Markup:
    stage = artifact.stage
    if "metrics.jsonl" not in artifact.blobs:
        return note(f"{stage} has no metrics.jsonl among its files, so its loss curve cannot be drawn.")
    curve = read_curve(given.read(artifact.blobs["metrics.jsonl"]))
    series = {"train": curve.train, "validation": curve.validation}
    chart = line_chart(f"Loss of {stage}", "samples seen", "loss", series)
    unread = f" {number(curve.unread)} lines could not be used." if curve.unread else ""
    shown = PARTS.figure(chart, f"Loss of {stage} by samples seen.{unread}", f"{stage}-loss")
    if curve.held_out is not None and curve.held_out < FEWEST:
        shown += note(f"No validation is shown: {too_few(curve.held_out, 'validation')}.")
    quarters = attempt(f"The loss of {stage} by timestep", _quarters, curve, stage) if curve.quarters else Markup()
    return shown + quarters


def _quarters(curve: Curve, stage: str) -> Markup:
    values = [(f"quarter {i}, {QUARTERS[i]}", loss) for i, loss in sorted(curve.quarters.items())]
    said = f"Validation loss of {stage} by quarter of its timesteps"
    chart = bars(said, values, counts=False)
    return PARTS.figure(chart, f"{said}, after {number(curve.quarters_at)} samples.", f"{stage}-timesteps")


def read_curve(data: bytes) -> Curve:
    """Reads losses from JSON lines of training, {"samples", "loss"}, and validation, {"samples", "validation_loss"}.

    A validation of a model with timesteps also has "validation_loss_quarter_1" to "_4", less those without rows. Lines
    other than JSON objects, and lines with non-finite losses, are counted as unread.
    """
    curve = Curve()
    for line in data.splitlines():
        try:
            entry = json.loads(line)
            if "loss" in entry:
                curve.train.append(_point(entry["samples"], entry["loss"]))
            if "validation_rows" in entry:
                curve.held_out = int(entry["validation_rows"])
            if "validation_loss" in entry:
                curve.validation.append(_point(entry["samples"], entry["validation_loss"]))
            named = {i: entry.get(f"validation_loss_quarter_{i}") for i in QUARTERS}
            if quarters := {i: _point(entry["samples"], loss)[1] for i, loss in named.items() if loss is not None}:
                curve.quarters, curve.quarters_at = quarters, float(entry["samples"])
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            curve.unread += 1
    return curve


def _point(samples: Any, loss: Any) -> Point:
    point = float(samples), float(loss)
    if not all(map(math.isfinite, point)):
        raise ValueError(f"{point} is not finite")
    return point


def preview_names(blobs: Mapping[str, str]) -> list[tuple[str, int]]:
    """Returns names and samples of previews/<samples>.png: at most four, evenly spaced."""
    matches = [m for name in blobs if (m := re.fullmatch(r"previews/(\d{1,15})\.png", name))]
    found = [(m[0], int(m[1])) for m in sorted(matches, key=lambda m: int(m[1]))]
    if len(found) <= PREVIEWS_SHOWN:
        return found
    return [found[i * (len(found) - 1) // (PREVIEWS_SHOWN - 1)] for i in range(PREVIEWS_SHOWN)]


def _previews(given: ReportInput, artifact: Artifact) -> Markup:
    names = preview_names(artifact.blobs)
    # Models that are not conditioned on embeddings are conditioned on small images.
    if names and given.album.licenses is not None and "embeddings" not in artifact.inputs:
        return note("Its previews are other people's images made larger; they are left out here.")
    cells = []
    for name, samples in names:
        when = f"after {number(samples)} samples"
        said = f"preview of {artifact.stage} {when}"
        image = attempt(f"{name} of {artifact.stage}", _preview, given, artifact.blobs[name], said)
        cells.append(PARTS.figure(PARTS.zoomed(image), when.capitalize()))
    return TRAINING.previews(cells) if cells else Markup()


def _preview(given: ReportInput, blob: str, alt: str) -> Markup:
    data = given.read(blob)
    return given.album.image(data if given.album.licenses is None else _lower_half(data), 512, alt, most=60_000)


def _lower_half(data: bytes) -> bytes:
    """Returns the generated half of a preview, without the other people's images above it."""
    with Image.open(io.BytesIO(data)) as grid:
        out = io.BytesIO()
        grid.crop((0, grid.height // 2, grid.width, grid.height)).save(out, "PNG")
    return out.getvalue()
