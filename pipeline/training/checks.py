"""Refuses a training that cannot work, in one line, before it starts."""

from __future__ import annotations

from pipeline.data.content import put_content
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, ShardList
from pipeline.graph.stages import Context
from pipeline.pages import page
from pipeline.training.task import Contrastive, Shardable, Task, takes_micro_batches


def most_workers(ctx: Context, task: Task) -> int:
    """Returns how many workers a training can use: each has a row of every batch, and all if they share statistics."""
    return 1 if isinstance(task, Contrastive) and task.local_statistics else ctx.recipe.batch


def check(ctx: Context, task: Task) -> None:
    """Raises UserError for settings and inputs with which the training would fail, or train something else."""
    settings, recipe, where = ctx.settings, ctx.recipe, f"run.{ctx.stage}"
    most = most_workers(ctx, task)
    workers = most if settings.workers == "auto" else settings.workers
    if workers > recipe.batch:
        raise UserError(
            f"{where}.workers: {workers} is more than the {recipe.batch} rows of a batch; lower workers or raise "
            f"{ctx.stage}.batch"
        )
    if workers > most:
        raise UserError(
            f"{where}.workers: {workers}; batch norms of a resnet tower see one worker's rows only: use 0 "
            f"or 1, or {ctx.stage}.model.tower=vit"
        )
    if settings.min_workers > workers:
        raise UserError(f"{where}.min_workers: {settings.min_workers} is above workers, {workers}")
    if settings.offload and not settings.sharded:
        raise UserError(f"{where}.offload: only sharded weights are offloaded; set sharded, too")
    if settings.sharded:
        _check_sharded(ctx, task, workers)
    if settings.micro_batch and not takes_micro_batches(task):
        raise UserError(
            f"{where}.micro_batch: batch norms of a resnet tower need the whole batch; use 0, or "
            f"{ctx.stage}.model.tower=vit"
        )
    for milestone in settings.milestones:
        if not recipe.batch <= milestone < recipe.samples:
            raise UserError(
                f"{where}.milestones: {milestone:,} is not between one batch ({recipe.batch:,}) and the recipe's "
                f"samples ({recipe.samples:,})"
            )
        if milestone > recipe.fork:
            raise UserError(
                f"{where}.milestones: {milestone:,} is in the decay of the learning rate, which begins at "
                f"{recipe.fork:,} samples, so it would not equal a training of that length; lower it"
            )
    rows = ctx.inputs["curation" if "curation" in ctx.inputs else "filter"]
    if not rows.ledger.rows:  # all were lost before, and there it says why
        rows = ctx.inputs.get("pairs", rows)
    if not ShardList(ctx.store, rows).counts(f"train/{task.min_side}").any():
        raise UserError(_no_rows(ctx, task, rows))
    if recipe.init_from is not None:  # into the store, where every worker can read it
        put_content(ctx.store, recipe.init_from, f"{ctx.stage}.init_from")


def _check_sharded(ctx: Context, task: Task, workers: int) -> None:
    where = f"run.{ctx.stage}"
    if not isinstance(task, Shardable):
        raise UserError(f"{where}.sharded: a CLIP's temperature is one number, which cannot be sharded; use false")
    if not workers:
        raise UserError(f"{where}.sharded: without workers a model cannot be sharded; set workers to 1 or more")


def _no_rows(ctx: Context, task: Task, rows: Artifact) -> str:
    ledger = rows.ledger
    reasons = [f"{count:,} {reason}" for reason, count in sorted(ledger.lost.items())]
    small = f", none of them a training row with a short side of {task.min_side} px" if ledger.kept else ""
    remedy = "add pairs" if ledger.kept else f"{page('ledger')} says what to do about each reason"
    if ledger.kept and task.min_side > 64:
        remedy = f"leave {ctx.stage} out of bundle.models and set bundle.sampling.size={task.min_side // 4}"
    return (
        f"{ctx.stage}: no training rows; {rows.stage} kept {ledger.kept:,} of {ledger.rows:,} rows{small}"
        f"{' (' + ', '.join(reasons) + ')' if reasons else ''}; {remedy}"
    )
