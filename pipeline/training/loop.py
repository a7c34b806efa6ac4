"""The training loop: the same for every model, on any number of workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.draw import Draw, derive_seed
from pipeline.errors import UserError
from pipeline.settings import TrainingSettings
from pipeline.training.distributed.sharding import whole
from pipeline.training.distributed.world import World, autocast
from pipeline.training.draws import Part
from pipeline.training.feed.feed import Feed, Share
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.state import TrainState, ema_half_life, learning_rate, update_ema
from pipeline.training.timing import Laps

CHECK_EVERY = 16  # steps, at most, until a loss that is not finite is noticed


class NonFinite(UserError):
    """A loss or a gradient is no number: the training diverged, and stopped before the step that would spoil it.

    ``samples`` were seen before that step; ``keys`` are the rows whose loss it is, none if it is the gradient alone.
    """

    def __init__(self, message: str, samples: int = 0, keys: Sequence[str] = ()):
        super().__init__(message)
        self.samples, self.keys = samples, keys


class OutOfMemory(Exception):
    """The first argument is the number of rows whose forward and backward pass did not fit into memory."""


class Step(NamedTuple):
    """What is remembered of a step until it is known to be sound: the samples before it, this worker's rows, their
    losses [rows], and whether the loss and the gradient of the whole batch were finite, [] of bool."""

    samples: int
    keys: list[str]
    losses: Tensor
    finite: Tensor


def fit(
    stage: str,
    feed: Feed,
    recipe: TrainingRecipe,
    settings: TrainingSettings,
    world: World,
    state: TrainState,
    pause: Callable[[TrainState], None],
) -> TrainState:
    """Train ``state`` until it has seen ``recipe.samples``. Raises NonFinite.

    ``pause`` is called before every step and after the last: there one looks, publishes and saves. Steps do not wait
    for the device. Whether all went well is asked at every line of the journal, and after CHECK_EVERY steps; until
    then ``state.failed`` keeps a step that must not be taken, and all after it, from changing anything.
    """
    objective = world.wrap(state.objective)
    state.model.train()
    laps = Laps(state.laps, world.device)
    unchecked: deque[Step] = deque()
    with closing(feed.shares(state.samples)) as shares:
        while True:
            pause(state)
            if state.samples >= recipe.samples:
                return state
            laps.start(state.samples // recipe.batch)
            share = next(shares)
            laps("wait")
            losses, values = backward(objective, share, recipe, settings.micro_batch, world, laps)
            norm = whole(nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip_norm or float("inf")))
            finite = (norm + values["loss"]).isfinite()
            state.failed.copy_(torch.where(finite, state.failed, 1.0))
            unchecked.append(Step(state.samples, share.keys, losses, finite))
            state.samples += recipe.batch
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(recipe, state.samples)
            state.optimizer.step()
            state.optimizer.zero_grad()
            laps("optimiser")
            update_ema(state.ema, state.model, recipe.batch, ema_half_life(recipe, state.samples))
            laps("ema")
            state.journal.add(values | {"gradient_norm": norm.double()})
            line = line_due(state.samples // recipe.batch)
            if line or state.samples >= recipe.samples or len(unchecked) == CHECK_EVERY:
                check_finite(stage, unchecked, world)
                unchecked.clear()
                world.report({"samples": state.samples, "loss": float(values["loss"])})
            if line:
                state.journal.flush(state.samples)


def backward(
    objective: nn.Module, share: Share, recipe: TrainingRecipe, micro_batch: int, world: World, laps: Laps
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradient of the global batch's mean loss to the parameters, micro-batch by micro-batch.

    Every row of the global batch weighs the same, however many of them a worker or a micro-batch holds (a wrapped
    module averages over workers, hence the factor). Returns this worker's losses, [rows], and the means over the
    global batch of "loss" and its parts, fp64 [] each.
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
        with world.gathering(objective, now=stop == rows), memory_for(stop - start):
            with autocast(world.device, recipe.precision):
                losses = objective({name: c[start:stop] for name, c in batch.items()}, Part(draw, start, stop))
            laps("forward")
            (losses.total.sum() * (world.size / recipe.batch)).backward()
            laps("backward")
        totals.append(losses.total.detach())
        for name, values in {"loss": losses.total, **losses.parts}.items():
            sums[name] = sums.get(name, 0.0) + values.detach().sum()
    means = world.sum(torch.stack(list(sums.values())).double()) / recipe.batch
    return torch.cat(totals), dict(zip(sums, means, strict=True))


@contextmanager
def memory_for(rows: int) -> Iterator[None]:
    """Raise OutOfMemory where PyTorch says so in its several ways."""
    try:
        yield
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e):
            raise OutOfMemory(rows) from e
        raise


def line_due(step: int) -> bool:
    """Whether the journal gets a line after this step: each of the first 128, then 64 lines a doubling."""
    return step % (1 << max(0, step.bit_length() - 7)) == 0


def check_finite(stage: str, steps: Sequence[Step], world: World) -> None:
    """Raise NonFinite for the first of these steps that was not; all workers have to ask together."""
    finite = torch.stack([step.finite for step in steps])
    if not bool(finite.all()):
        step = steps[finite.tolist().index(False)]
        bad = world.collect(_bad(step))
        raise NonFinite(_diverged(stage, step.samples, bad), step.samples, bad)


def _bad(step: Step) -> list[str]:
    """Keys of this worker's rows whose loss is not finite."""
    return [key for key, fine in zip(step.keys, step.losses.isfinite().tolist(), strict=True) if not fine]


def _diverged(stage: str, samples: int, bad: list[str]) -> str:
    rows = f"the loss of rows {', '.join(bad[:5])}{' and more' if len(bad) > 5 else ''}" if bad else "the gradient"
    return (
        f"{stage}: {rows} is not finite after sample {samples:,}; lower learning_rate, raise warmup or set clip_norm. "
        f"The last checkpoint is sound. unclip run CONFIG --replay {stage} does that step again and looks for the cause"
    )
