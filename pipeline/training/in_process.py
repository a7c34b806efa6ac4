"""Trains one model in this process, on the rows of a program, by the pipeline's own loop and without a store."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from models.precision import autocast
from models.random_streams import RandomStreams, derive_seed
from pipeline.errors import UserError
from pipeline.graph.keys import artifact_key
from pipeline.local import open_local
from pipeline.progress import Progress
from pipeline.settings import TrainingSettings
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.feed.feed import LocalBatch, read_ahead
from pipeline.training.feed.order import Order
from pipeline.training.journal import MetricsJournal
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.records import SavedJournal
from pipeline.training.results import first_rows
from pipeline.training.state import TrainState, begin, load_weights, parts, put_back
from pipeline.training.task import Batch, Finishes, Task
from pipeline.training.train import fit, validation_due

SAVE_EVERY_S = 60.0
log = logging.getLogger("unclip")


class Examples(NamedTuple):
    """Rows of a program: their number, and the function that reads a task's columns of some of them."""

    rows: int
    read: Callable[[Sequence[int]], Batch]


class ExampleFeed:
    """Makes batches of examples, in the order that a recipe gives to one shard of them."""

    def __init__(self, examples: Examples, recipe: TrainingRecipe):
        self.examples, self.recipe = examples, recipe
        self.order = Order([examples.rows], recipe.lanes, recipe.window, recipe.seed)

    def batches(self, samples: int) -> Generator[LocalBatch, None, None]:
        """Yields the batch of every step, without end, after ``samples`` samples; the next is read beside a step."""
        return read_ahead(self._batches(samples // self.recipe.batch))

    def _batches(self, step: int) -> Generator[LocalBatch, None, None]:
        recipe = self.recipe
        share, lanes = recipe.batch // recipe.lanes, range(recipe.lanes)
        while True:
            rows = [row for lane in lanes for _, row in self.order.rows(lane, step * share, (step + 1) * share)]
            streams = [(derive_seed(recipe.seed, lane, step), share) for lane in lanes]
            yield LocalBatch(self.examples.read(rows), list(map(str, rows)), streams)
            step += 1


class TrainedModel(NamedTuple):
    """A ``model`` with its averaged weights, in evaluation mode, and the ``journal``, a mapping for each line."""

    model: Any
    journal: list[dict[str, Any]]


@dataclass
class Beside:
    """What is done between the steps of a training: progress, validation, the callback and the checkpoint.

    Attributes:
        name: Name of the training, for progress and messages.
        task: Task that validates.
        recipe: Recipe of the training.
        group: Has the device.
        held_out: Examples to validate on.
        callback: Function that is called after every line of the journal; True ends the training.
        checkpoint: File that holds the state, so that a training that was ended goes on from there.
        line: Progress line.
    """

    name: str
    task: Task
    recipe: TrainingRecipe
    group: ProcessGroup
    held_out: Examples | None = None
    callback: Callable[[TrainedModel], object] | None = None
    checkpoint: Path | None = None
    line: Progress | None = None
    told: int = 0
    saved_at: float = 0.0

    @property
    def key(self) -> str:
        """Returns a key of the training, by its recipe."""
        return artifact_key(self.name, 0, self.recipe, {})

    def __call__(self, state: TrainState) -> None:
        if self.line:
            self.line.advance(state.samples - self.line.done, state.journal.loss_note)
        journal, over = state.journal, state.samples >= self.recipe.samples
        due = self.held_out and (over or validation_due(state.samples // self.recipe.batch))
        validate = due and not journal.has_validation(state.samples)
        save = self.checkpoint and (over or time.monotonic() - self.saved_at > SAVE_EVERY_S)
        told = len(journal.lines) > self.told and self.callback is not None
        if not (validate or save or told) or bool(state.failed):
            return
        if validate:
            journal.lines.append({"samples": state.samples, **self.validated(state.ema)})
        if save:
            self.save(state)
        if self.callback is not None and len(journal.lines) > self.told:
            self.told = len(journal.lines)
            if self.callback(TrainedModel(state.ema, list(journal.lines))) is True and not over:
                if self.checkpoint and not save:
                    self.save(state)
                raise _Ended

    def validated(self, model: nn.Module) -> dict[str, float]:
        """Returns the task's figures on the held-out examples, with noise that is always the same."""
        assert self.held_out is not None
        task, device, seed = self.task, self.group.device, self.recipe.seed
        rows, batches = min(self.held_out.rows, task.validation_rows), []
        for start in range(0, rows, task.validation_batch):
            numbers = range(start, min(rows, start + task.validation_batch))
            batch = {name: column.to(device) for name, column in self.held_out.read(numbers).items()}
            streams = [(derive_seed(seed, "validation", start), len(numbers))]
            batches.append((batch, RandomStreams(streams, device)))
        with torch.no_grad(), autocast(device, self.recipe.precision):
            figures = task.validate(model, batches)
        return {f"validation_{name}": value for name, value in figures.items()} | {"validation_rows": rows}

    def save(self, state: TrainState) -> None:
        """Writes the state into the checkpoint's file, whole or not at all."""
        assert self.checkpoint is not None
        # A copy of each: safetensors refuses tensors that share memory.
        tensors = {
            f"{part}/{name}": tensor.detach().cpu().contiguous().clone()
            for part, named in parts(state).items()
            for name, tensor in named.items()
        }
        said = {"recipe": self.key, "samples": state.samples, "journal": asdict(state.journal.saved())}
        written = self.checkpoint.with_name(f"{self.checkpoint.name}.tmp")
        written.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, written, {"unclip": json.dumps(said)})
        os.replace(written, self.checkpoint)
        self.saved_at = time.monotonic()

    def restore(self, state: TrainState) -> None:
        """Sets the state to that of the checkpoint, where there is one. Raises UserError for one of another recipe."""
        self.saved_at = time.monotonic()
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        remedy = "delete it, or name another file"
        tensors: dict[str, dict[str, torch.Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        try:
            with safe_open(self.checkpoint, "pt") as file:
                said = json.loads(file.metadata()["unclip"])
                if said["recipe"] != self.key:
                    raise UserError(f"checkpoint {self.checkpoint} belongs to another recipe; {remedy}")
                for whole in file.keys():  # noqa: SIM118 - no mapping
                    part, _, name = whole.partition("/")
                    tensors[part][name] = file.get_tensor(whole)
            put_back(state, tensors)
            state.samples, state.journal = said["samples"], MetricsJournal.of(SavedJournal(**said["journal"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as e:
            raise UserError(f"checkpoint {self.checkpoint} is not one of {self.name} ({e}); {remedy}") from e
        self.told = len(state.journal.lines)
        log.info("resuming %s at sample %s of %s", self.name, f"{state.samples:,}", self.checkpoint)


class _Ended(Exception):
    """The callback ends the training."""


def train_on(
    name: str,
    task: Task,
    examples: Examples,
    recipe: TrainingRecipe,
    device: torch.device,
    held_out: Examples | None = None,
    callback: Callable[[TrainedModel], object] | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> TrainedModel:
    """Trains a task's model, from random weights or those of the recipe's ``init_from``, or from a checkpoint.

    Args:
        name: Name of the training, for progress and messages.
        task: Task that makes the model and its loss.
        examples: Rows with the columns that the task names, on the CPU.
        recipe: Recipe of the training.
        device: Device to train on.
        held_out: Rows to validate on, at the start, after 64 steps, 256 and so on, and at the end.
        callback: See Beside.
        checkpoint: See Beside.
        progress: Shows a progress line.

    Raises:
        OutOfMemory: A step does not fit.
        UserError: The training diverged, or ``init_from`` or ``checkpoint`` holds another model.
    """
    group, feed = ProcessGroup(device=device), ExampleFeed(examples, recipe)

    def warm(model: nn.Module) -> None:
        if (file := recipe.init_from) is not None:
            with open_local(file.path) as opened:
                load_weights(name, file, opened.read(), task, model)

    state = begin(task, recipe, group, warm)
    between = Beside(name, task, recipe, group, held_out, callback, checkpoint)
    between.restore(state)
    with Progress(name, recipe.whole_samples, "samples", start=state.samples) if progress else nullcontext() as line:
        between.line = line
        with suppress(_Ended):
            fit(name, feed, recipe, TrainingSettings(), group, state, between)
    model = state.ema
    if isinstance(task, Finishes):
        with torch.no_grad():
            found = task.finish(model, first_rows(feed, recipe, task.finish_rows, device))
        model.load_state_dict(found, strict=False)
    return TrainedModel(model, state.journal.lines)
