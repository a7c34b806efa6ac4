"""The training stages as the graph runs them: checks, attempts, workers, an artefact."""

from __future__ import annotations

import logging
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from pipeline.errors import Unreachable, UserError
from pipeline.graph.artifacts import Artifact, load_artifact, publish_artifact
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.store.content import put_content
from pipeline.training.follow import following, showing
from pipeline.training.trackers import Trackers

if TYPE_CHECKING:
    from pipeline.settings import TrainingSettings
    from pipeline.training.task import Task

VERSIONS = {"clip": 3, "ar_prior": 6, "diffusion_prior": 7, "decoder": 3, "upsampler": 4}
RESTARTS = 3  # in a row, after workers or the store were lost without anything having been saved
PATIENCE_S = 10.0  # before the first start after the store was lost, twice as long before the second, and so on
log = logging.getLogger("unclip")


def run_clip(ctx: Context) -> Artifact:
    """Train a CLIP, or take one that exists."""
    return train(ctx) if ctx.recipe.weights == "train" else save_pretrained(ctx)


def run_ar_prior(ctx: Context) -> Artifact:
    """Train the autoregressive prior."""
    return train(ctx)


def run_diffusion_prior(ctx: Context) -> Artifact:
    """Train the diffusion prior."""
    return train(ctx)


def run_decoder(ctx: Context) -> Artifact:
    """Train the 64 px decoder. On its way it leaves the early checkpoint that the evaluation compares it with."""
    early, milestones = ctx.config.evaluation.early, ctx.settings.milestones
    if ctx.recipe.batch <= early <= ctx.recipe.fork and early not in (*milestones, ctx.recipe.samples):
        ctx = replace(ctx, settings=replace(ctx.settings, milestones=(*milestones, early)))
    return train(ctx)


def run_upsampler(ctx: Context) -> Artifact:
    """Train one of the upsamplers."""
    return train(ctx)


def train(ctx: Context) -> Artifact:
    """Trains as ``_train``, and meanwhile shows trackers and ``ctx.show`` what each new checkpoint brings."""
    if ctx.show is None:
        return _train(ctx)
    with closing(Trackers(ctx)) as trackers:

        def show(running: Artifact) -> None:
            assert ctx.show is not None
            ctx.show(running)
            trackers.tell(running)

        alone = replace(ctx, show=None)  # what follows goes to workers
        with showing(alone, show):
            made = _train(alone)
        trackers.tell(made)
        return made


def _train(ctx: Context) -> Artifact:
    """Trains until the recipe's stop, from the newest checkpoint of this trajectory, and returns the artefact.

    Raises UserError before anything starts for settings that cannot work, NonFinite (a UserError) when the training
    diverges, Superseded when another process has taken over, CorruptObject for damaged inputs.
    """
    from pipeline.training.checkpoints import course
    from pipeline.training.checks import check
    from pipeline.training.distributed.launch import WorkerLost, launch
    from pipeline.training.loop import OutOfMemory
    from pipeline.training.worker import Training

    task = make_task(ctx)
    check(ctx, task)
    if ctx.recipe.init_from is not None:
        put_content(ctx.store, ctx.recipe.init_from, f"{ctx.stage}.init_from")
    reached, lost = -1, 0
    while True:
        try:
            own = course(ctx, begin=True)
            newest = partial(own.newest, ctx.recipe.samples)
            if newest() > reached:
                reached, lost = newest(), 0
            if reached:
                log.info("resuming %s at sample %s", ctx.stage, f"{reached:,}")
            name = f"{own.branch.trajectory[:16]}-{own.branch.attempt:04d}"
            with following(ctx.stage, ctx.recipe.samples, newest) if ctx.settings.workers else nullcontext():
                launch(Training(ctx, make_task, own), ctx.stage, name, ctx.settings, ctx.config.run.ray)
            break
        except (WorkerLost, Unreachable) as e:
            lost += 1
            if lost > RESTARTS:
                raise gave_up(ctx, e, lost) from e
            wait_s = PATIENCE_S * lost if isinstance(e, Unreachable) else 0.0
            log.warning("%s: %s; starting again%s", ctx.stage, e, f" in {wait_s:.0f} s" if wait_s else "")
            time.sleep(wait_s)
        except OutOfMemory as e:
            ctx = replace(ctx, settings=halved(ctx, task, rows=e.args[0]))
    artifact = load_artifact(ctx.store, ctx.stage, ctx.key)
    if artifact is None:
        raise UserError(f"{ctx.stage}: its record vanished as soon as it was written; check the store")
    return artifact


def gave_up(ctx: Context, e: Exception, lost: int) -> UserError:
    """What to tell when the last of ``lost`` starts failed like those before it."""
    what = f"{ctx.stage}: {e} {lost} times without a new checkpoint"
    if isinstance(e, UserError):
        return UserError(what)
    return UserError(
        f"{what}; look for the cause in Ray's logs (often too little memory: set micro_batch), then run again"
    )


def halved(ctx: Context, task: Task, rows: int) -> TrainingSettings:
    """The settings after ``rows`` rows did not fit into memory: half as many at once. Raises UserError if that cannot
    help."""
    if rows == 1 or not task.splittable:
        what = "one row" if rows == 1 else f"{rows} rows, which this loss needs together,"
        raise UserError(f"{ctx.stage}: {what} did not fit into memory; take a smaller model or a larger machine")
    half = -(-rows // 2)
    log.warning(
        "%s: %d rows at once did not fit into memory; going on from the last checkpoint with %d. "
        "run.%s.micro_batch=%d begins so",
        *(ctx.stage, rows, half, ctx.stage, half),
    )
    return replace(ctx.settings, micro_batch=half)


def save_pretrained(ctx: Context) -> Artifact:
    """The artefact of a CLIP that somebody else has trained, in open_clip's local-dir layout."""
    import tempfile
    from pathlib import Path

    from models.clip import Clip
    from pipeline.store.records import put_blob

    began = time.monotonic()
    kind, _, rest = ctx.recipe.weights.partition(":")
    try:
        clip = Clip.from_folder(rest) if kind == "local-dir" else Clip.pretrained(*rest.split(":"))
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"clip.weights: {e}") from e
    with tempfile.TemporaryDirectory() as folder:
        clip.save(folder)
        blobs = {file.name: put_blob(ctx.store, file, move=True) for file in sorted(Path(folder).iterdir())}
    metrics = {"embed_dim": clip.embed_dim, "image_size": clip.image_size}
    artifact = ctx.publishable(ledger=Ledger(), blobs=blobs, metrics=metrics)
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)


def make_task(ctx: Context) -> Task:
    """The model of a stage, and how it learns. Raises UserError if the recipe does not fit its inputs."""
    tasks = {"clip": clip_task, "ar_prior": ar_prior_task, "diffusion_prior": diffusion_prior_task}
    tasks |= {"decoder": decoder_task, "upsampler_256": upsampler_task, "upsampler_1024": upsampler_task}
    return tasks[ctx.stage](ctx)


def clip_task(ctx: Context) -> Task:
    from pipeline.training.tasks.clip import ClipTask

    return ClipTask(ctx.recipe.model)


def ar_prior_task(ctx: Context) -> Task:
    from safetensors.torch import load

    from models.codec import Codec
    from pipeline.store.records import read_blob
    from pipeline.training.feed.tables import embedding_dim
    from pipeline.training.tasks.ar_prior import ARPriorTask

    codec = Codec(**load(read_blob(ctx.store, ctx.inputs["codec"].blobs["model.safetensors"])))
    if codec.buckets != ctx.recipe.model.buckets:
        raise UserError(
            f"ar_prior.model.buckets: {ctx.recipe.model.buckets}, but the codec has {codec.buckets}; make them equal"
        )
    return ARPriorTask(ctx.recipe.model, embedding_dim(ctx.store, ctx.inputs["embeddings"]), codec)


def diffusion_prior_task(ctx: Context) -> Task:
    from pipeline.training.feed.tables import embedding_dim
    from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask

    return DiffusionPriorTask(ctx.recipe.model, embedding_dim(ctx.store, ctx.inputs["embeddings"]))


def decoder_task(ctx: Context) -> Task:
    from pipeline.training.feed.tables import embedding_dim
    from pipeline.training.tasks.decoder import DecoderTask

    return DecoderTask(ctx.recipe.model, embedding_dim(ctx.store, ctx.inputs["embeddings"]))


def upsampler_task(ctx: Context) -> Task:
    from pipeline.training.tasks.upsampler import UpsamplerTask

    return UpsamplerTask(ctx.recipe.model)
