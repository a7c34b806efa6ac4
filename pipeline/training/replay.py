"""Doing the step again that was not finite, to see where the first bad number comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.graph.stages import Context, trajectory_key
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.distributed.launch import cores, use_threads
from pipeline.training.distributed.world import World, choose_device
from pipeline.training.feed.feed import Feed
from pipeline.training.loop import backward
from pipeline.training.stage import make_task
from pipeline.training.state import begin
from pipeline.training.timing import Laps


@dataclass
class Replay:
    """What a step did. ``samples``: seen before it. ``rows``: key and loss of each whose loss is not finite.
    ``module``: the first whose output was not finite. ``parameters``: those whose gradient is not."""

    samples: int
    rows: list[tuple[str, float]] = field(default_factory=list)
    module: str = ""
    parameters: list[str] = field(default_factory=list)

    @property
    def repeated(self) -> bool:
        """Whether something was not finite again."""
        return bool(self.rows or self.module or self.parameters)


def replay(ctx: Context) -> Replay | None:
    """Do the step of a training again that failed last, all of its batch in this process; None if none has failed.

    Changes nothing in the store. Raises CorruptObject.
    """
    found = Checkpoints(ctx.store, trajectory_key(ctx), attempt=0).last_failure()
    if found is None:
        return None
    samples, weights = found
    use_threads(ctx.settings.threads or cores())
    world = World(device=choose_device(ctx.settings.device))
    task = make_task(ctx)
    objective = begin(task, ctx.recipe, world).objective
    model = objective.model.train()
    model.load_state_dict(weights)
    result = Replay(samples)
    with closing(Feed(ctx.store, ctx.inputs, task, ctx.recipe).shares(samples)) as shares, _watching(model, result):
        share = next(shares)
        laps = Laps({}, world.device)
        losses, _ = backward(objective, share, ctx.recipe, ctx.settings.micro_batch, world, laps)
    spoilt = [(key, loss) for key, loss in zip(share.keys, losses.tolist(), strict=True) if not _finite(loss)]
    result.rows = spoilt
    result.parameters = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    return result


def _finite(value: Any) -> bool:
    return bool(torch.as_tensor(value).isfinite().all())


@contextmanager
def _watching(model: nn.Module, result: Replay) -> Iterator[None]:
    """Note the first module, innermost first, that gives out what is not finite."""

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
