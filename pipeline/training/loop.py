"""The training loop: the same for every model, on any number of workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.draw import derive_seed
from models.precision import autocast
from pipeline.errors import UserError
from pipeline.settings import TrainingSettings
from pipeline.training.device import memory_for
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.distributed.sharding import full_tensor
from pipeline.training.feed.feed import Batches, LocalBatch
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.state import TrainState, ema_half_life, learning_rate, update_ema
from pipeline.training.timing import StepTimer


class Step(NamedTuple):
    """Holds what is known of a step until it is checked.

    Attributes:
        samples: Samples seen before it.
        keys: Keys of this worker's rows.
        losses: Losses of these rows, [rows].
        finite: Flag, [] of bool: the loss and the gradient of the global batch are finite.
    """

    samples: int
    keys: list[str]
    losses: Tensor
    finite: Tensor


def fit(
    stage: str,
    feed: Batches,
    recipe: TrainingRecipe,
    settings: TrainingSettings,
    group: ProcessGroup,
    state: TrainState,
    between: Callable[[TrainState], None],
) -> TrainState:
    """Trains ``state`` until it has seen ``recipe.samples``.

    Steps do not wait for the device. Losses and gradients are checked at every line of the journal, and after as many
    steps as ``group.report_steps`` says; until then ``state.failed`` keeps a step that is not finite, and all after it,
    from changing anything.

    Args:
        stage: Stage, named in messages.
        feed: Makes the batches.
        recipe: Recipe of the training.
        settings: Settings, of which it reads the micro-batch.
        group: This worker's view of the others.
        state: Trained in place.
        between: Called before every step and after the last, to validate, publish and save.

    Returns:
        ``state``.

    Raises:
        UserError: A loss or a gradient is NaN or Inf: the training diverged, and stops before that step changed it.
        OutOfMemory: A step, or what is done between steps, does not fit.
    """
    objective = group.wrap(state.objective)
    state.model.train()
    timer = StepTimer(state.phase_seconds, group.device)
    unchecked: deque[Step] = deque()
    with closing(feed.batches(state.samples)) as batches:
        while True:
            with memory_for("a validation pass, a milestone or a checkpoint"):
                between(state)
            if state.samples >= recipe.samples:
                return state
            timer.start(state.samples // recipe.batch)
            batch = next(batches)
            timer("wait")
            rows = min(settings.micro_batch or len(batch.keys), len(batch.keys))
            with memory_for(f"{rows} rows at once", rows):
                losses, values = backward(objective, batch, recipe, rows, group, timer)
                norm = full_tensor(nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip_norm or float("inf")))
                finite = (norm + values["loss"]).isfinite()
                state.failed.copy_(torch.where(finite, state.failed, 1.0))
                unchecked.append(Step(state.samples, batch.keys, losses, finite))
                state.samples += recipe.batch
                for parameters in state.optimizer.param_groups:
                    parameters["lr"] = learning_rate(recipe, state.samples)
                state.optimizer.step()
                # DDP's gradients are parts of what is sent: new ones would lie in memory beside it.
                state.optimizer.zero_grad(set_to_none=group.sharded or group.size == 1)
                timer("optimiser")
                update_ema(state.ema, state.model, recipe.batch, ema_half_life(recipe, state.samples))
                timer("ema")
            state.journal.add(values | {"gradient_norm": norm.double()})
            line = line_due(state.samples // recipe.batch)
            if line or state.samples >= recipe.samples or len(unchecked) >= group.report_steps():
                check_finite(stage, unchecked, group)
                unchecked.clear()
                group.report({"samples": state.samples, "loss": float(values["loss"])})
            if line:
                state.journal.flush(state.samples)


def backward(
    objective: nn.Module,
    local: LocalBatch,
    recipe: TrainingRecipe,
    size: int,
    group: ProcessGroup,
    timer: StepTimer,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adds the gradient of the global batch's mean loss to the parameters, micro-batch by micro-batch.

    Every row of the global batch has the same weight, however many of them a worker or a micro-batch holds.

    Args:
        objective: A task's loss around the model.
        local: This worker's rows.
        recipe: Recipe, with the size of the global batch and the precision.
        size: Rows of one forward and backward pass.
        group: This worker's view of the others.
        timer: Told of each phase.

    Returns:
        This worker's losses, [rows], and the means over the global batch of "loss" and its parts, fp64 [] each.
    """
    rows = len(local.keys)
    batch = {name: column.to(group.device, non_blocking=True) for name, column in local.batch.items()}
    totals: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        torch.manual_seed(derive_seed(local.streams[0][0], "dropout", start))
        with group.accumulation(objective, last=stop == rows):
            with autocast(group.device, recipe.precision):
                rows_of = {name: column[start:stop] for name, column in batch.items()}
                losses = objective(rows_of, local.draw(group.device, start, stop))
            timer("forward")
            # A wrapped module averages over workers, hence the factor.
            (losses.total.sum() * (group.size / recipe.batch)).backward()
            timer("backward")
        totals.append(losses.total.detach())
        for name, values in {"loss": losses.total, **losses.parts}.items():
            sums[name] = sums.get(name, 0.0) + values.detach().sum()
    means = group.sum(torch.stack(list(sums.values())).double()) / recipe.batch
    return torch.cat(totals), dict(zip(sums, means, strict=True))


def line_due(step: int) -> bool:
    """Returns whether the journal gets a line after this step: each of the first 128, then 64 lines a doubling."""
    return step % (1 << max(0, step.bit_length() - 7)) == 0


def check_finite(stage: str, steps: Sequence[Step], group: ProcessGroup) -> None:
    """Raises UserError for the first of these steps that was not finite; all workers have to call it together."""
    finite = torch.stack([step.finite for step in steps])
    if not bool(finite.all()):
        step = steps[finite.tolist().index(False)]
        bad = group.collect(_bad(step))
        raise UserError(_diverged(stage, step.samples, bad))


def _bad(step: Step) -> list[str]:
    """Returns the keys of this worker's rows whose loss is not finite."""
    return [key for key, fine in zip(step.keys, step.losses.isfinite().tolist(), strict=True) if not fine]


def _diverged(stage: str, samples: int, bad: list[str]) -> str:
    rows = f"the loss of rows {', '.join(bad[:5])}{' and more' if len(bad) > 5 else ''}" if bad else "the gradient"
    remedy = "lower learning_rate, raise warmup_steps or set clip_norm"
    return f"{stage}: {rows} is not finite after sample {samples:,}; {remedy}"
