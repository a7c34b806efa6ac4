"""Sends a training's journal, and what is measured at the end, to trackers: those of TRACKERS, or a function.

The journal in the store comes first; a tracker gets the lines that it lacks. It runs beside the driver, so the number
of workers does not matter, and an error of it is a warning and does not end the training.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Context, trajectory_key
from pipeline.store.records import read_blob

log = logging.getLogger("unclip")
SHOWN = 16  # images of a result


class Tracker(Protocol):
    """Gets the lines of a journal. ``last``: samples of the last line that it has, or -1."""

    last: int

    def log(self, samples: int, values: Mapping[str, float]) -> None:
        """Takes a line of the journal: what was measured after ``samples`` samples."""

    def image(self, samples: int, png: bytes) -> None:
        """Takes a preview after ``samples`` samples, as a PNG file."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Takes a table; a tracker without this method gets none."""

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

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Writes a run of Weights & Biases, offline into <output>/wandb where nobody is logged in and WANDB_MODE is unset.

    Its project is WANDB_PROJECT, or the name of the output folder. What was sent stands in <output>/wandb/<id>.last, as
    a run that is written offline cannot be asked.
    """

    def __init__(self, stage: str, key: str, recipe: Mapping[str, Any], output: Path):
        import wandb

        self._wandb, name = wandb, f"{stage}-{key[:12]}"
        self._sent = output / "wandb" / f"{name}.last"
        self._sent.parent.mkdir(parents=True, exist_ok=True)
        here = os.environ.get("WANDB_MODE") is None and not wandb.login(prompt=False)
        if here:
            log.info("%s: not logged in to wandb, so the run is written offline; upload it with wandb sync", stage)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or output.absolute().name,
            id=name,
            name=stage,
            dir=output,
            config=json.loads(json.dumps(recipe, default=str)),
            mode="offline" if here else None,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        sent = int(self._sent.read_text()) if self._sent.exists() else -1
        self.last = max(sent, int(self._run.summary.get("samples", -1)))
        self._run.define_metric("samples")
        self._run.define_metric("*", step_metric="samples")

    def log(self, samples: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "samples": samples})
        self._sent.write_text(str(samples))

    def image(self, samples: int, png: bytes) -> None:
        with Image.open(io.BytesIO(png)) as image:
            self._run.log({"preview": self._wandb.Image(image.convert("RGB")), "samples": samples})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._run.log({name: self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Writes a run of MLflow, to MLFLOW_TRACKING_URI or into <output>/mlruns.

    Its experiment is MLFLOW_EXPERIMENT_NAME, or the name of the output folder.
    """

    def __init__(self, stage: str, key: str, recipe: Mapping[str, Any], output: Path):
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # of which MLflow warns, and which needs no server
        from mlflow import MlflowClient

        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (output / "mlruns").absolute().as_uri())
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or output.absolute().name
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([number], f"tags.training = '{key}'")
        run = found[0] if found else self._client.create_run(number, tags={"training": key}, run_name=stage)
        self._id = run.info.run_id
        self.last = int(run.data.metrics.get("samples", -1))
        for field, value in recipe.items() if not found else ():
            self._client.log_param(self._id, field, value)

    def log(self, samples: int, values: Mapping[str, float]) -> None:
        for name, value in {**values, "samples": samples}.items():
            self._client.log_metric(self._id, name, value, step=samples)

    def image(self, samples: int, png: bytes) -> None:
        with Image.open(io.BytesIO(png)) as image:
            self._client.log_image(self._id, image.convert("RGB"), key="preview", step=samples)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        by_column = {column: [str(row[i]) for row in rows] for i, column in enumerate(columns)}
        self._client.log_table(self._id, by_column, f"{name}.json")

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Prometheus:
    """Serves the latest value of every metric at /metrics while the run lasts, for Prometheus to scrape.

    All trainings of a process share the server. It listens at OTEL_EXPORTER_PROMETHEUS_HOST and
    OTEL_EXPORTER_PROMETHEUS_PORT, by default localhost and 9464.
    """

    def __init__(self, stage: str, key: str, recipe: Mapping[str, Any], output: Path):
        self._samples, self._values = _gauges()
        self._training = (output.absolute().name, stage, key[:12])
        self.last = -1

    def log(self, samples: int, values: Mapping[str, float]) -> None:
        self._samples.labels(*self._training).set(samples)
        for name, value in values.items():
            self._values.labels(*self._training, name).set(value)

    def image(self, samples: int, png: bytes) -> None:
        """Prometheus has numbers only."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Prometheus has numbers only."""

    def close(self) -> None:
        """What was measured last is served until the process ends, so that a scrape after the end finds it."""


@cache
def _gauges() -> tuple[Any, Any]:
    """Starts the server, once in a process, and returns the gauges of samples seen and of all values."""
    from prometheus_client import CollectorRegistry, Gauge, start_http_server

    registry, training = CollectorRegistry(), ("project", "stage", "key")
    samples = Gauge("unclip_training_samples", "Samples seen.", training, registry=registry)
    about = "Latest value of a metric of the journal, such as loss."
    values = Gauge("unclip_training_value", about, (*training, "name"), registry=registry)
    host = os.environ.get("OTEL_EXPORTER_PROMETHEUS_HOST", "localhost")
    start_http_server(int(os.environ.get("OTEL_EXPORTER_PROMETHEUS_PORT", "9464")), host, registry)
    return samples, values


TRACKERS: Mapping[str, MakeTracker] = {
    "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "prometheus": Prometheus
}  # fmt: skip
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}


def find_tracker(name: str) -> MakeTracker:
    """Returns one of TRACKERS, or the function "module:function". Raises UserError where it is not there."""
    if name in TRACKERS:
        if name in PACKAGES and importlib.util.find_spec(name) is None:
            raise UserError(f"run.trackers: {name} is not installed; pip install {PACKAGES[name]}, or leave it out")
        return TRACKERS[name]
    module, colon, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError) as e:
        raise UserError(f"run.trackers: {name}: {e}; the module must be on PYTHONPATH") from e
    if not callable(found):
        raise UserError(f"run.trackers: {name} is neither module:function nor one of {', '.join(TRACKERS)}")
    return found


class Trackers:
    """Sends to the trackers of one training or result, by name. A tracker that fails gets nothing more."""

    def __init__(self, ctx: Context, key: str = ""):
        self._ctx = ctx
        self._open: dict[str, Tracker] = {}
        recipe, output = asdict(ctx.recipe), Path(ctx.output)
        for name in ctx.trackers:
            output.mkdir(parents=True, exist_ok=True)
            make = find_tracker(name)
            with self._warned(name):
                self._open[name] = make(ctx.stage, key or trajectory_key(ctx), recipe, output)

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

    def show(self, images: Sequence[bytes], figures: Sequence[Mapping[str, Any]]) -> None:
        """Sends every tracker images of a result, the first with step 0, and its figures as a table."""
        columns = list(dict.fromkeys(name for figure in figures for name in figure))
        for name, tracker in list(self._open.items()):
            with self._warned(name):
                for step, image in enumerate(images):
                    tracker.image(step, image)
                if figures and hasattr(tracker, "table"):
                    tracker.table("figures", columns, [[str(one.get(c, "")) for c in columns] for one in figures])

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            with self._warned(name):
                tracker.close()

    @contextmanager
    def _warned(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # a tracker is code of somebody else, and must not end a training
            log.warning("%s: the tracker %s failed and is turned off: %s", self._ctx.stage, name, e)
            self._open.pop(name, None)


def tell_result(ctx: Context, made: Artifact) -> None:
    """Sends images and figures of a stage that trains nothing, such as samples and evaluation, if it has some."""
    if not ctx.trackers:
        return
    names = sorted(name for name in made.blobs if name.endswith(".png") and not name.endswith("-64.png"))[:SHOWN]
    trackers = Trackers(ctx, made.key)
    trackers.show([read_blob(ctx.store, made.blobs[name]) for name in names], made.metrics.get("figures", ()))
    trackers.close()
