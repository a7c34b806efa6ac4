"""ProcessGroup: as many Ray workers as one likes give the result of none, and their errors reach the driver whole."""

import logging
import os
import pickle
import re
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError
from torch.distributed import DistBackendError

from pipeline.errors import CorruptObject, OtherFormat, Superseded, Unreachable, UserError
from pipeline.graph.device import OutOfMemory
from pipeline.graph.ray import start_ray
from pipeline.settings import RaySettings
from pipeline.training import stage
from pipeline.training.checkpoints import open_checkpoints
from pipeline.training.distributed.launch import Relayed, Watcher, WorkerLost, _cause, _worker, launch
from pipeline.training.distributed.process_group import ProcessGroup
from tests.pipeline.training.conftest import World
from tests.pipeline.training.trainings import PRIOR_RECIPE, SETTINGS, assert_equal_trainings


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Ray of this module's own. The first of its workers that has saved a checkpoint is killed right after."""
    marker = tmp_path_factory.mktemp("crash") / "killed"
    with pytest.MonkeyPatch.context() as patch:  # its workers have the environment that it is started with
        patch.setenv("UNCLIP_CRASH", f"checkpoint.after_record@{marker}")
        ray = start_ray(RaySettings(cpus=2, object_store_mb=200))
    yield ray
    ray.shutdown()


def test_ray_workers_train_what_this_process_trains(ray: Any, world: World, caplog: pytest.LogCaptureFixture) -> None:
    """No worker, and three of which two have room; one of these is killed on the way."""
    made = []
    for workers, taking_part in ((0, 1), (3, 2)):
        # Keys of their own, but one trajectory, whose checkpoints must not be shared here.
        recipe, settings = replace(PRIOR_RECIPE, samples=48 - workers), replace(SETTINGS, workers=workers)
        world.store.delete([entry.path for entry in world.store.list("checkpoints/")])
        with caplog.at_level(logging.INFO):
            artifact = stage.train(world.context("diffusion_prior", recipe, settings))
        assert artifact.environment["workers"] == str(taking_part)
        made.append((world, artifact))
    assert re.search(r"diffusion_prior: a worker died or could not start.*; starting again", caplog.text)
    assert "resuming diffusion_prior at sample 16" in caplog.text
    assert_equal_trainings(made[1], made[0])
    for changes, said in (({"sharded": True}, "1 core each"), ({"device": "cuda"}, "1 GPU each")):
        refused = rf"^clip: Ray has no room for 3 workers with {said}; it has 2 cores and 0 "
        with pytest.raises(UserError, match=refused):
            launch(die, "clip", "refused", replace(SETTINGS, workers=3, **changes), RaySettings())


@pytest.mark.parametrize(
    "error",
    [
        UserError("a"),
        Superseded("c"),
        Unreachable("d"),
        OtherFormat("record", "is newer"),
        OutOfMemory("3 rows", 3),
        CorruptObject("blobs/ab/abc", "is missing"),
    ],
)
def test_expected_errors_of_a_worker_keep_their_type(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker sends them to the driver, pickled."""

    def work(group: ProcessGroup) -> None:
        raise error

    numbers = ("get_local_world_size", "get_world_size", "get_world_rank", "get_node_rank")
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(**{name: lambda: 1 for name in numbers}))
    monkeypatch.setattr("ray.train.torch.get_device", lambda: "cpu")
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr("pipeline.training.distributed.launch._beating", lambda *_: nullcontext())
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    with pytest.raises(Relayed) as sent:
        _worker({"work": work, "settings": SETTINGS, "heartbeats": None})
    found = _cause([RuntimeError("the other side hung up"), pickle.loads(pickle.dumps(sent.value))])
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


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


@pytest.mark.slow
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
def test_the_log_of_a_worker_is_read_here_or_ray_is_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    asked = []
    failures = [RayError(text), DistBackendError("NCCL error in: a.cpp:7, remote process exited")]

    def get_log(**words: Any) -> Iterator[str]:
        asked.append((words["node_ip"], words["pid"]))
        yield "[rank3]: Watchdog caught collective operation timeout:"
        yield " WorkNCCL(SeqNum=7)\nterminate called\n"

    monkeypatch.setattr("ray.util.state.get_log", get_log)
    found = _cause(failures)
    assert str(found).endswith("([rank3]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7))")
    assert set(asked) == {("10.0.0.3", 71)}
    (tmp_path / "worker-ab-71.out").write_text("begins\n[0] socket.cc:50 NCCL WARN socketStartConnect: no route\n")
    monkeypatch.setattr("pipeline.training.distributed.launch.local_logs", lambda: [tmp_path])
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.3")
    assert str(_cause(failures)).endswith("([0] socket.cc:50 NCCL WARN socketStartConnect: no route)")


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
    ctx = world.context("diffusion_prior", replace(PRIOR_RECIPE, samples=32))
    assert stage.train(ctx).key == ctx.key
    assert slept == ([10.0, 20.0] if isinstance(error, Unreachable) else [0.0, 0.0])  # a store takes its time
    assert [name[-4:] for name in calls] == ["0001", "0002", "0003"]
    monkeypatch.setattr("pipeline.training.train.launch", hopeless)
    with pytest.raises(UserError, match=f"{error} 4 times without a new checkpoint.*{advice}"):
        stage.train(world.context("diffusion_prior", replace(PRIOR_RECIPE, samples=48, seed=1)))


def test_machines_at_which_a_training_hung_or_died_twice_are_left_out(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost = [
        WorkerLost("no progress for 120 s", {"a": "10.0.0.1"}),
        WorkerLost("a worker died", died={"b": "10.0.0.2"}),
        WorkerLost("a worker died", died={"b": "10.0.0.2"}),
    ]
    given = []

    def fragile(work: Any, stage: str, name: str, *others: Any) -> None:
        given.append(set(others[-1]))
        if lost:
            raise lost.pop(0)
        launch(work, stage, name, *others)

    monkeypatch.setattr("pipeline.training.train.launch", fragile)
    with caplog.at_level(logging.WARNING):
        stage.train(world.context("diffusion_prior", replace(PRIOR_RECIPE, samples=32)))
    assert given == [set(), {"a"}, {"a"}, {"a", "b"}]
    assert "no progress for 120 s; starting again without 10.0.0.1" in caplog.text
    assert "a worker died; starting again\n" in caplog.text
    assert "a worker died; starting again without 10.0.0.2\n" in caplog.text


def test_a_driver_that_was_overtaken_begins_no_attempt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fence the one that leads now, whose next would fence its own."""
    calls: list[str] = []
    ctx = world.context("diffusion_prior", replace(PRIOR_RECIPE, samples=32))

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
        world.store.create(f"{work.checkpoints.folder}{samples:012d}-{len(calls):04d}.json", b"{}")
        raise WorkerLost("a worker died")

    monkeypatch.setattr("pipeline.training.train.launch", fragile)
    ctx = world.context("diffusion_prior", replace(PRIOR_RECIPE, samples=32))
    assert stage.train(ctx).key == ctx.key
    assert len(calls) == 7
