"""What TensorBoard and MLflow are told of a training, and that a tracker can hurt none."""

import logging
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Context, trajectory_key
from pipeline.store.records import read_blob
from pipeline.training import stage
from pipeline.training.recipes import DecoderRecipe, DiffusionPriorRecipe
from pipeline.training.trackers import TensorBoard, Trackers, find_tracker
from tests.chain import ROOT
from tests.pipeline.training.conftest import World
from tests.pipeline.training.trainings import DECODER, MODEL, lines

RECIPE = DiffusionPriorRecipe(samples=64, batch=16, lanes=8, model=MODEL, seed=3)


def context(world: World, output: Path, *trackers: str, recipe: Any = RECIPE, name: str = "diffusion_prior") -> Context:
    ctx = world.context(name, recipe)
    run = SimpleNamespace(ray=ctx.config.run.ray, output=str(output), trackers=trackers)
    return replace(ctx, config=SimpleNamespace(run=run, evaluation=ctx.config.evaluation))


def told(ctx: Context, *made: Artifact) -> None:
    trackers = Trackers(ctx)
    for artifact in made:
        trackers.tell(artifact)
    trackers.close()


def so_far(ctx: Context, made: Artifact, samples: int) -> Artifact:
    """What the artefact would be if the training had come so far only."""
    from pipeline.store.records import put_blob

    text = read_blob(ctx.store, made.blobs["metrics.jsonl"]).splitlines(keepends=True)
    kept = b"".join(line for line in text if int(re.findall(rb'"samples": (\d+)', line)[0]) <= samples)
    return replace(made, blobs={"metrics.jsonl": put_blob(ctx.store, kept)}, metrics={"samples_seen": samples})


def test_tensorboard_has_the_journal_once(shared_world: World, tmp_path: Path) -> None:
    """Every scalar and every preview, read back from the event files, after a second process as after the first."""
    from tensorboardX.proto.event_pb2 import Event

    decoder = DecoderRecipe(samples=32, batch=16, lanes=8, precision="fp32", model=DECODER)
    ctx = context(shared_world, tmp_path, "tensorboard", recipe=decoder, name="decoder")
    made = stage.run_decoder(ctx)
    told(ctx, so_far(ctx, made, 16))
    told(ctx, so_far(ctx, made, 16), made)
    (folder,) = (tmp_path / "tensorboard").iterdir()
    assert folder.name == f"decoder-{trajectory_key(ctx)[:12]}"
    scalars: dict[tuple[int, str], float] = {}
    previews = []
    for data in (event for file in folder.iterdir() for event in records(file)):
        event = Event.FromString(data)
        for value in event.summary.value:
            if value.HasField("image"):
                previews.append(event.step)
            elif value.HasField("simple_value"):
                assert (event.step, value.tag) not in scalars
                scalars[event.step, value.tag] = value.simple_value
    journal = lines(shared_world, made)
    expected = {
        (line["samples"], name): value
        for line in journal
        for name, value in line.items()
        if name not in ("samples", "preview")
    }
    assert scalars.keys() == expected.keys()
    assert all(scalars[place] == pytest.approx(value, rel=1e-6) for place, value in expected.items())
    assert sorted(previews) == [line["samples"] for line in journal if "preview" in line]


def records(file: Path) -> list[bytes]:
    """The records of an event file: length, checksum, data, checksum."""
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        found.append(data[at + 12 : at + 12 + size])
        at += 16 + size
    return found


def test_the_example_for_mlflow_works(shared_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/trackers.md has it: told by two processes, MLflow has every line once."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/trackers.md").read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "to_mlflow.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    ctx = context(shared_world, tmp_path, "to_mlflow:ToMLflow")
    made = stage.train(ctx)
    told(ctx, so_far(ctx, made, 32))
    told(ctx, so_far(ctx, made, 48), made)
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("unclip")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["batch"] == "16"
    journal = lines(shared_world, made)
    for name in ("loss", "validation_loss"):
        found = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        assert found == [(line["samples"], line[name]) for line in journal if name in line]
    sys.modules.pop("to_mlflow")


class Broken:
    """Fails at the second line."""

    def __init__(self, *_: Any):
        self.last, self.lines = -1, 0

    def log(self, samples: int, values: Any) -> None:
        self.lines += 1
        if self.lines == 2:
            raise ConnectionError("the server is gone")

    def close(self) -> None:
        raise AssertionError("it was told more")


def test_a_tracker_that_fails_costs_a_warning(
    shared_world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ctx = context(shared_world, tmp_path, f"{__name__}:Broken", "tensorboard")
    made = stage.train(ctx)
    with caplog.at_level(logging.WARNING):
        told(ctx, made, made)
    assert caplog.text.count("failed and gets nothing more: the server is gone") == 1
    assert list((tmp_path / "tensorboard").iterdir())


def test_names_are_checked() -> None:
    assert find_tracker("tensorboard") is TensorBoard
    for name in ("tensorbord", "json:nothing", "no_such_module:f", "json:__name__"):
        with pytest.raises(UserError, match=rf"run\.trackers: .*{name.split(':')[0]}"):
            find_tracker(name)
