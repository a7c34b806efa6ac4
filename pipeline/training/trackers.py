"""A training's journal in other people's tools: TensorBoard, or whatever a function of the user's writes to.

The journal in the store comes first; a tracker is told its lines from where it has none. It runs beside the driver, so
that it does not matter how many workers there are, and what it cannot do costs a warning and no training.
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

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Context, trajectory_key
from pipeline.store.records import read_blob

log = logging.getLogger("unclip")


class Tracker(Protocol):
    """``last``: samples of the last line that it has, from an earlier process or none (-1)."""

    last: int

    def log(self, samples: int, values: Mapping[str, float]) -> None:
        """A line of the journal: what was measured after so many samples."""

    def picture(self, samples: int, png: bytes) -> None:
        """A preview after so many samples, as a PNG file."""

    def close(self) -> None:
        """Nothing more comes from this process."""


MakeTracker = Callable[[str, str, Mapping[str, Any], Path], Tracker]
"""Called with the stage, its trajectory's key, the recipe as plain values, and the output folder of the run."""


class TensorBoard:
    """Event files in <output>/tensorboard/<stage>-<key>, written anew by every process: the journal has all lines."""

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

    def picture(self, samples: int, png: bytes) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(io.BytesIO(png)) as image:
            self._writer.add_image("preview", np.asarray(image.convert("RGB")), samples, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def find_tracker(name: str) -> MakeTracker:
    """``tensorboard``, or a function by its place, ``module:function``. Raises UserError if there is no such thing."""
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
    """The trackers of one training, by name. One that fails is told nothing more."""

    def __init__(self, ctx: Context):
        self._ctx = ctx
        self._open: dict[str, Tracker] = {}
        recipe, output = asdict(ctx.recipe), Path(ctx.config.run.output)
        for name in ctx.config.run.trackers:
            make = find_tracker(name)
            with self._warned(name):
                self._open[name] = make(ctx.stage, trajectory_key(ctx), recipe, output)

    def tell(self, made: Artifact) -> None:
        """Give every tracker the lines and previews of ``made``, a training or what there is of it, that it lacks."""
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
                tracker.picture(line["samples"], read_blob(self._ctx.store, line["preview"]))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            with self._warned(name):
                tracker.close()

    @contextmanager
    def _warned(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # other people's code, about which a training does not care
            log.warning("%s: the tracker %s fails and is told nothing more: %s", self._ctx.stage, name, e)
            self._open.pop(name, None)
