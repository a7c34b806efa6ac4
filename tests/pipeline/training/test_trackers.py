"""What TensorBoard, MLflow and W&B are told of a training, and that a tracker can hurt none."""

import importlib.util
import json
import logging
import re
import socket
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Context, trajectory_key
from pipeline.ledger import Ledger
from pipeline.store.records import put_blob, read_blob
from pipeline.training import stage
from pipeline.training.recipes import DecoderRecipe, DiffusionPriorRecipe
from pipeline.training.trackers import TRACKERS, TensorBoard, Trackers, _gauges, find_tracker, tell_result
from tests.boards import expressions
from tests.chain import ROOT
from tests.pipeline.training.conftest import World
from tests.pipeline.training.trainings import DECODER, MODEL, lines

RECIPE = DiffusionPriorRecipe(samples=64, batch=16, lanes=8, model=MODEL, seed=3)


def context(world: World, output: Path, *trackers: str, recipe: Any = RECIPE, name: str = "diffusion_prior") -> Context:
    return replace(world.context(name, recipe), output=str(output), trackers=trackers)


def told(ctx: Context, *made: Artifact) -> None:
    trackers = Trackers(ctx)
    for artifact in made:
        trackers.tell(artifact)
    trackers.close()


FIGURES = [{"model": "decoder", "says": "uses its caption", "value": 0.5, "holds": True}]


DECODER_RECIPE = DecoderRecipe(samples=32, batch=16, lanes=8, precision="fp32", model=DECODER)


@pytest.fixture(scope="module")
def made(shared_world: World) -> Artifact:
    """A decoder."""
    return stage.train(shared_world.context("decoder", DECODER_RECIPE))


def told_of_a_decoder(world: World, output: Path, tracker: str, made: Artifact) -> Context:
    """Told by two processes, the second of which goes on where the first ended; and of an evaluation."""
    ctx = context(world, output, tracker, recipe=DECODER_RECIPE, name="decoder")
    told(ctx, so_far(ctx, made, 16))
    told(ctx, so_far(ctx, made, 16), made)
    tell_result(replace(ctx, stage="evaluation"), replace(made, blobs={}, metrics={"figures": FIGURES}))
    return ctx


def so_far(ctx: Context, made: Artifact, samples: int) -> Artifact:
    """What the artefact would be if the training had come so far only."""
    text = read_blob(ctx.store, made.blobs["metrics.jsonl"]).splitlines(keepends=True)
    kept = b"".join(line for line in text if int(re.findall(rb'"samples": (\d+)', line)[0]) <= samples)
    return replace(made, blobs={"metrics.jsonl": put_blob(ctx.store, kept)}, metrics={"samples_seen": samples})


def test_tensorboard_has_the_journal_once(shared_world: World, made: Artifact, tmp_path: Path) -> None:
    """Every scalar and every preview, read back from the event files."""
    ctx = told_of_a_decoder(shared_world, tmp_path, "tensorboard", made)
    folder = tmp_path / f"tensorboard/decoder-{trajectory_key(ctx)[:12]}"
    (other,) = {*(tmp_path / "tensorboard").iterdir()} - {folder}
    assert other.name == f"evaluation-{made.key[:12]}"
    texts = {value.tag: value.tensor.string_val for event in events(other) for value in event.summary.value}
    table = "| model | says | value | holds |\n| --- | --- | --- | --- |\n| decoder | uses its caption | 0.5 | True |"
    assert texts["figures/text_summary"] == [table.encode()]
    scalars: dict[tuple[int, str], float] = {}
    previews = []
    for event in events(folder):
        for value in event.summary.value:
            if value.HasField("image"):
                previews.append(event.step)
            elif value.HasField("simple_value"):
                assert (event.step, value.tag) not in scalars
                scalars[event.step, value.tag] = value.simple_value
    journal = lines(shared_world, made)
    no_scalars = ("samples", "preview")
    expected = {(line["samples"], n): value for line in journal for n, value in line.items() if n not in no_scalars}
    assert scalars.keys() == expected.keys()
    assert all(scalars[place] == pytest.approx(value, rel=1e-6) for place, value in expected.items())
    assert sorted(previews) == [line["samples"] for line in journal if "preview" in line]


def events(folder: Path) -> Iterator[Any]:
    """What the event files of a folder hold."""
    from tensorboardX.proto.event_pb2 import Event

    return (Event.FromString(data) for file in folder.iterdir() for data in records(file))


def records(file: Path) -> list[bytes]:
    """The records of an event file: length, checksum, data, checksum."""
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        found.append(data[at + 12 : at + 12 + size])
        at += 16 + size
    return found


def test_prometheus_scrapes_what_the_dashboard_shows(
    shared_world: World, made: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_PORT", str(port))
    _gauges.cache_clear()
    ctx = told_of_a_decoder(shared_world, tmp_path, "prometheus", made)
    _gauges.cache_clear()
    with urllib.request.urlopen(f"http://localhost:{port}/metrics") as answer:
        families = [*text_string_to_metric_families(answer.read().decode())]
    samples = [sample for family in families for sample in family.samples if sample.labels["stage"] == "decoder"]
    training = {"project": tmp_path.name, "stage": "decoder", "key": trajectory_key(ctx)[:12]}
    assert all(training.items() <= sample.labels.items() for sample in samples)
    latest = {name: value for line in lines(shared_world, made) for name, value in line.items() if name != "preview"}
    assert {sample.labels.get("name", "samples"): sample.value for sample in samples} == pytest.approx(latest)

    shown = " ".join(expressions(ROOT / "docs/training-grafana.json"))
    assert set(re.findall(r"\bunclip_\w+", shown)) == {sample.name for sample in samples}
    assert set(re.findall(r'name="(\w+)"', shown)) == {"loss", "gradient_norm"} <= latest.keys()
    assert any(re.fullmatch(pattern, name) for pattern in re.findall(r'name=~"([^"]+)"', shown) for name in latest)


class Recorded:
    """A tracker of somebody else: what it hears stands in ``heard``, also when a process goes on."""

    heard: ClassVar[list[tuple[int, dict[str, float]]]] = []

    def __init__(self, *_: Any):
        self.last = max((samples for samples, _ in self.heard), default=-1)

    def log(self, samples: int, values: dict[str, float]) -> None:
        self.heard.append((samples, values))

    def image(self, samples: int, png: bytes) -> None:
        raise AssertionError("a prior has no previews")

    def close(self) -> None:
        pass


def test_the_example_of_the_page_and_a_class_of_ones_own(
    shared_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.search(r"```python\n(class ToFile.*?)```", (ROOT / "docs/report.md").read_text(), re.DOTALL)
    (tmp_path / "to_file.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    ctx = context(shared_world, tmp_path, "to_file:ToFile", f"{__name__}:Recorded")
    made = stage.train(ctx)
    told(ctx, so_far(ctx, made, 32))
    told(ctx, so_far(ctx, made, 48), made)
    journal = [(line.pop("samples"), line) for line in lines(shared_world, made)]
    assert Recorded.heard == journal
    (file,) = tmp_path.glob("*.tsv")
    found = [line.split("\t") for line in file.read_text().splitlines()]
    expected = [[str(n), name, str(value)] for n, values in journal for name, value in values.items()]
    assert found == expected
    sys.modules.pop("to_file")


def test_mlflow_has_every_line_image_and_figure_once(
    shared_world: World, made: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder; the client reads it back."""
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    told_of_a_decoder(shared_world, tmp_path / "out", "mlflow", made)
    client = MlflowClient((tmp_path / "out/mlruns").as_uri())
    experiment: Any = client.get_experiment_by_name("out")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"decoder", "evaluation"}
    run = runs["decoder"]
    assert run.data.params["batch"] == "16"
    journal = lines(shared_world, made)
    found = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    assert found == [(line["samples"], line["loss"]) for line in journal if "loss" in line]
    previews = [line["samples"] for line in journal if "preview" in line]
    images = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images")]
    assert sum(name.endswith(".png") for name in images) == len(previews) > 0
    table = client.download_artifacts(runs["evaluation"].info.run_id, "figures.json")
    assert "uses its caption" in Path(table).read_text()


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """The records of a W&B file after its header: in blocks of 32 KiB, each piece with checksum, length and type."""
    whole, at = b"", 0
    while at + 7 <= len(data):
        left = 32768 - (at + 7) % 32768  # the header of the file is in the first block
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def test_wandb_offline_has_every_line_image_and_figure_once(
    shared_world: World, made: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes write two files of one run, which upload it with wandb sync."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    told_of_a_decoder(shared_world, tmp_path / "out", "wandb", made)
    wandb.teardown()  # as at the end of a process: what is still on its way is written
    heard: list[tuple[int, float]] = []
    projects, previews, tables = set(), 0, 0
    for file in sorted((tmp_path / "out/wandb").glob("offline-run-*/run-*.wandb")):
        for record in map(Record.FromString, leveldb_log(file.read_bytes()[7:])):
            projects |= {record.run.project} - {""}
            values = {".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if "loss" in values:
                heard.append((values["samples"], values["loss"]))
            previews += values.get("preview._type") == "image-file"
            tables += values.get("figures._type") == "table-file"
    journal = lines(shared_world, made)
    assert heard == [(line["samples"], line["loss"]) for line in journal if "loss" in line]
    assert (projects, previews, tables) == ({"out"}, sum("preview" in line for line in journal), 1)
    assert "uses its caption" in "".join(file.read_text() for file in tmp_path.rglob("*.table.json"))


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


class Pictures(Recorded):
    """Hears images alone."""

    shown: ClassVar[list[tuple[int, bytes]]] = []

    def image(self, samples: int, png: bytes) -> None:
        self.shown.append((samples, png))


def test_of_samples_the_finished_images_are_shown(shared_world: World, tmp_path: Path) -> None:
    names = {f"{i:04d}{small}.png" for i in range(12) for small in ("", "-64")}
    blobs = {name: put_blob(shared_world.store, name.encode()) for name in names}
    made = Artifact("samples", "b" * 64, {}, {}, Ledger(), blobs)
    tell_result(context(shared_world, tmp_path, f"{__name__}:Pictures"), made)
    assert Pictures.shown == [(i, f"{i:04d}.png".encode()) for i in range(12)]


def test_a_tracker_that_fails_costs_a_warning(
    shared_world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ctx = context(shared_world, tmp_path, f"{__name__}:Broken", "tensorboard")
    made = stage.train(ctx)
    with caplog.at_level(logging.WARNING):
        told(ctx, made, made)
    assert caplog.text.count("failed and is turned off: the server is gone") == 1
    assert list((tmp_path / "tensorboard").iterdir())


def test_names_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_tracker("tensorboard") is TensorBoard
    assert TRACKERS.keys() == {"tensorboard", "wandb", "mlflow", "prometheus"}
    with pytest.raises(UserError, match="wanbd is neither module:function nor one of tensorboard, wandb,"):
        find_tracker("wanbd")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="mlflow is not installed; pip install mlflow-skinny"):
        find_tracker("mlflow")
    for name in ("tensorbord", "json:nothing", "no_such_module:f", "json:__name__"):
        with pytest.raises(UserError, match=rf"run\.trackers: .*{name.split(':')[0]}"):
            find_tracker(name)
