"""What a training leaves: validation passes with previews, and the artefacts of its milestones and of its stop."""

from __future__ import annotations

import io
import logging
import tempfile
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from models.precision import autocast, computes_in
from models.random_streams import RandomStreams, derive_seed
from pipeline.graph.artifacts import load_artifact, publish_artifact
from pipeline.graph.keys import artifact_key
from pipeline.graph.stages import Context
from pipeline.held_out import FEWEST
from pipeline.ledger import Ledger
from pipeline.store.records import put_blob
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.feed.feed import Batches, Feed, LocalBatch
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.state import TrainState
from pipeline.training.task import Examples, Finishes, Previews, Shardable, Task
from pipeline.training.timing import Speed

log = logging.getLogger("unclip")


@dataclass
class Results:
    """Measures the averaged weights of a state, and makes artefacts of them.

    Rank 0 does so; where the model is sharded, all workers call ``averaged`` together before.
    """

    ctx: Context
    task: Task
    feed: Feed
    group: ProcessGroup
    speed: Speed
    held_out: list[LocalBatch] = field(init=False)

    def __post_init__(self) -> None:
        # Read before the first step: later the feed's threads are at work on the same cache of images.
        task, first = self.task, self.group.is_rank_0
        self.held_out = self.feed.validation(task.validation_rows, task.validation_batch) if first else []

    def averaged(self, state: TrainState) -> nn.Module:
        """Returns the averaged weights as a model for rank 0; where it is sharded, all workers call it together."""
        if not self.group.sharded:
            return state.ema
        weights = self.group.whole(state.ema)
        if not self.group.is_rank_0:
            return state.ema
        assert isinstance(self.task, Shardable)
        model = self.task.empty().eval().requires_grad_(False)
        model.load_state_dict(weights, assign=True)
        return model.to(self.group.device)

    def validate(self, state: TrainState, model: nn.Module) -> None:
        """Validates the averaged weights and draws a preview, both on rows and noise that are always the same.

        Fewer than FEWEST rows give a preview and no figures.
        """
        device, rows = self.group.device, sum(len(local.keys) for local in self.held_out)
        with torch.no_grad(), autocast(device, self.ctx.recipe.precision):
            examples = [
                (
                    {name: column.to(device) for name, column in local.batch.items()},
                    RandomStreams(local.streams, device),
                )
                for local in self.held_out
            ]
            figures = self.task.validate(model, examples) if rows >= FEWEST else {}
            line: dict[str, Any] = {f"validation_{name}": value for name, value in figures.items()}
            line["validation_rows"] = rows
            if isinstance(self.task, Previews) and examples:
                first = self.held_out[0]
                shown = min(self.task.preview_rows, len(first.keys))
                batch = {name: column[:shown] for name, column in examples[0][0].items()}
                preview = self.task.preview(model, batch, RandomStreams([(first.streams[0][0], shown)], device))
                line["preview"] = put_blob(self.ctx.store, preview_png(preview))
        state.journal.lines.append({"samples": state.samples, **line})

    def publish(self, state: TrainState, model: nn.Module, samples: int) -> None:
        """Publishes the artefact of the recipe with this stop, unless it is there: ``model``, journal and previews."""
        ctx = at_stop(self.ctx, samples)
        if load_artifact(ctx.store, ctx.stage, ctx.key) is not None:
            return
        precision = computes_in(self.group.device, ctx.recipe.precision)
        artifact = ctx.publishable(
            ledger=Ledger(self.feed.order.total),
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
        ctx = self.ctx
        with torch.no_grad():
            # From a feed of one worker, so that the number of workers does not move what is measured.
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
    return [(batch, RandomStreams([(derive_seed(recipe.seed, "finish"), rows)], device))]


def preview_png(image: Tensor) -> bytes:
    """Returns an image, uint8 [3, h, w], as the bytes of a PNG file."""
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(out, "PNG")
    return out.getvalue()


def at_stop(ctx: Context, samples: int) -> Context:
    """Returns the context of the same stage with another number of samples, under the key that it then has.

    Up to the fork this is the training whose learning rate does not fall.
    """
    recipe = ctx.recipe if samples == ctx.recipe.samples else replace(ctx.recipe, samples=samples, decay=0)
    return replace(ctx, recipe=recipe, key=artifact_key(ctx.stage, ctx.version, recipe, ctx.input_keys))


def warn_of_milestones(ctx: Context, reached: int) -> None:
    """Says which milestones lie before the checkpoint that a training goes on from, and are not there."""
    text = "%s: the milestone at %s samples is before the checkpoint that is resumed, and is not made"
    for milestone in ctx.settings.milestones:
        gone = milestone + ctx.recipe.batch <= reached
        if gone and load_artifact(ctx.store, ctx.stage, at_stop(ctx, milestone).key) is None:
            log.warning(text, ctx.stage, f"{milestone:,}")
