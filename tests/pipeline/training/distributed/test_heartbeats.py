"""A training that stands still is ended, its machine is named and left out, and so is a worker that others wait for."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayError

from pipeline.settings import RaySettings
from pipeline.training.distributed import heartbeats
from pipeline.training.distributed.heartbeats import BETWEEN, DONE, NEXT, SILENT_S, Beat, Heartbeats, Pulse, hung, slow
from pipeline.training.distributed.launch import WorkerLost, _blamed, launch
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.timing import StepTimer
from tests.pipeline.training.trainings import SETTINGS

STEP = ("start", "wait", "forward", "backward", "optimiser", "ema")
WAITING, COMPUTING = NEXT["forward"], NEXT["wait"]
MEMORY = 100 << 20


def beat(rank: int, **changes: Any) -> Beat:
    """Of a worker that has waited for others for ten minutes, on a machine of its own."""
    usual = Beat(4, f"node-{rank}", f"10.0.0.{rank}", WAITING, marks=90, steps=15, idle_s=600, longest_s=0.5)
    return usual._replace(**changes)


def judged(changes: dict[int, dict[str, Any]], silent: tuple[int, ...] = (), still_s: float = 120.0) -> Any:
    """What is said of four workers, the ``silent`` of which have told nothing for a while."""
    return hung(
        {rank: (beat(rank, **changes.get(rank, {})), -600.0 * (rank in silent)) for rank in range(4)}, still_s, 0.0
    )


def test_the_worker_that_is_behind_is_named() -> None:
    found = judged({2: {"doing": COMPUTING, "marks": 89}})
    assert found.why == "no progress for 600 s after 15 steps: worker 2 on 10.0.0.2 stands in its forward pass"
    assert found.hosts == {"node-2": "10.0.0.2"}
    found = judged({2: {"marks": 89}, 3: {"marks": 89, "node": "node-2"}})
    assert found.why.endswith("worker 2 on 10.0.0.2 stands in its backward pass, and 1 more")
    assert found.hosts.keys() == {"node-2"}


def test_a_worker_that_does_not_answer_is_named_whatever_it_said_last() -> None:
    told: list[dict[str, Any]] = [{"idle_s": 0.1}, {"steps": 0}, {"doing": BETWEEN}]
    for last in told:
        found = judged({3: last}, silent=(3,))
        assert found.why.endswith("worker 3 on 10.0.0.3 does not answer")
        assert found.hosts == {"node-3": "10.0.0.3"}


def test_where_all_wait_for_each_other_no_machine_is_to_blame() -> None:
    found = judged({})
    assert "all workers are in its backward pass, as when a network or a GPU hangs" in found.why
    assert found.hosts == {}
    one = hung({0: (beat(0, size=1), 0.0)}, 120.0, 0.0)
    assert one is not None
    assert one.why.endswith("steps: worker 0 on 10.0.0.0 stands in its backward pass")
    assert one.hosts == {}
    assert judged({rank: {"node": "node-0", "marks": 80 + rank} for rank in range(4)}).hosts == {}  # there is no other


@pytest.mark.parametrize(
    ("changes", "silent"),
    [
        ({1: {"idle_s": 119.0}}, ()),
        ({1: {"doing": BETWEEN}}, ()),  # rank 0 validates, publishes and restores alone
        ({1: {"doing": DONE}}, ()),
        ({1: {"doing": DONE}}, (1,)),
        ({1: {"steps": 0}}, ()),  # it compiles
        ({0: {"steps": 0}}, (1,)),
        ({1: {"longest_s": 61.0}}, ()),  # a step takes minutes here
        ({}, (0, 1, 2, 3)),  # nobody reaches the one who judges
    ],
)
def test_what_is_slow_and_not_hung_goes_on(changes: dict[int, dict[str, Any]], silent: tuple[int, ...]) -> None:
    assert judged(changes, silent) is None


def test_beats_are_judged_when_all_workers_of_the_latest_group_have_told() -> None:
    judge = Heartbeats(still_s=0.0)
    usual = {rank: beat(rank, longest_s=0.0, marks=90 - (rank == 1)) for rank in range(4)}
    assert [judge.beat(rank, usual[rank]) for rank in (0, 1, 2)] == ["", "", ""]
    assert judge.hung() is None
    smaller = [usual[rank]._replace(size=2) for rank in (0, 1)]
    assert judge.beat(0, smaller[0]) == ""
    assert judge.beat(1, smaller[1]).endswith("worker 1 on 10.0.0.1 stands in its backward pass")
    found = judge.hung()
    assert found is not None
    assert found.hosts == {"node-1": "10.0.0.1"}
    assert judge.beat(0, smaller[0]) == found.why  # to each of them


def test_a_worker_that_others_wait_for_is_named() -> None:
    own = {0: 0.5, 1: 0.6, 2: 0.9, 3: 0.5}
    found = slow({rank: beat(rank, own_s=seconds, step_s=1.0) for rank, seconds in own.items()})
    assert found is not None
    assert (found.rank, found.host) == (2, "10.0.0.2")
    assert found.share == pytest.approx(0.4)
    assert slow({rank: beat(rank, own_s=seconds, step_s=4.0) for rank, seconds in own.items()}) is None  # of each step
    assert slow({0: beat(0, own_s=9.0, step_s=9.0)}) is None  # nobody waits
    assert slow({rank: beat(rank, own_s=None if rank else 9.0, step_s=9.0) for rank in range(4)}) is None


@pytest.mark.parametrize(("alone", "own"), [(("wait", "forward"), 3.0), (("wait",), 1.0)])
def test_a_step_is_timed_up_to_where_it_waits(alone: tuple[str, ...], own: float, monkeypatch: Any) -> None:
    """Of a step of 1, 2, 4, 8 and 16 seconds. Where the first compiles and rank 0 validates, nothing is slow."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr("pipeline.training.distributed.heartbeats.time", clock)
    monkeypatch.setattr("pipeline.training.timing.time", clock)
    pulse = Pulse(alone)
    timer = StepTimer({}, torch.device("cpu"), pulse)
    for step in range(heartbeats.WINDOW_STEPS):
        assert pulse.beat(1, "a", "b").own_s is None
        pulse.mark(BETWEEN)
        now[0] += 500.0
        timer.start(step)
        for power, part in enumerate(STEP[1:]):
            now[0] += 2.0**power + 1000.0 * (step == 0 and part == "backward")
            timer(part)
    told = pulse.beat(1, "a", "b")
    assert (told.steps, told.marks, told.longest_s) == (20, 7 * 20, 16.0)
    assert (told.own_s, told.step_s) == (own, 31.0 + 1000.0 / 20)
    now[0] += SILENT_S
    assert pulse.beat(1, "a", "b").idle_s == SILENT_S


def test_a_machine_with_a_broken_gpu_or_a_dead_worker_is_told() -> None:
    judge = Heartbeats()
    for rank in range(4):
        judge.beat(rank, beat(rank, idle_s=1.0))
    asked: Any = SimpleNamespace(
        **{name: SimpleNamespace(remote=partial(getattr(judge, name))) for name in ("hung", "host")}
    )
    ray: Any = SimpleNamespace(exceptions=SimpleNamespace(RayError=KeyError), get=lambda answer, timeout: answer)
    ecc = RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be")
    gone = RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    found = _blamed(ray, asked, {1: gone, 2: ecc})
    assert isinstance(found, WorkerLost)
    assert str(found) == "the GPU of worker 2 on 10.0.0.2 is broken (uncorrectable ECC error encountered)"
    assert found.bad == {"node-2": "10.0.0.2"}
    found = _blamed(ray, asked, {1: gone, 3: RayError("The actor died.")})
    assert isinstance(found, WorkerLost)
    assert (found.bad, found.died) == ({}, {"node-3": "10.0.0.3"})
    bug = RuntimeError("CUDA error: device-side assert triggered")
    assert _blamed(ray, asked, {1: bug}) is bug


def stop(folder: Path, group: ProcessGroup) -> None:
    """Takes steps; in one of them the process of the second of two workers is stopped, the first time."""
    import ray

    (folder / f"{group.size}-{ray.get_runtime_context().get_node_id()}").touch()
    timer = StepTimer({}, group.device, group.pulse)
    for step in range(16):
        if not (folder / "stopped").exists():
            time.sleep(0.5)  # so that it lasts for longer than from one beat to the next
        group.pulse.mark(BETWEEN)
        timer.start(step)
        timer("wait")
        if step == 14 and group.rank == 1 and not (folder / "stopped").exists():
            (folder / "stopped").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        timer("forward")
        group.sum(torch.ones(1))
        for part in STEP[3:]:
            timer(part)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Three machines with a core each, beside a head without any."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
    )
    for _ in range(3):
        made.add_node(num_cpus=1, object_store_memory=MEMORY)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(400)  # Ray Train's own health check waits for ten minutes, gloo for thirty
def test_a_machine_whose_worker_hangs_is_left_out_as_long_as_others_have_room(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.training.distributed.launch.STILL_S", SILENT_S + 5.0)
    settings, work = replace(SETTINGS, workers=2), partial(stop, tmp_path)
    try:
        with pytest.raises(
            WorkerLost, match=r"no progress for \d+ s after 1[45] steps: worker 1 on .* does not ans"
        ) as e:
            launch(work, "clip", "hangs", settings, RaySettings())
    finally:
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((tmp_path / "stopped").read_text()), signal.SIGKILL)
    (bad,) = e.value.bad
    assert (tmp_path / f"2-{bad}").exists()
    for file in tmp_path.glob("2-*"):
        file.unlink()
    launch(work, "clip", "fewer", replace(settings, workers=3, min_workers=1), RaySettings(), left_out=[bad])
    used = [file.name for file in tmp_path.glob("2-*")]
    assert len(used) == 2
    assert f"2-{bad}" not in used
    with caplog.at_level(logging.WARNING):
        launch(work, "clip", "all", replace(settings, workers=3), RaySettings(), left_out=[bad])
    assert "uses excluded machines again" in caplog.text
    assert (tmp_path / f"3-{bad}").exists()
