"""How many rows a worker computes at once: as many as fit into the memory of its device."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from models.precision import autocast
from models.random_streams import RandomStreams
from pipeline.errors import UserError
from pipeline.graph.device import OutOfMemory, memory_for
from pipeline.graph.stages import Context
from pipeline.settings import TrainingSettings
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.feed.feed import Feed
from pipeline.training.optimizer import kinds
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.state import TrainState
from pipeline.training.task import Batch, Contrastive, Task, takes_micro_batches

log = logging.getLogger("unclip")


def refuses(device: torch.device) -> bool:
    """Returns whether a device says that memory is short when it is asked for; a CPU's is given, and is short later."""
    return device.type != "cpu"


def micro_batch(ctx: Context, task: Task, feed: Feed, rows: int, group: ProcessGroup, state: TrainState) -> int:
    """Returns the rows to compute at once: the setting, or as many of ``rows``, the largest share, as fit into memory.

    The setting's 0 stays for batch norms that need the batch, on a CPU, and where a model is sharded: it computes only
    with all workers, who would wait in a trial for one that failed.
    """
    if ctx.settings.micro_batch or group.sharded or not takes_micro_batches(task) or not refuses(group.device):
        return ctx.settings.micro_batch
    return fitting_rows(ctx.stage, feed, ctx.recipe, rows, group, state)


def fitting_rows(
    stage: str, feed: Feed, recipe: TrainingRecipe, rows: int, group: ProcessGroup, state: TrainState
) -> int:
    """Returns how many rows all workers can compute at once: ``rows``, or a half, a quarter and so on.

    Every worker tries one forward and backward pass, with room for the optimiser's moments and without the others, so
    nobody waits for a worker that failed: a contrastive loss compares its own rows in place of the others'. It changes
    nothing but the random numbers that a step draws again. Without a validation row to try nothing is found out. Raises
    OutOfMemory if one row does not fit.
    """
    share = rows
    for row in feed.validation(1, 1):
        one = feed.prepare(row.batch, RandomStreams(row.streams)) if feed.prepare else row.batch
        while lacking := next(filter(None, group.collect([_lack(one, rows, share, recipe, group, state)])), ""):
            if rows == 1:
                log.warning("%s: one row: %s", stage, lacking)
                raise OutOfMemory("one row", 1)
            rows = -(-rows // 2)
            log.info("%s: micro-batch of %d rows, because more do not fit into memory", stage, rows)
            _empty_cache(group.device)
        _empty_cache(group.device)  # NCCL allocates beside PyTorch
    return rows


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _lack(row: Batch, rows: int, share: int, recipe: TrainingRecipe, group: ProcessGroup, state: TrainState) -> str:
    """Returns the words by which a trial was said to lack memory, "" if it fits."""
    try:
        with memory_for("a trial"):
            _try(row, rows, share, recipe, group, state)
        return ""
    except OutOfMemory as e:
        return " ".join(str(e.__cause__).split()) or "out of memory"
    finally:
        state.optimizer.zero_grad()


def _try(row: Batch, rows: int, share: int, recipe: TrainingRecipe, group: ProcessGroup, state: TrainState) -> None:
    device, task = group.device, state.objective.task
    if isinstance(task, Contrastive):  # its rows stay together, and it encodes a few of them at once
        task.at_once, rows = rows, share
        task.gather = lambda own: (own.repeat(-(-recipe.batch // len(own)), 1)[: recipe.batch], 0)
    new = [p for p in state.model.parameters() if p.requires_grad and p not in state.optimizer.state]
    moments = [torch.empty_like(p) for p in new for kind in kinds(state.optimizer, p) if kind != "step"]
    if group.size > 1 and not group.sharded:
        # Gradients lie in buckets, which are there before the forward pass (see ProcessGroup.wrap).
        for parameter in state.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    batch = {name: column.to(device).repeat(rows, *[1] * (column.ndim - 1)) for name, column in row.items()}
    with autocast(device, recipe.precision):
        losses = state.objective(batch, RandomStreams([(0, rows)], device))
    losses.total.sum().backward()
    del moments  # held until here


def halved(ctx: Context, task: Task, what: str, rows: int) -> TrainingSettings:
    """Returns settings with half the micro-batch, after ``what`` did not fit into memory (see OutOfMemory).

    Raises UserError where that cannot help.
    """
    if rows <= 1 or not takes_micro_batches(task):
        what = "one row" if rows == 1 else f"{rows} rows, which this loss needs together," if rows else what
        advice = "take a smaller model or a larger machine"
        if rows and not ctx.settings.recompute:
            advice = f"set run.{ctx.stage}.recompute=true, or {advice}"
        raise UserError(f"{ctx.stage}: {what} did not fit into memory; {advice}")
    half = -(-rows // 2)
    log.warning(
        "%s: %d rows at once did not fit into memory; resuming from the last checkpoint with %d. Set "
        "run.%s.micro_batch=%d to start there",
        *(ctx.stage, rows, half, ctx.stage, half),
    )
    return replace(ctx.settings, micro_batch=half)
