"""Validates, publishes milestones and saves between the steps of a training."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from models.draw import Draw
from models.precision import autocast
from pipeline.held_out import FEWEST
from pipeline.progress import Progress
from pipeline.settings import TrainingSettings
from pipeline.store.records import put_blob
from pipeline.training.distributed.process_group import CHECK_EVERY, ProcessGroup
from pipeline.training.feed.feed import Feed
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.saver import Saver
from pipeline.training.state import TrainState
from pipeline.training.task import Previews, Task

log = logging.getLogger("unclip")
FIRST_VALIDATION = 64  # steps; then after four times as many each time


class BetweenSteps:
    """Does what rank 0 does between steps; where a model is sharded, all workers call it, because it takes all of them.

    Every validation pass is saved, because the report shows a running training by its checkpoints. ``publish`` is
    called for every milestone, with its number of samples.
    """

    def __init__(
        self,
        task: Task,
        feed: Feed,
        recipe: TrainingRecipe,
        settings: TrainingSettings,
        group: ProcessGroup,
        saver: Saver,
        publish: Callable[[TrainState, nn.Module, int], None],
        progress: Progress | None,
    ):
        self.task, self.recipe, self.settings, self.group = task, recipe, settings, group
        self.saver, self.publish, self.progress = saver, publish, progress
        self.held_out = feed.validation(task.validation_rows, task.validation_batch) if group.is_rank_0 else []
        self.ticked_at = time.monotonic()
        self.saved: int | None = None
        self.owed = self.left = False  # a validation pass that is not saved yet; a machine that is to be taken away

    def __call__(self, state: TrainState) -> None:
        """Validates if a validation pass is due, as it is at a milestone, and publishes milestones.

        Saves after a validation pass, every ``checkpoint_every_s`` seconds or more, before a machine is taken away, and
        at the end. Only for the last two it waits for a checkpoint that is still being written.
        """
        now = time.monotonic()
        state.seconds += now - self.ticked_at
        self.ticked_at = now
        if self.progress:
            self.progress.advance(state.samples - self.progress.done, partial(loss_note, state))
        self.saved = state.samples if self.saved is None else self.saved  # what was restored
        reached = [m for m in self.settings.milestones if m <= state.samples < m + self.recipe.batch]
        validate = (bool(reached) or validation_due(state.samples, self.recipe)) and not was_validated(state)
        leaving = self.group.leaving() and not self.left
        new = state.samples > self.saved
        self.owed = new and (self.owed or validate)
        last = leaving or state.samples >= self.recipe.samples
        save = new and (last or self._due(state, validate))
        # The loop raises for a step that has failed, a few steps from here.
        if (validate or reached or save) and not bool(state.failed):
            self._validate_publish_save(state, validate, reached, save)
            if leaving:
                self.saver.wait()
                self.left = True
                if self.group.is_rank_0:
                    log.warning("a machine of this training is to be taken away; saved at sample %d", state.samples)
            self.ticked_at = time.monotonic()  # the next step must not count the pause
            state.seconds += self.ticked_at - now
            paused = state.phase_seconds.get("pause", 0.0)
            state.phase_seconds["pause"] = paused + self.ticked_at - now

    def _due(self, state: TrainState, validate: bool) -> bool:
        """Returns whether to save now; after every step with an interval of 0, else not while one is written."""
        due = self.saver.every_s == 0 or (self.saver.free() and (self.owed or self.saver.late()))
        if self.group.sharded and self.saver.every_s:  # rank 0's clock counts, and asking it costs a collective
            asked = validate or state.samples // self.recipe.batch % CHECK_EVERY == 0
            return asked and self.group.collect([due])[0]
        return due

    def _validate_publish_save(self, state: TrainState, validate: bool, reached: Sequence[int], save: bool) -> None:
        if validate or reached:
            model = averaged(self.task, state, self.group)
            if self.group.is_rank_0:
                if validate:
                    self.validate(state, model)
                for milestone in reached:
                    self.publish(state, model, milestone)
        if save:
            self.saver.save(state)
            self.saved, self.owed = state.samples, False

    def validate(self, state: TrainState, model: nn.Module) -> None:
        """Validates the averaged weights and draws a preview, both on rows and noise that are always the same.

        Fewer than FEWEST rows give a preview and no figures.
        """
        examples = [
            ({name: column.to(self.group.device) for name, column in local.batch.items()}, local.streams)
            for local in self.held_out
        ]
        if not examples:
            state.journal.lines.append({"samples": state.samples, "validation_rows": 0})
            return
        device = self.group.device
        with torch.no_grad(), autocast(device, self.recipe.precision):
            pairs = [(batch, Draw(streams, device)) for batch, streams in examples]
            rows = sum(len(local.keys) for local in self.held_out)
            figures = self.task.validate(model, pairs) if rows >= FEWEST else {}
            line: dict[str, Any] = {f"validation_{name}": value for name, value in figures.items()}
            line["validation_rows"] = rows
            if isinstance(self.task, Previews):
                shown = min(self.task.preview_rows, len(self.held_out[0].keys))
                seed = self.held_out[0].streams[0][0]
                batch = {name: column[:shown] for name, column in examples[0][0].items()}
                preview = self.task.preview(model, batch, Draw([(seed, shown)], device))
                line["preview"] = put_blob(self.saver.course.branch.store, preview_png(preview))
        state.journal.lines.append({"samples": state.samples, **line})


def averaged(task: Task, state: TrainState, group: ProcessGroup) -> nn.Module:
    """Returns the averaged weights as a model for rank 0; where it is sharded, all workers call it together."""
    if not group.sharded:
        return state.ema
    weights = group.whole(state.ema)
    if not group.is_rank_0:
        return state.ema
    model = task.model(0).eval().requires_grad_(False)
    model.load_state_dict(weights)
    return model.to(group.device)


def validation_due(samples: int, recipe: TrainingRecipe) -> bool:
    """Returns whether a validation pass is due: at the start, after 64 steps, 256, 1,024 and so on, and at the end."""
    step = samples // recipe.batch
    power_of_four = step & (step - 1) == 0 and step.bit_length() % 2 == 1
    return samples == 0 or samples >= recipe.samples or (step >= FIRST_VALIDATION and power_of_four)


def loss_note(state: TrainState) -> str:
    """Returns what the progress line shows beside the count: the mean loss since the last line, or that of the line."""
    journal = state.journal
    if journal.steps:
        return f"loss {float(journal.sums['loss']) / journal.steps:.4g}"
    return next((f"loss {line['loss']:.4g}" for line in reversed(journal.lines) if "loss" in line), "")


def was_validated(state: TrainState) -> bool:
    """Returns whether the journal has a validation pass at these samples: a resumed training does not repeat it."""
    return any(line["samples"] == state.samples and "validation_rows" in line for line in state.journal.lines)


def preview_png(image: Tensor) -> bytes:
    """Returns an image, uint8 [3, h, w], as the bytes of a PNG file."""
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(out, "PNG")
    return out.getvalue()
