"""Machines come and go: a training goes on with as many workers as there is room for, and its losses stay the same."""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.graph.stages import Context
from pipeline.settings import TrainingSettings
from pipeline.training import stage
from pipeline.training.checkpoints import open_checkpoints
from tests.pipeline.training.conftest import World, make_world
from tests.pipeline.training.trainings import CLIP_RECIPE, assert_equal_trainings

pytestmark = pytest.mark.slow
MEMORY = 100 << 20
KNOWN_S = 25.0  # Ray's coordinator of resources looks for new machines every 20 s, and a training asks nobody else
# Long enough to be changed on the way, and slow enough for rounding to stay small.
RECIPE = replace(CLIP_RECIPE, samples=12 * 1500, lanes=12, learning_rate=1e-5)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without cores. Where tmp_path / "crash" is missing, the next worker that saves is killed."""
    import ray
    from ray.cluster_utils import Cluster

    (tmp_path / "crash").touch()
    monkeypatch.setenv("UNCLIP_CRASH", f"checkpoint.after_record@{tmp_path / 'crash'}")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    head = {"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    try:
        yield made
    finally:
        ray.shutdown()
        with suppress(Exception):  # a node of it may have been killed
            made.shutdown()


def wait_for(ctx: Context, samples: int, seconds: float = 120.0, passed: Sequence[int] = ()) -> int:
    """Waits for a checkpoint of at least ``samples``, and of none of ``passed``; returns the samples of the newest."""
    own, end = open_checkpoints(ctx, begin=False), time.monotonic() + seconds
    while ((newest := own.newest(1 << 40)) < samples or newest in passed) and time.monotonic() < end:
        time.sleep(0.1)
    return newest


def test_four_workers_become_two_and_then_three(
    cluster: Any, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine with two of four is killed; later one with one core comes, and a worker dies."""
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=MEMORY) for _ in range(2)]
    settings = TrainingSettings(workers=4, min_workers=1, threads=1, device="cpu", checkpoint_every_s=0.2)
    inputs = ("pairs", "captions", "filter")
    ctx = world.context("clip", RECIPE, settings, inputs)
    with (
        caplog.at_level(logging.WARNING),
        ThreadPoolExecutor(1) as pool,
    ):  # a cluster is changed by the main thread only
        training = pool.submit(stage.train, ctx)
        wait_for(ctx, 10 * 12)
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_for(ctx, 20 * 12)
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        time.sleep(KNOWN_S)
        assert not training.done()
        (tmp_path / "crash").unlink()
        artifact = training.result()
    assert caplog.text.count("starting again") == 2
    assert (tmp_path / "crash").exists()
    assert artifact.environment["workers"] == "3"
    alone = make_world(tmp_path / "straight")
    assert_equal_trainings((world, artifact), (alone, stage.train(alone.context("clip", RECIPE, inputs=inputs))))


def test_a_machine_that_is_to_be_taken_away_costs_no_step(cluster: Any, world: World) -> None:
    """Its last steps are saved when the notice comes, though no checkpoint is due for hours."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    nodes = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(2)]
    settings = TrainingSettings(workers=2, min_workers=1, threads=1, device="cpu", checkpoint_every_s=1e6)
    inputs = ("pairs", "captions", "filter")
    ctx = world.context("clip", RECIPE, settings, inputs)
    validated = [steps * 12 for steps in (64, 256, 1024)]  # saved after a validation pass; a fast machine is soon there
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(stage.train, ctx)
        wait_for(ctx, 64 * 12)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + 30) * 1000)
        GcsClient(cluster.address).drain_node(nodes[1].node_id, reason, "to be taken away", deadline)
        saved = wait_for(ctx, 65 * 12, seconds=25.0, passed=validated)
        cluster.remove_node(nodes[1], allow_graceful=False)
        artifact = training.result()
    assert saved > 64 * 12
    assert saved not in validated
    assert artifact.environment["workers"] == "1"
