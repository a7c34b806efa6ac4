"""Joining a cluster, and whether what stages ask for is there: refused, lowered or waited for."""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.graph import ray as launch
from pipeline.graph.ray import (
    check_room,
    find_machine,
    find_team,
    on_a_gpu,
    room_beside,
    start_ray,
    uses_ray,
    wait_for_room,
)
from pipeline.graph.resources import Machine, WorkerGroup
from pipeline.graph.stages import Context
from pipeline.settings import EmbeddingsSettings, RaySettings, ShardSettings, TrainingSettings
from pipeline.store import open_store

MEMORY = 100 << 20
FIXED, GROWS = RaySettings(), RaySettings(autoscaler=True)


def ray_of(cpus: float, gpus: float = 0) -> Any:
    """Stands in for a Ray with these cores and GPUs on all nodes."""
    total = {"CPU": cpus, "memory": 8 << 30} | ({"GPU": gpus} if gpus else {})
    return SimpleNamespace(cluster_resources=lambda: total, available_resources=lambda: total)


@pytest.fixture
def on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")


@pytest.fixture
def nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "place", lambda *_: False)


@pytest.mark.usefixtures("on_a_cluster", "nothing_fits")
def test_what_a_cluster_cannot_place_is_refused_at_the_start_and_waited_for_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    embeddings = EmbeddingsSettings(2, gpus=1)
    said = "embeddings: Ray has no room for 2 workers with 1 GPU each; it has 4 cores and 0 GPUs, 8,192 MiB for workers"
    with pytest.raises(UserError) as refused:
        check_room(ray_of(4), {"embeddings": embeddings}, FIXED)
    assert str(refused.value) == (
        f"{said}; add such nodes, or ask for less under run.embeddings; where an autoscaler adds them, set "
        "run.ray.autoscaler"
    )
    check_room(ray_of(4), {"embeddings": embeddings}, GROWS)
    for settings, helped in ((FIXED, ""), (GROWS, " and up to 12 decoders of 1 core")):
        with caplog.at_level(logging.WARNING, "unclip"):
            assert wait_for_room(ray_of(4), "embeddings", embeddings, settings).count == 2
        assert caplog.messages == [f"{said.replace(' each', f'{helped} each')}; waiting for nodes that have it"]
        caplog.clear()


def test_on_this_machine_workers_are_lowered_and_what_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here, clip = ray_of(2, 1), TrainingSettings(workers=2, device="cuda")
    with caplog.at_level(logging.INFO, "unclip"):
        for settings in (FIXED, GROWS):
            assert find_team(here, "pairs", ShardSettings(5), settings).count == 2
            assert find_team(here, "clip", clip, settings).count == 1
    assert caplog.messages == [
        f"run.{stage}.workers: {asked} requested, with room for {room}; continuing with {room}"
        for stage, asked, room in (("pairs", 5, 2), ("clip", 2, 1))
    ]
    monkeypatch.setattr(launch, "place", lambda *_: False)
    advice = "ask for less under run.codec, raise run.ray.cpus, or set RAY_ADDRESS to a cluster"
    for asked, workers in ((ShardSettings(1, cpus=3), "worker with 3 cores"), (ShardSettings(1), "worker with 1 core")):
        said = rf"^codec: Ray has no room for 1 {workers}; it has 2 cores .*; {re.escape(advice)}$"
        with pytest.raises(UserError, match=said):
            check_room(here, {"codec": asked}, GROWS)


def test_on_this_machine_a_stage_waits_for_those_that_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here, codec = ray_of(2), ShardSettings(1)
    answers = iter([False, False, True])
    monkeypatch.setattr(launch, "place", lambda *_: next(answers))
    assert wait_for_room(here, "codec", codec, FIXED).count == 1
    assert [message.partition("; it has")[0] for message in caplog.messages] == [
        "codec: Ray has no room for 1 worker with 1 core"
    ]
    assert caplog.messages[0].endswith("; waiting for the stages that run")
    with pytest.raises(UserError, match="codec: Ray has no room for 1 worker with 3 cores"):
        wait_for_room(here, "codec", replace(codec, cpus=3), FIXED)


@pytest.mark.usefixtures("on_a_cluster")
@pytest.mark.parametrize(("workers", "placed"), [("auto", 3), (4, 4)])
def test_a_node_that_counts_after_it_was_lost_costs_its_workers_alone(
    workers: Any, placed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray counts it for a while, and reserves nothing there. A number of workers that is set is waited for."""
    cluster, asked = ray_of(8, 4), []

    def place(team: WorkerGroup) -> bool:
        asked.append(team.count)
        if len(asked) == 2:
            cluster.cluster_resources()["GPU"] = 3
        return team.count <= 3

    monkeypatch.setattr(launch, "place", place)
    assert wait_for_room(cluster, "decoder", TrainingSettings(workers), FIXED).count == placed
    assert asked == ([4, 4, 3] if workers == "auto" else [4])
    assert [message.partition("; it has")[0] for message in caplog.messages] == [
        "decoder: Ray has no room for 4 workers with 1 GPU each"
    ]


@pytest.mark.usefixtures("on_a_cluster")
def test_workers_that_would_take_the_cores_of_their_helpers_are_lowered() -> None:
    for settings, workers in ((FIXED, 2), (GROWS, 4)):
        assert find_team(ray_of(4), "embeddings", EmbeddingsSettings(4, decoders=1), settings).count == workers
        assert find_team(ray_of(4), "pairs", ShardSettings(9), settings).count == 9


def threads(**numbers: int) -> dict[str, tuple[TrainingSettings, int]]:
    """Trainings on one worker each, by their threads."""
    return {name: (TrainingSettings(workers=1, threads=number), 8) for name, number in numbers.items()}


ALL_THREADS = {"clip": (TrainingSettings(workers=2), 8), "decoder": (TrainingSettings(), 2)}


@pytest.mark.parametrize(
    ("cpus", "gpus", "free", "asking", "running", "names"),
    [
        (16, 0, 16, ALL_THREADS, {}, []),  # one that takes all cores runs beside none
        (16, 4, 16, ALL_THREADS, {}, ["clip", "decoder"]),
        (16, 3, 16, ALL_THREADS, {}, ["clip"]),
        (4, 0, 4, threads(clip=0, ar_prior=1, decoder=2, small=2, large=1), {}, ["ar_prior", "decoder", "large"]),
        (3, 0, 1, threads(ar_prior=1, decoder=1), threads(clip=1, small=1), ["ar_prior"]),
        # Until workers have started Ray calls their cores free.
        (3, 0, 2, threads(ar_prior=1, decoder=1), threads(clip=1, small=1), []),
    ],
)
def test_trainings_side_by_side_on_this_machine(
    cpus: float, gpus: float, free: float, asking: Any, running: Any, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reserve(shares: Any, _: float) -> bool:
        return sum(share.cpus for share in shares) <= free and sum(share.gpus for share in shares) <= gpus

    here = ray_of(cpus, gpus)
    here.available_resources = lambda: {"CPU": free, "GPU": gpus}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(launch, "start_ray", lambda _: here)
    monkeypatch.setattr(launch, "_reserve", reserve)
    assert room_beside(asking, running, FIXED) == names


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head with one core, and a node with two and a label."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "object_store_memory": MEMORY, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        made.add_node(num_cpus=2, object_store_memory=MEMORY, labels={"pool": "cpu"})
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def test_another_version_does_not_join(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setattr(ray, "__version__", "2.59.0")
    with pytest.raises(UserError, match=r"runs another version; install the same here: .* Ray: 2\.59\.0"):
        start_ray(RaySettings())
    assert not ray.is_initialized()


def test_ray_says_what_it_can_place(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    ray = start_ray(RaySettings())
    assert [find_machine(settings).gpus for settings in (FIXED, GROWS)] == [0, 1]  # nodes that are added may have one
    fits = {
        "pairs": ShardSettings(40),
        "index": ShardSettings(2, {"pool": "in(cpu,gpu)"}, cpus=2),
        "embeddings": EmbeddingsSettings(1, {"pool": "!cpu"}, decoders=2, decoder_nodes={"pool": "cpu"}),
        "decoder": TrainingSettings(workers=3),
    }
    check_room(ray, fits, FIXED)
    monkeypatch.setattr(launch, "PLACING_S", 0.1)  # what can never be placed is waited for in vain
    for asked in (
        ShardSettings(1, {"pool": "gpu"}),
        ShardSettings(1, {"pool": "!cpu"}, cpus=2),
        EmbeddingsSettings(1, gpus=1),
        EmbeddingsSettings(1, decoders=3, decoder_nodes={"pool": "cpu"}),
        TrainingSettings(workers=4),
    ):
        with pytest.raises(UserError, match=r"^curation: Ray has no room for .* it has 3 cores and 0 GPUs"):
            check_room(ray, {"curation": asked}, FIXED)


def test_trainings_have_room_beside_each_other_by_all_their_workers(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setattr(launch, "BESIDE_S", 1.0)
    workers = {"clip": 2, "decoder": 2, "ar_prior": 1, "diffusion_prior": 1}
    trainings = {name: (TrainingSettings(workers=count, device="cpu"), 8) for name, count in workers.items()}
    assert room_beside(trainings, {}, FIXED) == ["clip", "ar_prior"]
    assert room_beside({"clip": (TrainingSettings(workers=4, min_workers=1, device="cpu"), 8)}, {}, FIXED) == []
    assert room_beside(trainings, {}, GROWS) == list(trainings)


def test_what_draws_goes_to_a_gpu_of_the_cluster(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays in the driver while there is none. Its own error comes back."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    ctx = Context(open_store("unused"), "samples", 1, "k", None, None, {}, ray=FIXED)

    def draw(ctx: Context) -> Any:
        if ctx.version == 2:
            raise UserError("no such caption")
        return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")

    assert on_a_gpu(draw, ctx)[0] == os.getpid()
    node = cluster.add_node(num_cpus=0, num_gpus=1, object_store_memory=MEMORY)
    try:
        drawn: Any = on_a_gpu(draw, ctx)
        process, devices = drawn
        assert (process != os.getpid(), devices) == (True, "0")
        with pytest.raises(UserError, match=r"^no such caption$"):
            on_a_gpu(draw, replace(ctx, version=2))
        assert (find_machine(FIXED).gpus, find_machine(FIXED).local) == (1, False)
    finally:
        cluster.remove_node(node)


def test_a_head_that_does_not_answer_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That of a real cluster: tests/pipeline/graph/test_local_ray.py."""
    alive, context = iter([True, True, True, False]), SimpleNamespace(gcs_address="127.0.0.1:1")
    monkeypatch.setattr(launch, "HEAD_S", 0.0)
    launch._watch_head(SimpleNamespace(is_initialized=lambda: next(alive), get_runtime_context=lambda: context))
    (message,) = caplog.messages
    assert message.startswith("the head of the Ray cluster at 127.0.0.1:1 does not answer (")
    assert "run the same command again" in message


@pytest.mark.parametrize("found", [0, 8])
def test_a_ray_of_this_machine_has_the_gpus_that_torch_can_use(found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray by itself takes those of NVIDIA's driver, and one on every Apple silicon, whatever torch was built for."""
    import ray

    given: dict[str, Any] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(launch, "start_local_ray", lambda _, **how: given.update(how))
    monkeypatch.setattr(launch, "this_machine", lambda settings: Machine(4, found, memory=64 << 30))
    start_ray(RaySettings(object_store_mb=200))
    assert (given["num_cpus"], given["num_gpus"], given["object_store_memory"]) == (4, found, 200 << 20)


def test_this_machine_has_the_gpus_that_torch_finds(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = find_machine(RaySettings(cpus=3))
    assert (found.cpus, found.gpus, found.gpu, found.local) == (3, 8, "NVIDIA H100 80GB HBM3", True)


def test_without_gpus_the_driver_trains_and_with_gpus_workers_do(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here = [TrainingSettings(workers=0), TrainingSettings(device="cpu"), TrainingSettings(device="cuda:1")]
    assert not any(uses_ray(settings, RaySettings()) for settings in here)
    assert uses_ray(TrainingSettings(), RaySettings())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not uses_ray(TrainingSettings(), RaySettings())
    assert uses_ray(TrainingSettings(workers=1), RaySettings())
    assert uses_ray(ShardSettings(), RaySettings())
