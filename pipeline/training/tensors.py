"""Trains one model in this process on tensors in memory, by the pipeline's own loop and without a store."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from models.random_streams import derive_seed
from pipeline.local import open_local
from pipeline.progress import Progress
from pipeline.settings import TrainingSettings
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.feed.feed import LocalBatch
from pipeline.training.feed.order import Order
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.results import first_rows
from pipeline.training.state import TrainState, begin, load_weights
from pipeline.training.task import Batch, Finishes, Task
from pipeline.training.train import fit


class TensorFeed:
    """Makes batches of rows in memory, in the order that a recipe gives to one shard of them."""

    def __init__(self, columns: Batch, recipe: TrainingRecipe):
        self.columns, self.recipe = columns, recipe
        rows = len(next(iter(columns.values())))
        self.order = Order([rows], recipe.lanes, recipe.window, recipe.seed)

    def batches(self, samples: int) -> Generator[LocalBatch, None, None]:
        """Yields the batch of every step, without end, after ``samples`` samples."""
        recipe, step = self.recipe, samples // self.recipe.batch
        share, lanes = recipe.batch // recipe.lanes, range(recipe.lanes)
        while True:
            rows = [row for lane in lanes for _, row in self.order.rows(lane, step * share, (step + 1) * share)]
            streams = [(derive_seed(recipe.seed, lane, step), share) for lane in lanes]
            yield LocalBatch(
                {name: column[rows] for name, column in self.columns.items()}, list(map(str, rows)), streams
            )
            step += 1


def train_on(
    name: str, task: Task, columns: Batch, recipe: TrainingRecipe, device: torch.device, progress: bool = True
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Trains a task's model, from random weights or those of the recipe's ``init_from``.

    Args:
        name: Name of the training, for progress and messages.
        task: Task that makes the model and its loss.
        columns: Columns that the task names, with a row an example, on the CPU.
        recipe: Recipe of the training.
        device: Device to train on.
        progress: Shows a progress line.

    Returns:
        The averaged weights as a model in evaluation mode on ``device``, and the lines of the journal.

    Raises:
        OutOfMemory: A step does not fit.
        UserError: The training diverged, or ``init_from`` has weights of another model.
    """
    group, feed = ProcessGroup(device=device), TensorFeed(columns, recipe)
    warm = None
    if (file := recipe.init_from) is not None:
        with open_local(file.path) as opened:
            warm = partial(load_weights, name, file, opened.read(), task)
    state = begin(task, recipe, group, warm)
    with Progress(name, recipe.whole_samples, "samples") if progress else nullcontext() as line:

        def between(state: TrainState) -> None:
            if line:
                line.advance(state.samples - line.done, state.journal.loss_note)

        fit(name, feed, recipe, TrainingSettings(), group, state, between)
    model = state.ema
    if isinstance(task, Finishes):
        with torch.no_grad():
            found = task.finish(model, first_rows(feed, recipe, task.finish_rows, device))
        model.load_state_dict(found, strict=False)
    return model, state.journal.lines
