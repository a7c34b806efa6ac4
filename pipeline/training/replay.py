"""Repeats the step that was not finite, to find where the first NaN or Inf comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.graph.resources import cores
from pipeline.graph.stages import Context, trajectory_key
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.device import OutOfMemory, choose_device, memory_for
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.feed.feed import Feed
from pipeline.training.loop import backward
from pipeline.training.memory import fitting_rows, refuses
from pipeline.training.state import begin
from pipeline.training.task import task_of
from pipeline.training.timing import StepTimer


@dataclass
class Replay:
    """Holds what a repeated step did.

    Attributes:
        samples: Samples seen before the step.
        rows: Key and loss of each row whose loss is not finite.
        module: Name of the first module whose output is not finite.
        parameters: Names of the parameters whose gradient is not finite.
    """

    samples: int
    rows: list[tuple[str, float]] = field(default_factory=list)
    module: str = ""
    parameters: list[str] = field(default_factory=list)

    @property
    def repeated(self) -> bool:
        """Returns whether something was not finite again."""
        return bool(self.rows or self.module or self.parameters)


def replay(ctx: Context) -> Replay | None:
    """Repeats the last step of a training that failed, with all of its batch in this process; None if none failed.

    Changes nothing in the store. Raises CorruptObject, and UserError where its rows do not fit into memory.
    """
    found = Checkpoints(ctx.store, trajectory_key(ctx), attempt=0).last_failure()
    if found is None:
        return None
    samples, weights = found
    torch.set_num_threads(ctx.settings.threads or cores())
    group = ProcessGroup(device=choose_device(ctx.settings.device))
    task = task_of(ctx)
    feed = Feed(ctx.store, ctx.inputs, task, ctx.recipe)
    result, rows = Replay(samples), ctx.settings.micro_batch or ctx.recipe.batch
    try:
        with memory_for("the model"):
            state = begin(task, ctx.recipe, group, recomputing=ctx.settings.recompute)
            objective, model = state.objective, state.objective.model.train()
            model.load_state_dict(weights)
        if task.splittable and not ctx.settings.micro_batch and refuses(group.device):
            rows = fitting_rows(ctx.stage, feed, ctx.recipe, rows, group, state)
        with (
            closing(feed.batches(samples)) as batches,
            _watching(model, result),
            memory_for(f"{rows} rows at once", rows),
        ):
            local = next(batches)
            losses, _ = backward(objective, local, ctx.recipe, rows, group, StepTimer({}, group.device))
    except OutOfMemory as e:
        what, fewer = e.args
        remedy = f"lower run.{ctx.stage}.micro_batch" if fewer > 1 and task.splittable else "take a larger machine"
        raise UserError(f"{ctx.stage}: {what} did not fit into the memory of this machine; {remedy}") from e
    spoilt = [(key, loss) for key, loss in zip(local.keys, losses.tolist(), strict=True) if not _finite(loss)]
    result.rows = spoilt
    result.parameters = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    return result


def _finite(value: Any) -> bool:
    return bool(torch.as_tensor(value).isfinite().all())


@contextmanager
def _watching(model: nn.Module, result: Replay) -> Iterator[None]:
    """Notes the first module, innermost first, whose output is not finite."""

    def look(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            if not result.module and not all(_finite(t) for t in tensors if isinstance(t, Tensor)):
                result.module = name or type(module).__name__

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
