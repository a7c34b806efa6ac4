"""What one worker of a training does, from the inputs in the store to the artefact in the store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from models.draw import Draw, derive_seed
from pipeline.artifacts import Artifact, load_artifact, publish_artifact
from pipeline.crash import crash_point
from pipeline.graph import Context, Stage, stage_key, trajectory_key
from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.records import put_blob
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.feed import Feed
from pipeline.training.loop import fit
from pipeline.training.state import TrainState, begin
from pipeline.training.task import Examples, Finishes, Task
from pipeline.training.watch import Watch
from pipeline.training.world import World, computes_in


@dataclass(frozen=True)
class Training:
    """A training that any worker can take part in: it travels to all of them, and is called there."""

    ctx: Context
    make_task: Callable[[Context], Task]
    attempt: int

    def __call__(self, world: World) -> None:
        """Train from the newest checkpoint to the stop; the first worker publishes. Raises Superseded, NonFinite,
        CorruptObject, UserError."""
        ctx = self.ctx
        task = self.make_task(ctx)
        feed = Feed(ctx.store, ctx.inputs, task, ctx.recipe, world.rank, world.size)
        checkpoints = Checkpoints(ctx.store, trajectory_key(ctx), self.attempt, ctx.settings.keep_checkpoints)
        state = begin(task, ctx.recipe, world.device)
        checkpoints.restore(state, ctx.recipe.samples)
        publish = Publisher(ctx, task, feed, world)
        if not world.first:
            fit(ctx.stage, task, feed, ctx.recipe, ctx.settings, world, state, lambda _: None)
            return
        with Progress(ctx.stage, ctx.recipe.samples, "samples", start=state.samples) as progress:
            watch = Watch(task, feed, ctx.recipe, ctx.settings, world, checkpoints, publish, progress)
            fit(ctx.stage, task, feed, ctx.recipe, ctx.settings, world, state, watch)
        crash_point("training.before_artifact")
        publish(state, ctx.recipe.samples)


@dataclass(frozen=True)
class Publisher:
    """Makes artefacts of a state: the averaged weights, the journal, the previews."""

    ctx: Context
    task: Task
    feed: Feed
    world: World

    def __call__(self, state: TrainState, samples: int) -> None:
        """Publish what the recipe with this stop makes, unless it is there."""
        ctx = at_stop(self.ctx, samples)
        if load_artifact(ctx.store, ctx.stage, ctx.key) is not None:
            return
        precision = computes_in(self.world.device, ctx.recipe.precision)
        artifact = ctx.publishable(
            ledger=Ledger(kept=self.feed.order.total),
            blobs=self._blobs(state),
            metrics=state.journal.latest() | {"samples_seen": state.samples, "wrapped_rows": self.feed.order.wrapped},
            environment={"device": str(self.world.device), "precision": precision, "workers": str(self.world.size)},
            times={"samples_per_second": state.samples / max(state.seconds, 1e-9)},
        )
        publish_artifact(ctx.store, artifact, state.seconds)

    def _blobs(self, state: TrainState) -> dict[str, str]:
        store = self.ctx.store
        blobs = {"metrics.jsonl": put_blob(store, state.journal.text()), **state.journal.previews()}
        with tempfile.TemporaryDirectory() as folder:
            self._save(state.ema, Path(folder))
            for file in sorted(Path(folder).iterdir()):
                blobs[file.name] = put_blob(store, file)
        return blobs

    def _save(self, model: nn.Module, folder: Path) -> None:
        """The model as files, measured first if its task wants that: in fp32, the precision of sampling."""
        if not isinstance(self.task, Finishes):
            self.task.save(model, folder)
            return
        with torch.no_grad():
            statistics = self.task.finish(model, self._examples(self.task.finish_rows))
        self.task.save(model, folder, statistics)

    def _examples(self, rows: int) -> Examples:
        """One batch of ``rows`` training rows, spread over the first steps: the same for any workers and any stop."""
        recipe, device = self.ctx.recipe, self.world.device
        size = min(rows, recipe.batch)
        spread = slice(None, None, recipe.batch // size)
        with closing(Feed(self.ctx.store, self.ctx.inputs, self.task, recipe).shares(0)) as shares:
            parts = [share.batch for share in islice(shares, -(-rows // size))]
        columns = {name: torch.cat([part[name][spread][:size] for part in parts])[:rows] for name in parts[0]}
        batch = {name: column.to(device) for name, column in columns.items()}
        return [(batch, Draw([(derive_seed(recipe.seed, "finish"), rows)], device))]


def at_stop(ctx: Context, samples: int) -> Context:
    """The same stage with another number of samples, under the key that it then has."""
    recipe = replace(ctx.recipe, samples=samples)
    stage = Stage(ctx.stage, ctx.version, recipe, tuple(ctx.inputs), _unused)
    return replace(ctx, recipe=recipe, key=stage_key(stage, {name: a.key for name, a in ctx.inputs.items()}))


def _unused(ctx: Context) -> Artifact:
    raise AssertionError("only the key of this stage is asked for")
