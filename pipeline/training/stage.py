"""The training stages as the graph runs them: checks, an attempt, workers, an artefact."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.artifacts import Artifact, load_artifact, publish_artifact, read_shards
from pipeline.errors import UserError
from pipeline.graph import Context, trajectory_key
from pipeline.ledger import Ledger

if TYPE_CHECKING:
    from pipeline.training.task import Task

VERSIONS = {"clip": 1, "ar_prior": 1, "diffusion_prior": 1, "decoder": 1, "upsampler": 1}
RESTARTS = 3  # after workers were lost without having saved anything since the last time
log = logging.getLogger("unclip")


def run_clip(ctx: Context) -> Artifact:
    """Train a CLIP, or take one that exists."""
    return train(ctx, clip_task) if ctx.recipe.weights == "train" else save_pretrained(ctx)


def run_ar_prior(ctx: Context) -> Artifact:
    """Train the autoregressive prior."""
    return train(ctx, ar_prior_task)


def run_diffusion_prior(ctx: Context) -> Artifact:
    """Train the diffusion prior."""
    return train(ctx, diffusion_prior_task)


def run_decoder(ctx: Context) -> Artifact:
    """Train the 64 px decoder."""
    return train(ctx, decoder_task)


def run_upsampler(ctx: Context) -> Artifact:
    """Train one of the upsamplers."""
    return train(ctx, upsampler_task)


def train(ctx: Context, make_task: Callable[[Context], Task]) -> Artifact:
    """Train until the recipe's stop, from the newest checkpoint of this trajectory, and return the artefact.

    Raises UserError before anything starts for settings that cannot work, NonFinite (a UserError) when the training
    diverges, Superseded when another process has taken over, CorruptObject for damaged inputs.
    """
    from pipeline.training.checkpoints import Checkpoints, take_attempt
    from pipeline.training.launch import WorkerLost, launch
    from pipeline.training.worker import Training

    check(ctx, make_task(ctx))
    trajectory = trajectory_key(ctx)
    reached, failures = -1, 0
    while True:
        attempt = take_attempt(ctx.store, trajectory)
        newest = Checkpoints(ctx.store, trajectory, attempt).newest(ctx.recipe.samples)
        if newest:
            log.info("resuming %s at sample %s", ctx.stage, f"{newest:,}")
        failures = 0 if newest > reached else failures
        reached = newest
        try:
            launch(
                Training(ctx, make_task, attempt), f"{trajectory[:16]}-{attempt:04d}", ctx.settings, ctx.config.run.ray
            )
        except WorkerLost as e:
            failures += 1
            if failures > RESTARTS:
                raise UserError(
                    f"{ctx.stage}: {e} {failures} times without a new checkpoint; look for the cause in Ray's logs "
                    "(often too little memory: set micro_batch), then run again"
                ) from e
            log.warning("%s: %s; starting again", ctx.stage, e)
            continue
        artifact = load_artifact(ctx.store, ctx.stage, ctx.key)
        if artifact is None:
            raise UserError(f"{ctx.stage}: its record vanished as soon as it was written; check the store")
        return artifact


def check(ctx: Context, task: Task) -> None:
    """Raise UserError for what would fail, or not be what was asked for, once the training runs."""
    settings, recipe, where = ctx.settings, ctx.recipe, f"run.{ctx.stage}"
    if settings.workers > recipe.lanes:
        raise UserError(
            f"{where}.workers: {settings.workers} is more than the {recipe.lanes} lanes of the recipe; lower workers "
            f"or raise {ctx.stage}.lanes"
        )
    if not task.splittable and settings.workers > 1:
        raise UserError(
            f"{where}.workers: {settings.workers}; this loss compares every row with its whole batch and its norms "
            "may too, so it trains on one worker: use 0 or 1"
        )
    if not task.splittable and settings.micro_batch:
        raise UserError(f"{where}.micro_batch: this loss compares every row with its whole batch; use 0")
    if settings.keep_checkpoints < 1:
        raise UserError(f"{where}.keep_checkpoints: {settings.keep_checkpoints}; keep at least 1")
    for milestone in settings.milestones:
        if not recipe.batch <= milestone < recipe.samples:
            raise UserError(
                f"{where}.milestones: {milestone:,} is not between one batch ({recipe.batch:,}) and the recipe's "
                f"samples ({recipe.samples:,})"
            )
    rows = ctx.inputs["curation" if "curation" in ctx.inputs else "pairs"]
    if not sum(shard.counts.get(f"train/{task.min_side}", 0) for shard in read_shards(ctx.store, rows)):
        raise UserError(_no_rows(ctx, task, rows))


def _no_rows(ctx: Context, task: Task, rows: Artifact) -> str:
    ledger = rows.ledger
    reasons = [f"{count:,} {reason}" for reason, count in sorted({**ledger.rejected, **ledger.deferred}.items())]
    small = f", none of them a training row with a short side of {task.min_side} px" if ledger.kept else ""
    return (
        f"{ctx.stage}: no training rows; {rows.stage} kept {ledger.kept:,} of {ledger.rows:,} rows{small}"
        f"{' (' + ', '.join(reasons) + ')' if reasons else ''}; add pairs or loosen its thresholds"
    )


def save_pretrained(ctx: Context) -> Artifact:
    """The artefact of a CLIP that somebody else has trained, in open_clip's local-dir layout."""
    import tempfile
    import time
    from pathlib import Path

    from models.clip import Clip
    from pipeline.records import put_blob

    began = time.monotonic()
    kind, _, rest = ctx.recipe.weights.partition(":")
    try:
        clip = Clip.from_folder(rest) if kind == "local-dir" else Clip.pretrained(*rest.split(":"))
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"clip.weights: {e}") from e
    with tempfile.TemporaryDirectory() as folder:
        clip.save(folder)
        blobs = {file.name: put_blob(ctx.store, file) for file in sorted(Path(folder).iterdir())}
    metrics = {"embed_dim": clip.embed_dim, "image_size": clip.image_size}
    artifact = ctx.publishable(ledger=Ledger(), blobs=blobs, metrics=metrics)
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)


def clip_task(ctx: Context) -> Task:
    from pipeline.training.tasks.clip import ClipTask

    return ClipTask(ctx.recipe.model)


def ar_prior_task(ctx: Context) -> Task:
    from safetensors.torch import load

    from models.codec import Codec
    from pipeline.records import read_blob
    from pipeline.training.tables import embedding_dim
    from pipeline.training.tasks.ar_prior import ARPriorTask

    codec = Codec(**load(read_blob(ctx.store, ctx.inputs["codec"].blobs["model.safetensors"])))
    if codec.buckets != ctx.recipe.model.buckets:
        raise UserError(
            f"ar_prior.model.buckets: {ctx.recipe.model.buckets}, but the codec has {codec.buckets}; make them equal"
        )
    return ARPriorTask(ctx.recipe.model, embedding_dim(ctx.store, ctx.inputs["embeddings"]), codec)


def diffusion_prior_task(ctx: Context) -> Task:
    from pipeline.training.tables import embedding_dim
    from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask

    return DiffusionPriorTask(ctx.recipe.model, embedding_dim(ctx.store, ctx.inputs["embeddings"]))


def decoder_task(ctx: Context) -> Task:
    from pipeline.training.tables import embedding_dim
    from pipeline.training.tasks.decoder import DecoderTask

    return DecoderTask(ctx.recipe.model, embedding_dim(ctx.store, ctx.inputs["embeddings"]))


def upsampler_task(ctx: Context) -> Task:
    from pipeline.training.tasks.upsampler import UpsamplerTask

    return UpsamplerTask(ctx.recipe.model)
