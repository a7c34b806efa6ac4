"""What one worker of a training does, from the inputs in the store to the artefact in the store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from models.draw import Draw, derive_seed
from pipeline.graph.artifacts import load_artifact, publish_artifact
from pipeline.graph.keys import artifact_key
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.store.crash import crash_point
from pipeline.store.records import put_blob
from pipeline.training.checkpoints import Course
from pipeline.training.distributed.world import World, computes_in
from pipeline.training.feed.feed import Feed
from pipeline.training.loop import NonFinite, fit
from pipeline.training.saver import Saver
from pipeline.training.state import TrainState, begin
from pipeline.training.task import Contrastive, Examples, Finishes, Task
from pipeline.training.timing import NOT_MEASURED, Speed, measure_speed
from pipeline.training.warm_start import load_weights
from pipeline.training.watch import Watch, averaged


@dataclass(frozen=True)
class Training:
    """A training that any worker can take part in: it travels to all of them, and is called there."""

    ctx: Context
    make_task: Callable[[Context], Task]
    course: Course

    def __call__(self, world: World) -> None:
        """Train from the newest checkpoint to the stop; the first worker publishes. Raises Superseded, NonFinite,
        CorruptObject, UserError."""
        ctx = self.ctx
        task = self.make_task(ctx)
        feed = Feed(ctx.store, ctx.inputs, task, ctx.recipe, world.rank, world.size, ctx.settings.cache_mb)
        state = self._state(task, world)
        # Before the workers are joined, because one alone measures.
        speed = self._speed(task, feed, state, world) if world.first else NOT_MEASURED
        if isinstance(task, Contrastive):
            task.gather = world.gather
        train = partial(fit, ctx.stage, feed, ctx.recipe, ctx.settings, world, state)
        try:
            self._train(train, Publisher(ctx, task, feed, world, speed), state)
        except NonFinite as e:
            weights = world.whole(state.model)
            if world.first:
                self.course.branch.save_failure(weights, e.samples, e.keys)
            world.wait()  # one that ended now would end the others
            raise

    def _speed(self, task: Task, feed: Feed, state: TrainState, world: World) -> Speed:
        model = task.model(0).eval() if world.sharded else state.ema  # a spread one takes all workers
        return measure_speed(task, model, feed, self.ctx.recipe.precision, world)

    def _state(self, task: Task, world: World) -> TrainState:
        """That of the newest checkpoint that every worker can read, or the first one."""
        newest = self.ctx.recipe.samples
        while True:
            state = begin(task, self.ctx.recipe, world, warm_start(self.ctx, task), self.ctx.settings.recompute)
            self.course.restore(state, newest)
            found = world.collect([state.samples])
            if len(set(found)) == 1:
                return state
            newest = min(found)

    def _train(
        self,
        train: Callable[[Callable[[TrainState], None]], TrainState],
        publish: Publisher,
        state: TrainState,
    ) -> None:
        ctx, task, feed, world = self.ctx, publish.task, publish.feed, publish.world
        if not (world.first or world.sharded):
            train(lambda _: None)
            return
        line = Progress(ctx.stage, ctx.recipe.samples, "samples", start=state.samples) if world.first else None
        with line or nullcontext(), Saver(self.course, world) as saver:
            train(Watch(task, feed, ctx.recipe, ctx.settings, world, saver, publish, line))
        crash_point("training.before_artifact")
        model = averaged(task, state, world)
        if world.first:
            publish(state, model, ctx.recipe.samples)


@dataclass(frozen=True)
class Publisher:
    """Makes artefacts of a state: the averaged weights, the journal, the previews."""

    ctx: Context
    task: Task
    feed: Feed
    world: World
    speed: Speed

    def __call__(self, state: TrainState, model: nn.Module, samples: int) -> None:
        """Publish what the recipe with this stop makes, ``model`` with what the state knows, unless it is there."""
        ctx = at_stop(self.ctx, samples)
        if load_artifact(ctx.store, ctx.stage, ctx.key) is not None:
            return
        precision = computes_in(self.world.device, ctx.recipe.precision)
        bare = self.feed.tables.without_caption
        artifact = ctx.publishable(
            ledger=Ledger(self.feed.order.total, {"no_caption": bare} if bare else {}),
            blobs=self._blobs(state, model),
            metrics=state.journal.latest() | {"samples_seen": state.samples, "wrapped_rows": self.feed.order.wrapped},
            environment={"device": str(self.world.device), "precision": precision, "workers": str(self.world.size)},
            times=self.speed.times(state),
        )
        publish_artifact(ctx.store, artifact, state.seconds)

    def _blobs(self, state: TrainState, model: nn.Module) -> dict[str, str]:
        store = self.ctx.store
        blobs = {"metrics.jsonl": put_blob(store, state.journal.text()), **state.journal.previews()}
        with tempfile.TemporaryDirectory() as folder:
            self._save(model, Path(folder))
            for file in sorted(Path(folder).iterdir()):
                blobs[file.name] = put_blob(store, file, move=True)
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


def warm_start(ctx: Context, task: Task) -> Callable[[nn.Module], None] | None:
    """What gives a new model the weights that its recipe names, if it names any."""
    if ctx.recipe.init_from is None:
        return None
    measured = task.measured if isinstance(task, Finishes) else ()
    return partial(load_weights, ctx.store, ctx.stage, ctx.recipe.init_from, measured)


def at_stop(ctx: Context, samples: int) -> Context:
    """The same stage with another number of samples, under the key that it then has.

    Up to the fork that is the training whose learning rate does not fall.
    """
    recipe = ctx.recipe if samples == ctx.recipe.samples else replace(ctx.recipe, samples=samples, decay=0)
    inputs = {name: artifact.key for name, artifact in ctx.inputs.items()}
    return replace(ctx, recipe=recipe, key=artifact_key(ctx.stage, ctx.version, recipe, inputs))
