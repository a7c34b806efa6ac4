"""The training loop: the same for every model, on any number of workers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from math import isfinite

import torch
from torch import Tensor, nn

from models.draw import Draw, derive_seed
from models.losses import Losses
from pipeline.errors import UserError
from pipeline.settings import TrainingSettings
from pipeline.training.draws import Part
from pipeline.training.feed import Feed, Share
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.state import TrainState, learning_rate, update_ema
from pipeline.training.task import Batch, Task
from pipeline.training.world import World, autocast


class NonFinite(UserError):
    """A loss or a gradient is no number: the training diverged, and stopped before the step that would spoil it."""


class Objective(nn.Module):
    """A task's loss as a module, so that a data-parallel wrapper sees all of the model at work."""

    def __init__(self, task: Task, model: nn.Module):
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Batch, draw: Draw) -> Losses:
        return self.task.loss(self.model, batch, draw)


def fit(
    stage: str,
    task: Task,
    feed: Feed,
    recipe: TrainingRecipe,
    settings: TrainingSettings,
    world: World,
    state: TrainState,
    pause: Callable[[TrainState], None],
) -> TrainState:
    """Train ``state`` until it has seen ``recipe.samples``. Raises NonFinite.

    ``pause`` is called before every step and after the last: there one looks, publishes and saves.
    """
    objective = world.wrap(Objective(task, state.model))
    state.model.train()
    with closing(feed.shares(state.samples)) as shares:
        while True:
            pause(state)
            if state.samples >= recipe.samples:
                return state
            share = next(shares)
            rows, values = backward(objective, share, recipe, settings.micro_batch, world)
            norm = float(nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip_norm or float("inf")))
            if not isfinite(norm + values["loss"]):
                raise NonFinite(_diverged(stage, state.samples, world.collect(_bad(share, rows))))
            state.samples += recipe.batch
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(recipe, state.samples)
            state.optimizer.step()
            state.optimizer.zero_grad()
            update_ema(state.ema, state.model, recipe.batch, recipe.ema_half_life)
            state.journal.add(values | {"gradient_norm": norm})
            if line_due(state.samples // recipe.batch):
                state.journal.flush(state.samples)
            world.report({"samples": state.samples, "loss": values["loss"]})


def backward(
    objective: nn.Module, share: Share, recipe: TrainingRecipe, micro_batch: int, world: World
) -> tuple[Tensor, dict[str, float]]:
    """Add the gradient of the global batch's mean loss to the parameters, micro-batch by micro-batch.

    Every row of the global batch weighs the same, however many of them a worker or a micro-batch holds (a wrapped
    module averages over workers, hence the factor). Returns this worker's losses, [rows], and the means over the
    global batch of "loss" and its parts.
    """
    rows = len(share.keys)
    size = micro_batch or rows
    draw = Draw(share.streams, world.device)
    batch = {name: column.to(world.device, non_blocking=True) for name, column in share.batch.items()}
    totals: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        torch.manual_seed(derive_seed(share.streams[0][0], "dropout", start))
        with nullcontext() if stop == rows else world.gather_later(objective):
            with autocast(world.device, recipe.precision):
                losses = objective({name: c[start:stop] for name, c in batch.items()}, Part(draw, start, stop))
            (losses.total.sum() * (world.size / recipe.batch)).backward()
        totals.append(losses.total.detach())
        for name, values in {"loss": losses.total, **losses.parts}.items():
            sums[name] = sums.get(name, 0.0) + values.detach().sum()
    means = world.sum(torch.stack(list(sums.values())).double()) / recipe.batch
    return torch.cat(totals), dict(zip(sums, means.tolist(), strict=True))


def line_due(step: int) -> bool:
    """Whether the journal gets a line after this step: each of the first 128, then 64 lines a doubling."""
    return step % (1 << max(0, step.bit_length() - 7)) == 0


def _bad(share: Share, losses: Tensor) -> list[str]:
    """Keys of rows whose loss is not finite."""
    return [key for key, fine in zip(share.keys, losses.isfinite().tolist(), strict=True) if not fine]


def _diverged(stage: str, samples: int, bad: list[str]) -> str:
    rows = f"the loss of rows {', '.join(bad[:5])}{' and more' if len(bad) > 5 else ''}" if bad else "the gradient"
    return (
        f"{stage}: {rows} is not finite after sample {samples:,}; lower learning_rate, raise warmup or set clip_norm. "
        "The last checkpoint is sound"
    )
