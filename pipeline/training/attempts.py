"""The attempts of a training: checks, workers, restarts after a loss, and an artefact at the end."""

from __future__ import annotations

import logging
import tempfile
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from models.clip import Clip
from pipeline.errors import Unreachable, UserError
from pipeline.graph.artifacts import Artifact, load_artifact, publish_artifact
from pipeline.graph.local_ray import ray_logs
from pipeline.graph.ray import uses_ray
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.settings import TrainingSettings
from pipeline.store.records import put_blob
from pipeline.training.checkpoints import course
from pipeline.training.checks import check, most_workers
from pipeline.training.device import OutOfMemory
from pipeline.training.distributed.launch import WorkerLost, launch
from pipeline.training.follow import following, showing
from pipeline.training.task import Task, task_of
from pipeline.training.trackers import Trackers
from pipeline.training.worker import Training, at_stop

RESTARTS = 3  # in a row, after workers or the store were lost before a new checkpoint
PATIENCE_S = 10.0  # before the first start after the store was lost, twice as long before the second, and so on
log = logging.getLogger("unclip")


def train_and_show(ctx: Context) -> Artifact:
    """Trains as ``run_attempts`` does, and shows trackers and ``ctx.show`` what each new checkpoint brings."""
    if ctx.show is None:
        return run_attempts(ctx)
    with closing(Trackers(ctx)) as trackers:

        def show(running: Artifact) -> None:
            assert ctx.show is not None
            ctx.show(running)
            trackers.tell(running)

        alone = replace(ctx, show=None)  # what follows goes to workers
        with showing(alone, show):
            made = run_attempts(alone)
        trackers.tell(made)
        return made


def run_attempts(ctx: Context) -> Artifact:
    """Trains until the recipe's stop, from the newest checkpoint of this trajectory, and returns the artefact.

    Raises UserError before anything starts for settings that cannot work, and when the training
    diverges, Superseded when another process has taken over, CorruptObject for damaged inputs.
    """
    task = task_of(ctx)
    check(ctx, task)
    known: set[str] = set()
    lost, own = 0, None
    while True:
        try:
            if own is not None:  # who has taken over meanwhile leads, and is not to be fenced
                own.trunk.check()
                own.branch.check()
            own = course(ctx, begin=True)
            newest = partial(own.newest, ctx.recipe.whole_samples)
            if (records := own.records()) - known:  # below one that is damaged, too
                known, lost = records, 0
            if reached := newest():
                log.info("resuming %s at sample %s", ctx.stage, f"{reached:,}")
                _tell_of_milestones(ctx, reached)
            name = f"{own.branch.trajectory[:16]}-{own.branch.attempt:04d}"
            ray, most = ctx.ray, most_workers(ctx, task)
            workers = uses_ray(ctx.settings, ray)
            with following(ctx.stage, ctx.recipe.whole_samples, newest) if workers else nullcontext():
                launch(Training(ctx, own), ctx.stage, name, ctx.settings, ray, most)
            break
        except (WorkerLost, Unreachable) as e:
            lost += 1
            if lost > RESTARTS:
                raise gave_up(ctx, e, lost) from e
            wait_s = PATIENCE_S * lost if isinstance(e, Unreachable) else 0.0
            log.warning("%s: %s; starting again%s", ctx.stage, e, f" in {wait_s:.0f} s" if wait_s else "")
            time.sleep(wait_s)
        except OutOfMemory as e:
            ctx = replace(ctx, settings=halved(ctx, task, *e.args))
    artifact = load_artifact(ctx.store, ctx.stage, ctx.key)
    if artifact is None:
        raise UserError(f"{ctx.stage}: its record vanished as soon as it was written; check the store")
    return artifact


def _tell_of_milestones(ctx: Context, reached: int) -> None:
    """Says which milestones lie before the checkpoint that a training goes on from, and are not there."""
    text = "%s: the milestone at %s samples lies before the checkpoint that is gone on from, and is not made"
    for milestone in ctx.settings.milestones:
        gone = milestone + ctx.recipe.batch <= reached
        if gone and load_artifact(ctx.store, ctx.stage, at_stop(ctx, milestone).key) is None:
            log.warning(text, ctx.stage, f"{milestone:,}")


def gave_up(ctx: Context, e: Exception, lost: int) -> UserError:
    """Returns the error for ``lost`` failed starts without a new checkpoint."""
    what = f"{ctx.stage}: {e} {lost} times without a new checkpoint"
    if isinstance(e, UserError):
        return UserError(what)
    return UserError(
        f"{what}; look for the cause in {ray_logs()} (often too little memory: set micro_batch), then run again"
    )


def halved(ctx: Context, task: Task, what: str, rows: int) -> TrainingSettings:
    """Returns settings with half the micro-batch, after ``what`` did not fit into memory (see OutOfMemory).

    Raises UserError where that cannot help.
    """
    if rows <= 1 or not task.splittable:
        what = "one row" if rows == 1 else f"{rows} rows, which this loss needs together," if rows else what
        advice = "take a smaller model or a larger machine"
        if rows > 1 and ctx.settings.min_workers:
            advice += f", or raise run.{ctx.stage}.min_workers: fewer workers have more rows each"
        raise UserError(f"{ctx.stage}: {what} did not fit into memory; {advice}")
    half = -(-rows // 2)
    log.warning(
        "%s: %d rows at once did not fit into memory; going on from the last checkpoint with %d. "
        "run.%s.micro_batch=%d begins so",
        *(ctx.stage, rows, half, ctx.stage, half),
    )
    return replace(ctx.settings, micro_batch=half)


def take_clip(ctx: Context) -> Artifact:
    """Publishes a CLIP that somebody else has trained, in open_clip's local-dir layout."""
    began = time.monotonic()
    try:
        clip = Clip.named(ctx.recipe.weights)
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"clip.weights: {e}") from e
    with tempfile.TemporaryDirectory() as folder:
        clip.save(folder)
        blobs = {file.name: put_blob(ctx.store, file, move=True) for file in sorted(Path(folder).iterdir())}
    metrics = {"embed_dim": clip.embed_dim, "image_size": clip.image_size}
    artifact = ctx.publishable(ledger=Ledger(), blobs=blobs, metrics=metrics)
    return publish_artifact(ctx.store, artifact, time.monotonic() - began)
