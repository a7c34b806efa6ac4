"""What stages take, and what a machine can hold. No Ray."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import load_config, make_config
from pipeline.doctor.readiness import on_ray
from pipeline.graph import resources
from pipeline.graph.resources import WORKER_BYTES, Machine, Resources, Settings, WorkerGroup, object_store_mb, team_of
from pipeline.settings import EmbeddingsSettings, GenerationSettings, RaySettings, ShardSettings, TrainingSettings

ROOT = Path(__file__).parents[3]
LEAST: dict[str, Any] = {"project": "p", "store": "s", "source": {"paths": ["a.csv"]}}
MACHINE = {"CPU": 8.0, "GPU": 2.0, "memory": 16 << 30}
LAPTOP, BOX = Machine(8), Machine(64, 8)
CLUSTER = Machine(256, 32, local=False)


def test_a_worker_takes_a_core_or_its_gpu_unless_it_is_told() -> None:
    assert team_of(ShardSettings(3), LAPTOP) == WorkerGroup(3, 1, Resources(1))
    settings = EmbeddingsSettings(workers=2, gpus=0.5, decoders=3, decoder_nodes={"pool": "cpu"}, memory_mb=100)
    assert team_of(settings, LAPTOP) == WorkerGroup(
        2, 1, Resources(0, 0.5, 100 << 20), 3, Resources(labels={"pool": "cpu"})
    )
    assert team_of(replace(settings, cpus=4), LAPTOP).worker == Resources(4, 0.5, 100 << 20)
    training = TrainingSettings(workers=2, nodes={"a": "b"})
    assert team_of(training, Machine(8, local=False)) == WorkerGroup(2, 2, Resources(1, labels={"a": "b"}))
    threads = [TrainingSettings(workers=1, threads=threads) for threads in (0, 1, 2, 16)]
    assert [team_of(each, LAPTOP).worker for each in threads] == [
        Resources(1),
        Resources(1),
        Resources(2),
        Resources(8),
    ]
    assert team_of(threads[2], BOX).worker == Resources(0, 1)
    assert Resources(0, 0.5, 100 << 20).by_name == {"GPU": 0.5, "memory": 100 << 20}


@pytest.mark.parametrize(
    ("machine", "workers", "each"),
    [
        (BOX, 8, 8),
        (replace(BOX, cpus=200), 8, 12),
        (Machine(8, 8), 8, 0),  # the worker's own thread does as much
        (LAPTOP, 8, 0),
        (replace(CLUSTER, grows=True), 32, 12),
        (Machine(8, 1, local=False, grows=True), 1, 12),  # more nodes come
        (Machine(8, local=False, grows=True), 8, 0),
        (CLUSTER, 32, 8),
    ],
)
def test_decoders_take_the_cores_beside_gpus(machine: Machine, workers: int, each: int) -> None:
    team = team_of(EmbeddingsSettings(memory_mb=1), machine)
    assert (team.count, team.helpers, team.firm) == (workers, each, False)
    named = team_of(EmbeddingsSettings(decoders=3), machine)
    assert (named.helpers, named.firm) == (3, True)


@pytest.mark.parametrize(
    ("changes", "least", "on_one_machine"), [({}, 4, 1), ({"min_workers": 2}, 2, 2), ({"sharded": True}, 4, 4)]
)
def test_how_few_workers_a_training_makes_do_with(changes: Any, least: int, on_one_machine: int) -> None:
    settings = TrainingSettings(workers=4, **changes)
    assert team_of(settings, Machine(8, local=False)).least == least
    assert team_of(settings, LAPTOP).least == on_one_machine


@pytest.mark.parametrize(
    ("device", "workers", "there", "autoscaler", "gpus"),
    [("auto", 2, 2, False, 1), ("auto", 3, 2, False, 0), ("auto", 2, 0, False, 0), ("auto", 2, 1, True, 1),
     ("cpu", 2, 2, True, 0), ("cuda", 3, 0, False, 1)],
)  # fmt: skip
def test_a_training_takes_gpus_that_are_there_or_that_it_must_have(
    device: str, workers: int, there: float, autoscaler: bool, gpus: int
) -> None:
    machine = Machine(8, there, local=False, grows=autoscaler)
    share = team_of(TrainingSettings(workers=workers, device=device), machine).worker
    assert (share.gpus, share.cpus) == (gpus, 0 if gpus else 1)


@pytest.mark.parametrize(
    ("told", "count"),
    [("max 100000", 64), ("1600000 100000", 16), ("150000 100000", 1), ("50000 100000", 1), ("9000000 100000", 64)],
)
def test_the_cores_are_those_that_the_container_may_use(
    told: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More threads than that would be stopped in turn, and wait for each other."""
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: range(64))
    assert resources.cores() == 64
    (tmp_path / "cpu.max").write_text(told + "\n")
    assert resources.cores() == count


@pytest.mark.parametrize(
    ("settings", "machine", "most", "count", "gpus"),
    [
        (TrainingSettings(), LAPTOP, 64, 0, 0),  # this process, on all cores
        (TrainingSettings(), Machine(8, 1), 64, 1, 1),
        (TrainingSettings(workers=4), Machine(8, 1), 64, 4, 1),  # one GPU before many cores
        (TrainingSettings(), BOX, 64, 8, 1),
        (TrainingSettings(), CLUSTER, 64, 32, 1),
        (TrainingSettings(), CLUSTER, 8, 8, 1),  # no lane is shared
        (TrainingSettings(workers=0), BOX, 64, 0, 1),
        (TrainingSettings(device="cpu"), BOX, 64, 0, 0),
        (TrainingSettings(device="cuda:3"), BOX, 64, 0, 1),  # this process, on that GPU
        (TrainingSettings(sharded=True), Machine(64, 6), 64, 6, 1),
        (TrainingSettings(sharded=True), LAPTOP, 64, 1, 0),
        (TrainingSettings(min_workers=2), LAPTOP, 64, 2, 0),
        (TrainingSettings(workers=9), Machine(4, 1, local=False, grows=True), 64, 9, 1),  # nodes with GPUs are added
        (EmbeddingsSettings(), LAPTOP, 99, 8, 0),
        (EmbeddingsSettings(), LAPTOP, 3, 3, 0),  # no more than shards
        (EmbeddingsSettings(), BOX, 99, 8, 1),
        (EmbeddingsSettings(gpus=0), BOX, 99, 64, 0),
        (EmbeddingsSettings(gpus=0.5), BOX, 99, 16, 0.5),
        (GenerationSettings(), CLUSTER, 99, 32, 1),
        (ShardSettings(), BOX, 99, 64, 0),  # its work has no use for GPUs
        (ShardSettings(), Machine(64, memory=9 * WORKER_BYTES), 99, 9, 0),
        (ShardSettings(memory_mb=1 << 10), Machine(64, memory=16 << 30), 99, 16, 0),
        (ShardSettings(), Machine(1, memory=1 << 30), 99, 1, 0),  # never none
    ],
)
def test_what_is_there_is_used_where_nothing_is_said(
    settings: Settings, machine: Machine, most: int, count: int, gpus: float
) -> None:
    team = team_of(settings, machine, most)
    assert (team.count, team.worker.gpus if count else gpus) == (count, gpus)


@pytest.mark.parametrize(
    ("team", "holds"),
    [
        (WorkerGroup(5, 1, Resources(1)), 5),
        (WorkerGroup(20, 1, Resources(3)), 2),
        (WorkerGroup(99, 1, Resources(0.3)), 26),
        (WorkerGroup(99, 1, Resources(1, memory=3 << 30)), 5),
        (WorkerGroup(9, 1, Resources(9)), 0),
        (WorkerGroup(9, 1, Resources(1), 6), 1),
        (WorkerGroup(9, 1, Resources(1), 8), 0),
    ],
)
def test_room(team: WorkerGroup, holds: int) -> None:
    assert team.room(MACHINE) == holds


def test_the_object_store_has_room_for_what_waits_for_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert object_store_mb(RaySettings(), LAPTOP) == 500
    assert object_store_mb(RaySettings(object_store_mb=200), BOX) == 200
    monkeypatch.setattr(resources, "available_memory", lambda: 1000 << 30)
    monkeypatch.setattr(resources, "SHARED", tmp_path / "none")
    assert object_store_mb(RaySettings(), BOX) == 300 << 10
    monkeypatch.setattr(resources, "SHARED", tmp_path)
    for free, holds in ((10 << 30, 8 << 10), (1 << 40, 300 << 10), (64 << 20, 500)):
        monkeypatch.setattr(resources.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert object_store_mb(RaySettings(), BOX) == holds


def test_what_is_asked_for_is_said() -> None:
    assert str(WorkerGroup(14, 12, Resources(1))) == "at least 12 workers with 1 core each"
    assert str(WorkerGroup(2, 1, Resources(1, 4, 32 << 30, {"pool": "a"}), 10)) == (
        "2 workers with 4 GPUs and 1 core and 32,768 MiB on nodes with pool=a and 10 decoders of 1 core each"
    )


@pytest.mark.parametrize("path", [None, *sorted((ROOT / "configs").glob("*.yaml"))], ids=str)
@pytest.mark.parametrize("cores", [1, 2])
def test_on_two_cores_and_on_one_every_stage_has_room(path: Path | None, cores: int) -> None:
    """The defaults, and every configuration that comes with it."""
    config = load_config(path) if path else make_config(LEAST)
    wanted: dict[str, Settings] = on_ray(config, vars(config))
    assert {"pairs", "embeddings"} <= wanted.keys()
    for settings in wanted.values():
        team = team_of(settings, Machine(cores))
        assert team.room({"CPU": cores, "memory": 1 << 30}) >= team.least


def test_stages_that_work_without_ray_are_not_looked_at() -> None:
    run = {"pairs": {"workers": 0}, "clip": {"workers": 2}, "decoder": {"workers": 2}}
    stages = ("source", "captions", "pairs", "clip", "embeddings", "decoder", "samples")
    assert on_ray(make_config(LEAST | {"run": run}), stages).keys() == {"clip", "embeddings", "decoder"}
    bought = make_config(LEAST | {"run": run, "clip": {"weights": "open_clip:ViT-B-32:openai"}})
    assert on_ray(bought, stages).keys() == {"embeddings", "decoder"}
    assert on_ray(bought, []) == {}


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="labels and min_workers exclude each other"):
        TrainingSettings(workers=2, min_workers=1, nodes={"pool": "gpu"})


def test_a_share_of_a_gpu_lies_on_one() -> None:
    places = [Resources(0.0, gpus).places({"CPU": 8, "GPU": 4}) for gpus in (0.1, 0.4, 0.5, 0.6, 1.0, 2.0, 3.0, 5.0)]
    assert places == [40, 8, 8, 4, 4, 2, 1, 0]
