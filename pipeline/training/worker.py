"""One worker of a training, from the inputs in the store to the artefact in the store."""

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
from models.precision import computes_in
from pipeline.graph.artifacts import load_artifact, publish_artifact
from pipeline.graph.keys import artifact_key
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.store.crash import crash_point
from pipeline.store.records import put_blob, read_blob
from pipeline.training.between_steps import BetweenSteps, averaged
from pipeline.training.checkpoints import BranchedCheckpoints
from pipeline.training.compiling import compile_layers, compiles
from pipeline.training.device import keep_freed_memory, memory_for
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.feed.feed import Batches, Feed
from pipeline.training.feed.order import lanes_of
from pipeline.training.loop import fit
from pipeline.training.memory import fitting_rows, refuses
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.saver import Saver
from pipeline.training.state import TrainState, begin, share
from pipeline.training.task import Contrastive, Examples, Finishes, Task, task_of
from pipeline.training.timing import NOT_MEASURED, Speed, measure_speed
from pipeline.training.warm_start import load_weights


@dataclass(frozen=True)
class Training:
    """Trains as one of the workers. It is pickled, sent to all of them, and called there."""

    ctx: Context
    course: BranchedCheckpoints

    def __call__(self, group: ProcessGroup) -> None:
        """Trains from the newest checkpoint to the stop; rank 0 publishes.

        Raises Superseded, OutOfMemory, CorruptObject and UserError.
        """
        with memory_for("the model, with its average, its optimiser and what is measured of it,"):
            self._work(group)

    def _work(self, group: ProcessGroup) -> None:
        ctx = self.ctx
        keep_freed_memory()
        task = task_of(ctx)
        pin = group.device.type == "cuda"
        feed = Feed(ctx.store, ctx.inputs, task, ctx.recipe, group.rank, group.size, ctx.settings.cache_mb, pin)
        state = self._state(task, group)
        # Before the workers wait for each other, because rank 0 measures alone.
        speed = self._speed(task, feed, state, group) if group.is_rank_0 else NOT_MEASURED
        if isinstance(task, Contrastive):
            of_a_lane = ctx.recipe.batch // ctx.recipe.lanes
            lengths = [of_a_lane * len(lanes_of(rank, group.size, ctx.recipe.lanes)) for rank in range(group.size)]
            task.gather = partial(group.gather, lengths)
        self._train(Publisher(ctx, task, feed, group, speed), state)

    def _speed(self, task: Task, feed: Feed, state: TrainState, group: ProcessGroup) -> Speed:
        # A sharded model computes only with all workers.
        model = task.model(0).eval() if group.sharded else state.ema
        return measure_speed(task, model, feed, self.ctx.recipe.precision, group)

    def _state(self, task: Task, group: ProcessGroup) -> TrainState:
        """Returns the state of the newest checkpoint that every worker can read, else that before the first sample."""
        newest = self.ctx.recipe.whole_samples
        while True:
            state = begin(task, self.ctx.recipe, group, warm_start(self.ctx, task), self.ctx.settings.recompute)
            if group.is_rank_0 or group.sharded:
                self.course.restore(state, newest)
            if group.size > 1 and not group.sharded:
                share(state, group)
            found = group.collect([state.samples])
            if len(set(found)) == 1:
                return state
            newest = min(found)

    def _train(self, publish: Publisher, state: TrainState) -> None:
        ctx, task, feed, group = self.ctx, publish.task, publish.feed, publish.group
        settings = ctx.settings
        # A sharded model computes only with all workers, who would wait for one that failed.
        if task.splittable and not settings.micro_batch and refuses(group.device) and not group.sharded:
            rows = ctx.recipe.batch // ctx.recipe.lanes * -(-ctx.recipe.lanes // group.size)  # of the largest share
            settings = replace(settings, micro_batch=fitting_rows(ctx.stage, feed, ctx.recipe, rows, group, state))
        if compiles(ctx.stage, settings.compile, publish.speed, ctx.recipe.samples - state.samples, group):
            compile_layers(state.model)
        train = partial(fit, ctx.stage, feed, ctx.recipe, settings, group, state)
        if not (group.is_rank_0 or group.sharded):
            train(lambda _: None)
            return
        line = (
            Progress(ctx.stage, ctx.recipe.whole_samples, "samples", start=state.samples) if group.is_rank_0 else None
        )
        with line or nullcontext(), Saver(self.course, group, settings.checkpoint_every_s) as saver:
            train(BetweenSteps(task, feed, ctx.recipe, settings, group, saver, publish, line))
        crash_point("training.before_artifact")
        model = averaged(task, state, group)
        if group.is_rank_0:
            publish(state, model, ctx.recipe.samples)


@dataclass(frozen=True)
class Publisher:
    """Makes artefacts of a state: the averaged weights, the journal, the previews."""

    ctx: Context
    task: Task
    feed: Feed
    group: ProcessGroup
    speed: Speed

    def __call__(self, state: TrainState, model: nn.Module, samples: int) -> None:
        """Publishes the artefact of the recipe with this stop, unless it is there: ``model``, journal and previews."""
        ctx = at_stop(self.ctx, samples)
        if load_artifact(ctx.store, ctx.stage, ctx.key) is not None:
            return
        precision = computes_in(self.group.device, ctx.recipe.precision)
        bare = self.feed.tables.without_caption
        artifact = ctx.publishable(
            ledger=Ledger(self.feed.order.total, {"no_caption": bare} if bare else {}),
            blobs=self._blobs(state, model),
            metrics=state.journal.latest() | {"samples_seen": state.samples, "wrapped_rows": self.feed.order.wrapped},
            environment={"device": str(self.group.device), "precision": precision, "workers": str(self.group.size)},
            times=self.speed.times(state),
        )
        publish_artifact(ctx.store, artifact, state.seconds)

    def _blobs(self, state: TrainState, model: nn.Module) -> dict[str, str]:
        store = self.ctx.store
        blobs = {"metrics.jsonl": put_blob(store, state.journal.text()), **state.journal.previews()}
        with tempfile.TemporaryDirectory() as folder:
            self.save(model, Path(folder))
            for file in sorted(Path(folder).iterdir()):
                blobs[file.name] = put_blob(store, file, move=True)
        return blobs

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes the model as files, after its task has measured it, in fp32 as in sampling, if it does."""
        if not isinstance(self.task, Finishes):
            self.task.save(model, folder)
            return
        with torch.no_grad():
            ctx = self.ctx
            feed = Feed(ctx.store, ctx.inputs, self.task, ctx.recipe)
            statistics = self.task.finish(model, first_rows(feed, ctx.recipe, self.task.finish_rows, self.group.device))
        self.task.save(model, folder, statistics)


def first_rows(feed: Batches, recipe: TrainingRecipe, rows: int, device: torch.device) -> Examples:
    """Returns ``rows`` training rows of the first steps, the same for any workers and any stop."""
    size = min(rows, recipe.batch)
    every = slice(None, None, recipe.batch // size)
    with closing(feed.batches(0)) as batches:
        parts = [local.batch for local in islice(batches, -(-rows // size))]
    columns = {name: torch.cat([part[name][every][:size] for part in parts])[:rows] for name in parts[0]}
    batch = {name: column.to(device) for name, column in columns.items()}
    return [(batch, Draw([(derive_seed(recipe.seed, "finish"), rows)], device))]


def warm_start(ctx: Context, task: Task) -> Callable[[nn.Module], None] | None:
    """Returns what gives a new model the weights that its recipe names; None if it names none."""
    if (file := ctx.recipe.init_from) is None:
        return None
    return lambda model: load_weights(ctx.stage, file, read_blob(ctx.store, file), task, model)


def at_stop(ctx: Context, samples: int) -> Context:
    """Returns the context of the same stage with another number of samples, under the key that it then has.

    Up to the fork this is the training whose learning rate does not fall.
    """
    recipe = ctx.recipe if samples == ctx.recipe.samples else replace(ctx.recipe, samples=samples, decay=0)
    inputs = {name: artifact.key for name, artifact in ctx.inputs.items()}
    return replace(ctx, recipe=recipe, key=artifact_key(ctx.stage, ctx.version, recipe, inputs))
