"""Sends a training's journal to trackers: TensorBoard, or a function of the user's.

The journal in the store comes first; a tracker gets the lines that it lacks. It runs beside the driver, so the number
of workers does not matter, and an error of it is a warning and does not end the training.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Context, trajectory_key
from pipeline.store.records import read_blob

log = logging.getLogger("unclip")


class Tracker(Protocol):
    """Gets the lines of a journal. ``last``: samples of the last line that it has, or -1."""

    last: int

    def log(self, samples: int, values: Mapping[str, float]) -> None:
        """Takes a line of the journal: what was measured after ``samples`` samples."""

    def image(self, samples: int, png: bytes) -> None:
        """Takes a preview after ``samples`` samples, as a PNG file."""

    def close(self) -> None:
        """Ends: this process sends nothing more."""


MakeTracker = Callable[[str, str, Mapping[str, Any], Path], Tracker]
"""Called with the stage, its trajectory's key, the recipe as plain values, and the output folder of the run."""


class TensorBoard:
    """Writes event files to <output>/tensorboard/<stage>-<key>, again from scratch in every process."""

    def __init__(self, stage: str, key: str, recipe: Mapping[str, Any], output: Path):
        from tensorboardX import SummaryWriter

        folder = output / "tensorboard" / f"{stage}-{key[:12]}"
        shutil.rmtree(folder, ignore_errors=True)
        self.last = -1
        self._writer = SummaryWriter(str(folder))
        self._writer.add_text("recipe", f"    {json.dumps(recipe, indent=4, sort_keys=True, default=str)}")

    def log(self, samples: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, samples)

    def image(self, samples: int, png: bytes) -> None:
        with Image.open(io.BytesIO(png)) as image:
            self._writer.add_image("preview", np.asarray(image.convert("RGB")), samples, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def find_tracker(name: str) -> MakeTracker:
    """Returns the tracker "tensorboard", or the function "module:function". Raises UserError where it is not found."""
    if name == "tensorboard":
        return TensorBoard
    module, colon, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError) as e:
        raise UserError(f"run.trackers: {name}: {e}; the module must be on PYTHONPATH") from e
    if not callable(found):
        raise UserError(f"run.trackers: {name!r} is neither tensorboard nor module:function")
    return found


class Trackers:
    """Sends to the trackers of one training, by name. A tracker that fails gets nothing more."""

    def __init__(self, ctx: Context):
        self._ctx = ctx
        self._open: dict[str, Tracker] = {}
        recipe, output = asdict(ctx.recipe), Path(ctx.config.run.output)
        for name in ctx.config.run.trackers:
            make = find_tracker(name)
            with self._warned(name):
                self._open[name] = make(ctx.stage, trajectory_key(ctx), recipe, output)

    def tell(self, made: Artifact) -> None:
        """Sends every tracker the lines and previews of ``made``, a training so far, that it lacks."""
        if not self._open or "metrics.jsonl" not in made.blobs:
            return
        lines = [json.loads(line) for line in read_blob(self._ctx.store, made.blobs["metrics.jsonl"]).splitlines()]
        for name, tracker in list(self._open.items()):
            with self._warned(name):
                self._tell(tracker, [line for line in lines if line["samples"] > tracker.last])
                tracker.last = max(tracker.last, made.metrics["samples_seen"])

    def _tell(self, tracker: Tracker, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            tracker.log(line["samples"], {k: v for k, v in line.items() if k not in ("samples", "preview")})
            if "preview" in line:
                tracker.image(line["samples"], read_blob(self._ctx.store, line["preview"]))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            with self._warned(name):
                tracker.close()

    @contextmanager
    def _warned(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # a tracker is code of somebody else, and must not end a training
            log.warning("%s: the tracker %s failed and gets nothing more: %s", self._ctx.stage, name, e)
            self._open.pop(name, None)
