"""What happens between steps: looking, publishing milestones, saving."""

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
from pipeline.held_out import FEWEST
from pipeline.progress import Progress
from pipeline.settings import TrainingSettings
from pipeline.store.records import put_blob
from pipeline.training.distributed.world import World, autocast
from pipeline.training.draws import Undropped
from pipeline.training.feed.feed import Feed
from pipeline.training.loop import CHECK_EVERY
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.saver import Saver
from pipeline.training.state import TrainState
from pipeline.training.task import Previews, Task

log = logging.getLogger("unclip")
FIRST_LOOK = 64  # steps; then every four times as many


class Watch:
    """The pause of the first worker, and of all where a model is spread: then they do together what it takes all of
    them to do. ``publish`` is told of every milestone, with the number that was asked for.

    Every look is saved, because the report shows a running training by its checkpoints.
    """

    def __init__(
        self,
        task: Task,
        feed: Feed,
        recipe: TrainingRecipe,
        settings: TrainingSettings,
        world: World,
        saver: Saver,
        publish: Callable[[TrainState, nn.Module, int], None],
        progress: Progress | None,
    ):
        self.task, self.recipe, self.settings, self.world = task, recipe, settings, world
        self.saver, self.publish, self.progress = saver, publish, progress
        self.shares = feed.validation(task.validation_rows, task.validation_batch) if world.first else []
        self.saved_at = self.ticked_at = time.monotonic()
        self.saved: int | None = None
        self.left = False

    def __call__(self, state: TrainState) -> None:
        """Look at the model if it is time to, publish a milestone, save after a look, every so many seconds, before a
        machine is taken away, and at the end."""
        now = time.monotonic()
        state.seconds += now - self.ticked_at
        self.ticked_at = now
        if self.progress:
            self.progress.advance(state.samples - self.progress.done, partial(note, state))
        self.saved = state.samples if self.saved is None else self.saved  # what was restored
        look = look_due(state.samples, self.recipe) and not looked(state)
        reached = [m for m in self.settings.milestones if m <= state.samples < m + self.recipe.batch]
        leaving = self.world.leaving() and not self.left
        due = look or leaving or state.samples >= self.recipe.samples
        save = state.samples > self.saved and (due or self._late(state, now))
        # The loop tells of what has failed, a few steps from here.
        if (look or reached or save) and not bool(state.failed):
            self._look_publish_save(state, look, reached, save)
            if leaving:
                self.saver.wait()
                self.left = True
                if self.world.first:
                    log.warning("a machine of this training is to be taken away; saved at sample %d", state.samples)
            self.ticked_at = time.monotonic()  # no step may follow that would count the pause
            state.seconds += self.ticked_at - now
            state.laps["pause"] = state.laps.get("pause", 0.0) + self.ticked_at - now

    def _late(self, state: TrainState, now: float) -> bool:
        late = now - self.saved_at >= self.settings.checkpoint_every_s
        if self.world.sharded:  # the first worker's clock counts; to hear of it costs something
            return state.samples // self.recipe.batch % CHECK_EVERY == 0 and self.world.agree(late)
        return late

    def _look_publish_save(self, state: TrainState, look: bool, reached: Sequence[int], save: bool) -> None:
        if look or reached:
            model = averaged(self.task, state, self.world)
            if self.world.first:
                if look:
                    self.look(state, model)
                for milestone in reached:
                    self.publish(state, model, milestone)
        if save:
            self.saver.save(state)
            self.saved, self.saved_at = state.samples, time.monotonic()

    def look(self, state: TrainState, model: nn.Module) -> None:
        """Validates the averaged weights and draws a preview, both on rows and noise that are always the same.

        Fewer than FEWEST rows give a preview and no figures.
        """
        examples = [
            ({name: column.to(self.world.device) for name, column in share.batch.items()}, share.streams)
            for share in self.shares
        ]
        if not examples:
            state.journal.lines.append({"samples": state.samples, "validation_rows": 0})
            return
        device = self.world.device
        with torch.no_grad(), autocast(device, self.recipe.precision):
            pairs = [(batch, Undropped(streams, device)) for batch, streams in examples]
            rows = sum(len(share.keys) for share in self.shares)
            figures = self.task.validate(model, pairs) if rows >= FEWEST else {}
            line: dict[str, Any] = {f"validation_{name}": value for name, value in figures.items()}
            line["validation_rows"] = rows
            if isinstance(self.task, Previews):
                shown = min(self.task.preview_rows, len(self.shares[0].keys))
                seed = self.shares[0].streams[0][0]
                batch = {name: column[:shown] for name, column in examples[0][0].items()}
                picture = self.task.preview(model, batch, Draw([(seed, shown)], device))
                line["preview"] = put_blob(self.saver.course.branch.store, png(picture))
        state.journal.lines.append({"samples": state.samples, **line})


def averaged(task: Task, state: TrainState, world: World) -> nn.Module:
    """The averaged weights as a model that the first worker can use; all have to ask together where it is spread."""
    if not world.sharded:
        return state.ema
    weights = world.whole(state.ema)
    if not world.first:
        return state.ema
    model = task.model(0).eval().requires_grad_(False)
    model.load_state_dict(weights)
    return model.to(world.device)


def look_due(samples: int, recipe: TrainingRecipe) -> bool:
    """At the start, after 64 steps, 256, 1,024 and so on, and at the end."""
    step = samples // recipe.batch
    power_of_four = step & (step - 1) == 0 and step.bit_length() % 2 == 1
    return samples == 0 or samples >= recipe.samples or (step >= FIRST_LOOK and power_of_four)


def note(state: TrainState) -> str:
    """What the progress line says besides the count."""
    journal = state.journal
    return f"loss {float(journal.sums['loss']) / journal.steps:.4g}" if journal.steps else ""


def looked(state: TrainState) -> bool:
    """Whether the journal has a look at these very samples: a resumed training does not look twice."""
    return any(line["samples"] == state.samples and "validation_rows" in line for line in state.journal.lines)


def png(picture: Tensor) -> bytes:
    """uint8 [3, h, w] as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(out, "PNG")
    return out.getvalue()
