"""One training, told from top to bottom: from a recipe to the artefact in the store.

- ``train_model``: the process that was asked checks, resumes, launches workers, and does so again after a loss.
- ``Worker``: each worker makes the state, restores the newest checkpoint and takes steps; rank 0 publishes.
- ``fit`` and ``backward``: a step is a batch, its loss, the gradient, the optimiser, the average.
- ``BetweenSteps``: everything beside the steps, such as checkpoints, validation passes and milestones.

Batches come from feed/, models and losses from tasks/, Ray is in distributed/.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from time import sleep

import torch
from torch import Tensor, nn

from models.precision import autocast
from models.random_streams import derive_seed
from pipeline.errors import Unreachable, UserError
from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.graph.device import OutOfMemory, keep_freed_memory, memory_for
from pipeline.graph.ray import uses_ray
from pipeline.graph.stages import Context
from pipeline.progress import Progress
from pipeline.settings import TrainingSettings
from pipeline.store.crash import crash_point
from pipeline.store.records import read_blob
from pipeline.training.checkpoints import Checkpoints, open_checkpoints
from pipeline.training.checks import check, most_workers
from pipeline.training.compiling import compile_layers, compiles
from pipeline.training.distributed.heartbeats import BETWEEN
from pipeline.training.distributed.launch import WorkerLost, gave_up, launch
from pipeline.training.distributed.process_group import HUNG_S, LONG_S, ProcessGroup
from pipeline.training.distributed.sharding import full_tensor
from pipeline.training.feed.feed import Batches, Feed, LocalBatch
from pipeline.training.feed.order import share_of
from pipeline.training.follow import following, showing
from pipeline.training.journal import Step, check_finite
from pipeline.training.memory import halved, micro_batch
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.results import Results, warn_of_milestones
from pipeline.training.saver import Saver
from pipeline.training.state import TrainState, begin, ema_half_life, learning_rate, load_weights, share, update_ema
from pipeline.training.task import Contrastive, Task, task_of
from pipeline.training.timing import NOT_MEASURED, StepTimer, measure_speed

RESTARTS = 3  # in a row, after workers or the store were lost before a new checkpoint
PATIENCE_S = 10.0  # before the first start after the store was lost, twice as long before the second, and so on
FIRST_VALIDATION = 64  # steps; then after four times as many each time
log = logging.getLogger("unclip")


# --- the process that was asked ---------------------------------------------------------------------------------------


def train_model(ctx: Context) -> Artifact:
    """Trains until the recipe's stop, from the newest checkpoint of this trajectory, and returns the artefact.

    Raises UserError before anything starts for settings that cannot work, and when the training diverges, Superseded
    when another process has taken over, CorruptObject for damaged inputs.
    """
    task = task_of(ctx)
    check(ctx, task)
    with showing(ctx):  # report and trackers follow the checkpoints
        run_attempts(replace(ctx, show=None), task)  # a context that can be pickled: it goes to workers
    made = load_artifact(ctx.store, ctx.stage, ctx.key)
    if made is None:
        raise UserError(f"{ctx.stage}: its record vanished as soon as it was written; check the store")
    return made


def run_attempts(ctx: Context, task: Task) -> None:
    """Launches workers until they have reached the stop. Each attempt goes on from the newest checkpoint.

    Nothing but checkpoints passes from one attempt to the next, so that whatever was lost costs the steps since the
    last one. Losses are forgiven as long as new checkpoints come in between. Machines at which a training hung, whose
    GPU broke, or whose workers died twice in a row are left out from then on.
    """
    checkpoints: Checkpoints | None = None
    known: set[str] = set()
    left_out: dict[str, str] = {}
    suspected: Mapping[str, str] = {}
    lost = 0
    while True:
        try:
            if checkpoints is not None:  # a new attempt would fence a process that has taken over meanwhile
                checkpoints.check()
            checkpoints = open_checkpoints(ctx, begin=True)
            newest = partial(checkpoints.newest, ctx.recipe.whole_samples)
            if (records := set(checkpoints.records())) - known:  # even one before a newer checkpoint that is damaged
                known, lost = records, 0
            if reached := newest():
                log.info("resuming %s at sample %s", ctx.stage, f"{reached:,}")
                warn_of_milestones(ctx, reached)
            # The progress line of a worker elsewhere is seen by nobody: here one is drawn from its checkpoints.
            elsewhere = uses_ray(ctx.settings, ctx.ray)
            with following(ctx.stage, ctx.recipe.whole_samples, newest) if elsewhere else nullcontext():
                name = f"{checkpoints.trajectory[:16]}-{checkpoints.attempt:04d}"
                most = most_workers(ctx, task)
                launch(Worker(ctx, checkpoints), ctx.stage, name, ctx.settings, ctx.ray, most, left_out)
            return
        except (WorkerLost, Unreachable) as e:
            lost += 1
            if lost > RESTARTS:
                raise gave_up(ctx.stage, e, lost) from e
            wait_s = PATIENCE_S * lost if isinstance(e, Unreachable) else 0.0
            how = f" in {wait_s:.0f} s" if wait_s else ""
            if isinstance(e, WorkerLost):
                # One death may be chance, or memory that was short; the second in a row is the machine's.
                bad = {**e.bad, **{node: host for node, host in e.died.items() if node in suspected}}
                left_out, suspected = left_out | bad, e.died
                how = f" without {', '.join(sorted(bad.values()))}" if bad else ""
            log.warning("%s: %s; starting again%s", ctx.stage, e, how)
            sleep(wait_s)
        except OutOfMemory as e:
            ctx = replace(ctx, settings=halved(ctx, task, *e.args))


# --- every worker -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worker:
    """Trains as one of the workers. It is pickled, sent to all of them, and called there."""

    ctx: Context
    checkpoints: Checkpoints

    @memory_for("the model, with its average, its optimiser and what is measured of it,")
    def __call__(self, group: ProcessGroup) -> None:
        """Trains from the newest checkpoint to the stop; rank 0 publishes.

        Raises Superseded, OutOfMemory, CorruptObject and UserError.
        """
        ctx, recipe, settings = self.ctx, self.ctx.recipe, self.ctx.settings
        keep_freed_memory()
        task = task_of(ctx)
        pin = group.device.type == "cuda"
        feed = Feed(ctx.store, ctx.inputs, task, recipe, group.rank, group.size, settings.cache_mb, pin)
        state = self.restored(task, group)
        # Rank 0 measures alone, so before the workers wait for each other.
        speed = measure_speed(task, state, feed, recipe.precision, group) if group.is_rank_0 else NOT_MEASURED
        shares = [len(share_of(rank, group.size, recipe.batch)) for rank in range(group.size)]
        settings = replace(settings, micro_batch=micro_batch(ctx, task, feed, max(shares), group, state))
        if group.sharded or isinstance(task, Contrastive):  # whose forward passes wait for the other workers
            group.pulse.alone = ("wait",)
        if isinstance(task, Contrastive):
            task.gather, task.at_once = partial(group.gather, shares), settings.micro_batch
        if compiles(ctx.stage, settings.compile, speed, recipe.samples - state.samples, group):
            compile_layers(state.model)
            group.wait_at_most(LONG_S, state.model)
        train = partial(fit, ctx.stage, feed, recipe, settings, group, state)
        if not (group.is_rank_0 or group.sharded):  # all workers hold the same: rank 0 alone saves and publishes it
            train(lambda _: None)
            return
        results = Results(ctx, task, feed, group, speed)
        line = Progress(ctx.stage, recipe.whole_samples, "samples", start=state.samples) if group.is_rank_0 else None
        saver = Saver(self.checkpoints, group, settings.checkpoint_every_s, state.samples)
        with line or nullcontext(), saver:
            train(BetweenSteps(results, saver, line))
        crash_point("training.before_artifact")
        model = results.averaged(state)
        if group.is_rank_0:
            results.publish(state, model, recipe.samples)

    def restored(self, task: Task, group: ProcessGroup) -> TrainState:
        """Returns the state of the newest checkpoint that every worker can read, else that before the first sample."""
        ctx, newest = self.ctx, self.ctx.recipe.whole_samples

        def warm(model: nn.Module) -> None:
            # Read here, so that these bytes are gone before a checkpoint takes its memory.
            if (file := ctx.recipe.init_from) is not None:
                load_weights(ctx.stage, file, read_blob(ctx.store, file), task, model)

        while True:
            state = begin(task, ctx.recipe, group, warm, ctx.settings.recompute)
            if group.is_rank_0 or group.sharded:  # one reads what all have; of a sharded state each reads its rows
                self.checkpoints.restore(state, newest)
            if group.size > 1 and not group.sharded:
                share(state, group)
            found = group.collect([state.samples])
            if len(set(found)) == 1:
                return state
            newest = min(found)  # a disk or a connection of one worker may fail: no other may be further than it


# --- the loop ---------------------------------------------------------------------------------------------------------


def fit(
    stage: str,
    feed: Batches,
    recipe: TrainingRecipe,
    settings: TrainingSettings,
    group: ProcessGroup,
    state: TrainState,
    between: Callable[[TrainState], None],
) -> TrainState:
    """Trains ``state`` until it has seen ``recipe.samples``, and returns it: any model, on any number of workers.

    ``between`` is called before every step and after the last. No step waits for the device: losses and gradients are
    checked at every line of the journal, and after as many steps as ``group.report_steps`` says; until then
    ``state.failed`` says that a step was not finite, and nothing after it is to be kept.

    Raises:
        UserError: A loss or a gradient is NaN or Inf: the training diverged.
        OutOfMemory: A step, or what is done between steps, does not fit.
    """
    objective = group.wrap(state.objective)
    state.model.train()
    timer = StepTimer(state.phase_seconds, group.device, group.pulse)
    unchecked: list[Step] = []  # steps whose losses nobody has looked at yet
    with closing(feed.batches(state.samples)) as batches:
        while True:
            group.pulse.mark(BETWEEN)
            # Between two steps the state is whole, so that it can be validated, published and saved.
            with memory_for("a validation pass, a milestone or a checkpoint"):
                between(state)
            if state.samples >= recipe.samples:
                return state
            # Threads made the batch beside the last step: where this waits, the feed is too slow for the device.
            timer.start(state.samples // recipe.batch)
            batch = next(batches)
            timer("wait")
            largest = -(-recipe.batch // group.size)  # of the shares
            rows = min(settings.micro_batch or largest, largest)
            with memory_for(f"{rows} rows at once", rows):
                # A contrastive loss takes its rows together, and encodes ``largest`` at once.
                passed = largest if isinstance(state.objective.task, Contrastive) else rows
                losses, values = backward(objective, batch, recipe, passed, group, timer)
                # An infinite bound clips nothing, and the journal has the norm all the same.
                norm = full_tensor(nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip_norm or float("inf")))
                # A flag on the device: to read it here would wait for the step.
                finite = (norm + values["loss"]).isfinite()
                state.failed = state.failed | ~finite
                unchecked.append(Step(state.samples, batch.keys, losses, finite))
                # The rate depends on the samples seen alone, so a resumed training has it without a scheduler's state.
                state.samples += recipe.batch
                for parameters in state.optimizer.param_groups:
                    parameters["lr"] = learning_rate(recipe, state.samples)
                state.optimizer.step()
                # DDP's gradients are parts of what is sent: new ones would lie in memory beside it.
                state.optimizer.zero_grad(set_to_none=group.sharded or group.size == 1)
                timer("optimiser")
                # The average, and not the model, is what is validated and published.
                update_ema(state.ema, state.model, recipe.batch, ema_half_life(recipe, state.samples))
                if not group.pulse.steps:  # the first one, in which layers were compiled
                    group.wait_at_most(HUNG_S, state.model)
                timer("ema")
            state.journal.add(values | {"gradient_norm": norm.double()})
            line = line_due(state.samples // recipe.batch)
            # All workers come here after the same steps: what they say to each other below has to match.
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
    """Adds the gradient of the global batch's mean loss to the parameters, ``size`` rows at a time.

    Every row of the global batch has the same weight, however many of them a worker or a micro-batch holds. Returns
    this worker's losses, [rows], and the means over the global batch of "loss" and its parts, fp64 [] each.
    """
    rows = len(local.keys)
    batch = {name: column.to(group.device, non_blocking=True) for name, column in local.batch.items()}
    totals: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    # Workers of a sharded model compute together: all take as many passes, whatever their shares, none an empty one.
    passes = min(-(-recipe.batch // group.size // size), recipe.batch // group.size)
    for start, stop in pairwise(i * rows // passes for i in range(passes + 1)):
        # Dropout draws from torch's own generator: seeded by what is drawn for, so that a resumed step draws the same.
        torch.manual_seed(derive_seed(local.streams[0][0], "dropout", start))
        with group.accumulation(objective, last=stop == rows):
            with autocast(group.device, recipe.precision):
                rows_of = {name: column[start:stop] for name, column in batch.items()}
                losses = objective(rows_of, local.rng(group.device, start, stop))
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


# --- beside the steps -------------------------------------------------------------------------------------------------


@dataclass
class BetweenSteps:
    """Does what is done beside the steps, on rank 0. All workers of a sharded model call it: it takes all of them.

    A validation pass is due at the start, after 64 steps, 256, 1,024 and so on, at milestones and at the end. What a
    milestone publishes is what a training of that length leaves. The Saver says when a checkpoint is due.
    """

    results: Results
    saver: Saver
    progress: Progress | None
    ticked_at: float = field(default_factory=time.monotonic)
    left: bool = False  # whether the last checkpoint before a machine is taken away has been written

    def __call__(self, state: TrainState) -> None:
        results, recipe, group = self.results, self.results.ctx.recipe, self.results.group
        now = time.monotonic()
        state.seconds += now - self.ticked_at
        self.ticked_at = now
        if self.progress:
            self.progress.advance(state.samples - self.progress.done, state.journal.loss_note)
        step, over = state.samples // recipe.batch, state.samples >= recipe.samples
        reached = [m for m in results.ctx.settings.milestones if m <= state.samples < m + recipe.batch]
        due = bool(reached) or over or validation_due(step)
        validate = due and not state.journal.has_validation(state.samples)  # a resumed training may have it
        leaving = group.leaving() and not self.left
        save = self.saver.due(state.samples, step, validate, last=leaving or over)
        # A step that has failed is neither shown nor saved: the loop raises for it, a few steps from here.
        if not (validate or reached or save) or bool(state.failed):
            return
        if validate or reached:
            model = results.averaged(state)
            if group.is_rank_0 and validate:
                results.validate(state, model)
            for milestone in reached if group.is_rank_0 else ():
                results.publish(state, model, milestone)
        if save:
            self.saver.save(state)
        if leaving:
            self.saver.wait()
            self.left = True
            if group.is_rank_0:
                log.warning("a node of this training is being preempted; saved at sample %d", state.samples)
        self.ticked_at = time.monotonic()  # the pause counts, but not as part of the next step
        state.seconds += self.ticked_at - now
        state.phase_seconds["pause"] = state.phase_seconds.get("pause", 0.0) + self.ticked_at - now


def validation_due(step: int) -> bool:
    """Returns whether a validation pass is due after this step: at the start, after 64 steps, 256, 1,024 and so on."""
    power_of_four = step & (step - 1) == 0 and step.bit_length() % 2 == 1
    return step == 0 or (step >= FIRST_VALIDATION and power_of_four)
