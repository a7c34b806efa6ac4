"""ProcessGroup: as many Ray workers as one likes give the result of none, and their errors reach the driver whole."""

import logging
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError
from torch.distributed import DistBackendError

from pipeline.errors import CorruptObject, Superseded, Unreachable, UserError
from pipeline.graph.ray import start_ray
from pipeline.settings import RaySettings
from pipeline.training import stage
from pipeline.training.checkpoints import open_checkpoints
from pipeline.training.distributed.launch import Relayed, Watcher, WorkerLost, _cause, launch
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.recipes import ClipRecipe
from tests.pipeline.training.conftest import World
from tests.pipeline.training.test_stage import RECIPE
from tests.pipeline.training.trainings import CLIP_MODEL, SETTINGS, assert_equal_trainings, lines


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Ray of this module's own. The first of its workers that has saved a checkpoint is killed right after."""
    marker = tmp_path_factory.mktemp("crash") / "killed"
    with pytest.MonkeyPatch.context() as patch:  # its workers have the environment that it is started with
        patch.setenv("UNCLIP_CRASH", f"checkpoint.after_record@{marker}")
        ray = start_ray(RaySettings(cpus=2, object_store_mb=200))
    yield ray
    ray.shutdown()
    assert marker.exists()


CLIP = ClipRecipe(samples=60, batch=12, lanes=3, precision="fp32", warmup_steps=2, learning_rate=1e-3, model=CLIP_MODEL)


def test_ray_workers_train_what_this_process_trains(ray: Any, world: World, caplog: pytest.LogCaptureFixture) -> None:
    """No worker, and two, one of which is killed; the loss compares with the rows of both."""
    made = []
    for workers in (0, 2):
        # Keys of their own, but one trajectory, whose checkpoints must not be shared here.
        recipe, settings = replace(CLIP, samples=60 - workers), replace(SETTINGS, workers=workers)
        ctx = world.context("clip", recipe, settings, inputs=("pairs", "captions"))
        world.store.delete([entry.path for entry in world.store.list("checkpoints/")])
        with caplog.at_level(logging.INFO):
            artifact = stage.train(ctx)
        assert artifact.environment["workers"] == str(max(1, workers))
        made.append((world, artifact))
    losses = [line["loss"] for line in lines(*made[0]) if "loss" in line]
    assert losses[-1] < losses[0]
    assert re.search(r"clip: a worker died or could not start.*; starting again", caplog.text)
    assert "resuming clip at sample 12" in caplog.text
    assert_equal_trainings(made[1], made[0])


def fail(group: ProcessGroup) -> None:
    if group.rank == 1:
        raise CorruptObject("blobs/ab/abc", f"is missing for {group.size} workers")
    group.collect([])


def test_of_more_workers_than_cores_as_many_train_as_there_is_room_for_and_an_error_of_one_is_the_drivers(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, workers=3)
    with pytest.raises(CorruptObject, match="is missing for 2 workers") as caught:
        launch(fail, "clip", "many", settings, RaySettings())
    assert caught.value.path == "blobs/ab/abc"
    monkeypatch.setattr("pipeline.graph.ray.PLACING_S", 1.0)
    for changes, said in (({"sharded": True}, "1 core each"), ({"device": "cuda"}, "1 GPU each")):
        with pytest.raises(
            UserError, match=rf"^clip: Ray has no room for 3 workers with {said}; it has 2 cores and 0 "
        ):
            launch(fail, "clip", "refused", replace(settings, **changes), RaySettings())


@pytest.mark.parametrize("error", [UserError("a"), Superseded("c"), Unreachable("d")])
def test_expected_errors_keep_their_type(error: Exception) -> None:
    found = _cause([RuntimeError("the other side hung up"), Relayed(type(error).__name__, str(error))])
    assert type(found) is type(error)
    assert str(found) == str(error)


def test_a_lost_connection_is_a_lost_worker_unless_another_says_more() -> None:
    closed = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    assert isinstance(_cause([closed, closed]), WorkerLost)
    bug = ZeroDivisionError("division by zero")
    assert _cause([closed, bug]) is bug


def test_the_first_error_of_nccl_is_told() -> None:
    gone = DistBackendError("NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error")
    first = DistBackendError(
        "NCCL error in: NCCLUtils.cpp:77, unhandled system error (run with NCCL_DEBUG=INFO for details)\n"
        "ncclSystemError: System call or external library call failed.\nLast error:\nsocketStartConnect: no route"
    )
    for failures in ([gone, first], [first, gone]):
        found = _cause(failures)
        assert isinstance(found, WorkerLost)
        assert str(found).startswith("a worker died or could not start (NCCL error in: NCCLUtils.cpp:77, unhandled")
        assert str(found).endswith("Last error: socketStartConnect: no route)")


def die(group: ProcessGroup) -> None:
    import ray

    has = ray.get_runtime_context().get_assigned_resources()
    print(f"[2026] gpu-7:12:34 [0] misc/socket.cc:50 NCCL WARN socketStartConnect: no route; {has}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def test_of_a_worker_that_nccl_has_ended_the_log_is_read(ray: Any) -> None:
    """In which this one says that it has the cores and the memory that it is given."""
    settings = replace(SETTINGS, workers=1, cpus=2, memory_mb=64)
    with pytest.raises(WorkerLost, match=r"^a worker died or could not start \(.* NCCL WARN .* no route; ") as lost:
        launch(die, "clip", "die", settings, RaySettings())
    assert "'CPU': 2.0" in str(lost.value)
    assert f"'memory': {64 << 20}" in str(lost.value)


@pytest.mark.parametrize(
    "text",
    [
        "The actor died.\n\tpid: 71\n\tnamespace: n\n\tip: 10.0.0.3\nIts process has died.",
        # Ray Train's poll was answered before Ray knew of the death.
        "A worker health check failed.\nWorker info: Worker(\n  actor=Actor(W, 1),\n  metadata=ActorMetadata(\n"
        "    hostname='h',\n    node_id='n',\n    node_ip='10.0.0.3',\n    pid=71,\n  ),\n)\n"
        "The actor 1 is unavailable: RPC Error message: Socket closed.",
    ],
    ids=["died", "unavailable"],
)
def test_of_a_worker_of_another_machine_ray_is_asked_for_the_log(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    asked = []

    def get_log(**words: Any) -> Iterator[str]:
        asked.append((words["node_ip"], words["pid"]))
        yield "[rank3]: Watchdog caught collective operation timeout:"
        yield " WorkNCCL(SeqNum=7)\nterminate called\n"

    monkeypatch.setattr("ray.util.state.get_log", get_log)
    found = _cause([RayError(text), DistBackendError("NCCL error in: a.cpp:7, remote process exited")])
    assert str(found).endswith("([rank3]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7))")
    assert set(asked) == {("10.0.0.3", 71)}


@pytest.mark.parametrize(
    ("error", "advice"), [(WorkerLost("a worker died"), "look for the cause in Ray's logs"), (Unreachable("gone"), "")]
)
def test_a_training_goes_on_after_lost_workers_and_stores(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    """Two starts fail, the third finishes; with none that comes further there are four at most."""
    calls: list[str] = []

    def fragile(work: Any, stage: str, name: str, *others: Any) -> None:
        calls.append(name)
        if len(calls) < 3:
            raise error
        launch(work, stage, name, *others)

    def hopeless(*_: Any) -> None:
        raise error

    slept: list[float] = []
    monkeypatch.setattr("pipeline.training.train.sleep", slept.append)
    monkeypatch.setattr("pipeline.training.train.launch", fragile)
    ctx = world.context("diffusion_prior", replace(RECIPE, samples=32))
    assert stage.train(ctx).key == ctx.key
    assert slept == ([10.0, 20.0] if isinstance(error, Unreachable) else [0.0, 0.0])  # a store takes its time
    assert [name[-4:] for name in calls] == ["0001", "0002", "0003"]
    monkeypatch.setattr("pipeline.training.train.launch", hopeless)
    with pytest.raises(UserError, match=f"{error} 4 times without a new checkpoint.*{advice}"):
        stage.train(world.context("diffusion_prior", replace(RECIPE, samples=48, seed=1)))


def test_a_driver_that_was_overtaken_begins_no_attempt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fence the one that leads now, whose next would fence its own."""
    calls: list[str] = []
    ctx = world.context("diffusion_prior", replace(RECIPE, samples=32))

    def overtaken(work: Any, stage: str, name: str, *others: Any) -> None:
        calls.append(name)
        open_checkpoints(ctx, begin=True)  # another driver's
        raise Unreachable("gone")

    monkeypatch.setattr("pipeline.training.train.sleep", lambda seconds: None)
    monkeypatch.setattr("pipeline.training.train.launch", overtaken)
    with pytest.raises(Superseded, match="attempt 1 of this training stops: attempt 2 has begun"):
        stage.train(ctx)
    assert len(calls) == 1


def test_where_steps_are_slow_workers_report_after_fewer_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a notice that a machine goes is heard within seconds, or a step."""
    now, asked = [0.0], []
    monkeypatch.setattr("pipeline.training.distributed.launch.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("ray.train.report", lambda metrics: None)
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: asked.append(now[0]))
    watcher, steps = Watcher(1, "cpu"), []
    for seconds in [2.0] * 5 + [20.0] * 2 + [0.01] * 5:
        now[0] += seconds * watcher.steps
        watcher.report({})
        steps.append(watcher.steps)
    assert steps == [8, 4, 2, 2, 2, 1, 1, 2, 4, 8, 16, 16]
    assert asked == [32, 48, 56, 64, 104, 124]


def test_a_training_that_comes_further_below_a_damaged_checkpoint_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it loses its workers; records that are empty stand for checkpoints here."""
    calls: list[str] = []

    def fragile(work: Any, stage: str, name: str, *others: Any) -> None:
        calls.append(name)
        if len(calls) == 7:
            launch(work, stage, name, *others)
            return
        samples = 32 if len(calls) == 1 else len(calls)
        world.store.create(f"{work.checkpoints.trunk.folder}{samples:012d}-{len(calls):04d}.json", b"{}")
        raise WorkerLost("a worker died")

    monkeypatch.setattr("pipeline.training.train.launch", fragile)
    ctx = world.context("diffusion_prior", replace(RECIPE, samples=32))
    assert stage.train(ctx).key == ctx.key
    assert len(calls) == 7
