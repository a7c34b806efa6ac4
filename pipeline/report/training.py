"""What the report shows of the codec and of each training: curves, previews, final numbers."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.graph.artifacts import Artifact
from pipeline.held_out import FEWEST, too_few
from pipeline.progress import duration
from pipeline.report.figures import Point, bars, line_chart
from pipeline.report.markup import attempt, beside, facts, figure, note, number, section, text
from pipeline.report.pictures import Album
from pipeline.store import Store
from pipeline.store.records import read_blob

TRAININGS = ("clip", "ar_prior", "diffusion_prior", "decoder", "upsampler_256", "upsampler_1024")
MAGNIFIED = ("upsampler_256", "upsampler_1024")
PREVIEWS_SHOWN = 4
LOOK_AT_CODEC = (
    "Look for a spectrum that falls by orders of magnitude before its right end, and for a round-trip error close to "
    "the reconstruction error: what is above it is lost to the buckets."
)
LOOK_AT_TRAINING = (
    "Look for a validation loss that falls with the training loss; if it turns upwards while the other still falls, "
    "the model has begun to remember its rows, and more data will help it more than more samples."
)
QUARTERS = {1: "least noise", 2: "less", 3: "more", 4: "most noise"}


@dataclass
class Curve:
    """Losses of a training by samples seen, and the number of lines that could not be used.

    ``held_out``: validation rows that the latest validation had, None before the first. ``quarters``: of the latest
    validation that told any, the loss by quarter of the timesteps, 1 to 4, after ``quarters_at`` samples.
    """

    train: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    held_out: int | None = None
    quarters: dict[int, float] = field(default_factory=dict)
    quarters_at: float = 0
    unread: int = 0


def codec_section(artifacts: Mapping[str, Artifact]) -> str:
    """The spectrum that the codec keeps and what it loses; "" before there is a codec."""
    if "codec" not in artifacts:
        return ""
    metrics = artifacts["codec"].metrics
    warnings = [note(f"Warning: {warning}") for warning in metrics.get("warnings", ())]
    rest = {name: value for name, value in metrics.items() if name not in ("explained_variance_ratio", "warnings")}
    chart = attempt("The spectrum", _spectrum, metrics)
    numbers = attempt("The codec's metrics", facts, rest)
    return section("codec", "Codec", LOOK_AT_CODEC, *warnings, beside(chart, numbers))


def _spectrum(metrics: Mapping[str, Any]) -> str:
    points = [(i + 1, float(ratio)) for i, ratio in enumerate(metrics["explained_variance_ratio"])]
    series = {"share of variance": points}
    chart = line_chart("Spectrum of the image embeddings", "principal component", "share of variance", series)
    return figure(chart, f"The share of variance that each of {len(points)} principal components holds.")


def training_section(
    store: Store, artifacts: Mapping[str, Artifact], album: Album, running: Artifact | None = None
) -> str:
    """Every trained model in order, and the ``running`` training at the top; "" before the first."""
    parts = [_training(store, running, running.stage, album, training_so_far(running))] if running is not None else []
    parts += [_training(store, artifacts[stage], stage, album) for stage in TRAININGS if stage in artifacts]
    return section("training", "Training", LOOK_AT_TRAINING, *parts) if parts else ""


def training_so_far(running: Artifact) -> str:
    """For example "8,192 of 53,248 samples"."""
    return f"{number(running.metrics['samples_seen'])} of {number(running.recipe['samples'])} samples"


def _training(store: Store, artifact: Artifact, stage: str, album: Album, so_far: str = "") -> str:
    summary = f"<p>So far: {so_far}.</p>\n" if so_far else attempt(f"The summary of {stage}", _summary, artifact)
    chart = attempt(f"The loss curve of {stage}", _loss, store, artifact, stage)
    numbers = attempt(f"The metrics of {stage}", facts, artifact.metrics) if artifact.metrics else ""
    previews = attempt(f"The previews of {stage}", _previews, store, artifact, stage, album)
    return f'<h3 id="{stage}">{stage}</h3>\n{summary}{beside(chart, numbers)}{previews}'


def _summary(artifact: Artifact) -> str:
    """One line: samples, how long they took, how fast that is, and where the time went, as far as it was recorded."""
    times = artifact.times
    said = [f"{number(artifact.recipe['samples'])} samples"] if "samples" in artifact.recipe else []
    if "seconds" in times:
        said.append(duration(times["seconds"]))
    if "samples_per_second" in times:
        said.append(f"{times['samples_per_second']:,.3g} a second")
    if "utilisation" in times:
        said.append(f"{times['utilisation']:.0%} of what matrix products reach there")
    shares = [(share, name.removeprefix("share_")) for name, share in times.items() if name.startswith("share_")]
    spent = ", ".join(f"{text(name)} {share:.1%}" for share, name in sorted(shares, reverse=True))
    return f"<p>{', '.join(said)}.{' Of the time: ' + spent + '.' if spent else ''}</p>\n" if said else ""


def _loss(store: Store, artifact: Artifact, stage: str) -> str:
    if "metrics.jsonl" not in artifact.blobs:
        return note(f"{stage} has no metrics.jsonl among its files, so there is no loss curve.")
    curve = read_curve(read_blob(store, artifact.blobs["metrics.jsonl"]))
    series = {"train": curve.train, "validation": curve.validation}
    chart = line_chart(f"Loss of {stage}", "samples seen", "loss", series)
    unread = f" {number(curve.unread)} lines could not be used." if curve.unread else ""
    shown = figure(chart, f"Loss of {stage} by samples seen.{unread}")
    if curve.held_out is not None and curve.held_out < FEWEST:
        shown += note(f"No validation is shown: {too_few(curve.held_out, 'validation')}.")
    return shown + (attempt(f"The loss of {stage} by timestep", _quarters, curve, stage) if curve.quarters else "")


def _quarters(curve: Curve, stage: str) -> str:
    values = [(f"quarter {i}, {QUARTERS[i]}", loss) for i, loss in sorted(curve.quarters.items())]
    chart = bars(f"Validation loss of {stage} by quarter of its timesteps", values, counts=False)
    when = f"after {number(curve.quarters_at)} samples"
    return figure(chart, f"Validation loss of {stage} by quarter of its timesteps, {when}.")


def read_curve(data: bytes) -> Curve:
    """The losses in JSON lines of training, {"samples", "loss"}, and of validation, {"samples", "validation_loss"}.

    A validation may also be nested: {"samples", "validation": {"loss"}}; one of a model with timesteps also has
    "validation_loss_quarter_1" to "_4", less those without rows. Lines that are no JSON objects, or whose losses are
    not finite, are counted as unread.
    """
    curve = Curve()
    for line in data.splitlines():
        try:
            entry = json.loads(line)
            if "loss" in entry:
                curve.train.append(_point(entry["samples"], entry["loss"]))
            if "validation_rows" in entry:
                curve.held_out = int(entry["validation_rows"])
            validation = entry.get("validation", {}).get("loss", entry.get("validation_loss"))
            if validation is not None:
                curve.validation.append(_point(entry["samples"], validation))
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


def preview_names(blobs: Mapping[str, str]) -> list[tuple[str, int | None]]:
    """Names and samples of previews/<samples>.png (or preview-<samples>.png) in order: at most four, evenly spaced.

    preview.png, whose samples are None, comes last unless it is one of the others.
    """
    matches = [m for name in blobs if (m := re.fullmatch(r"(?:previews/|preview-)(\d{1,15})\.png", name))]
    found: list[tuple[str, int | None]] = [(m[0], int(m[1])) for m in sorted(matches, key=lambda m: int(m[1]))]
    if "preview.png" in blobs and blobs["preview.png"] not in [blobs[name] for name, _ in found]:
        found.append(("preview.png", None))
    if len(found) <= PREVIEWS_SHOWN:
        return found
    return [found[i * (len(found) - 1) // (PREVIEWS_SHOWN - 1)] for i in range(PREVIEWS_SHOWN)]


def _previews(store: Store, artifact: Artifact, stage: str, album: Album) -> str:
    if album.licenses is not None and stage in MAGNIFIED:
        return note("Its previews are other people's pictures made larger; they are left out here.")
    cells = []
    for name, samples in preview_names(artifact.blobs):
        when = "at the end" if samples is None else f"after {number(samples)} samples"
        said = f"preview of {stage} {when}"
        picture = attempt(f"{name} of {stage}", _preview, store, artifact.blobs[name], said, album)
        cells.append(figure(picture, when.capitalize()))
    return f'<div class="previews">\n{"".join(cells)}</div>\n' if cells else ""


def _preview(store: Store, blob: str, alt: str, album: Album) -> str:
    data = read_blob(store, blob)
    return album.image(data if album.licenses is None else _lower_half(data), 512, alt, most=60_000)


def _lower_half(data: bytes) -> bytes:
    """What the decoder has drawn, without the other people's pictures above it."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as grid:
        out = io.BytesIO()
        grid.crop((0, grid.height // 2, grid.width, grid.height)).save(out, "PNG")
    return out.getvalue()
