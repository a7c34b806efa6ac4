"""Two runs at once on one store: one leads, the other waits or takes over, and there is one set of results."""

import os
import re
import signal
from pathlib import Path

import pytest

from pipeline.store import Store
from tests.chain import data_blobs, done, here, keys, open_at
from tests.faults import (
    Running,
    Undisturbed,
    artifact,
    assert_each_shard_once,
    assert_sound,
    attempts,
    copy,
    decoder_checkpoints,
    finish,
    start,
    wait_until,
)
from tests.seaweed import Server


def _assert_one_result(store: Store, undisturbed: Undisturbed) -> None:
    assert_sound(store)
    assert_each_shard_once(store, undisturbed.trained)
    assert keys(store) == keys(undisturbed.trained)
    assert data_blobs(store) == data_blobs(undisturbed.trained)
    ours, theirs = artifact(store, "decoder"), artifact(undisturbed.trained, "decoder")
    assert ours.blobs["model.safetensors"] == theirs.blobs["model.safetensors"]


@pytest.mark.slow
def test_two_runs_at_once_share_the_work(s3: Server, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """On S3; the races below are in a folder."""
    url = f"{s3.url}/race-{os.getpid()}"
    config = undisturbed.config(tmp_path, url)
    runs = [start("run", config, "--until", "decoder") for _ in range(2)]
    results = [finish(run) for run in runs]
    assert all("decoder done" in done(result) for result in results)
    done(here("run", config, "--until", "codec"))  # which the decoder does not need
    store = open_at(url)
    _assert_one_result(store, undisturbed)
    assert sorted(attempts(store).values()) == [1, 1]  # CLIP and the decoder were each begun once
    assert any("which is working on this already" in result.stderr for result in results)


def _stopped_leader(undisturbed: Undisturbed, config: Path, store: Store) -> tuple[Running, Running]:
    """A run that stands still in the middle of its training, and one that waits for it."""
    leader = start("run", config, "--until", "decoder")
    wait_until(lambda: decoder_checkpoints(store, undisturbed), leader)
    os.kill(leader.pid, signal.SIGSTOP)
    return leader, start("run", config, "--until", "decoder")


@pytest.mark.slow
def test_the_waiting_run_takes_over_from_a_killed_leader(undisturbed: Undisturbed, tmp_path: Path) -> None:
    store = copy(undisturbed.data, tmp_path)
    # A lease this long never runs out here: the other knows that the leader's process is dead.
    config = undisturbed.config(tmp_path, lease_s=3600)
    leader, follower = _stopped_leader(undisturbed, config, store)
    said: list[str] = []
    assert follower.stderr is not None
    while not said or "which is working on this already" not in said[-1]:
        said.append(follower.stderr.readline())
        assert said[-1], said
    leader.kill()  # and nobody waits for it yet, so that the kernel still lists it
    result = finish(follower)
    assert finish(leader).returncode == -signal.SIGKILL
    assert "decoder done" in done(result)
    assert re.search(r"decoder: taking over: .+ is dead\n", result.stderr)
    assert "resuming decoder at sample" in result.stderr
    _assert_one_result(store, undisturbed)
    assert sorted(attempts(store).values()) == [1, 2]


@pytest.mark.slow
def test_a_leader_that_wakes_up_adopts_the_result_of_the_one_that_took_over(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    store = copy(undisturbed.data, tmp_path)
    config = undisturbed.config(tmp_path, lease_s=2)
    leader, follower = _stopped_leader(undisturbed, config, store)
    wait_until(lambda: max(attempts(store).values()) == 2, follower)
    os.kill(leader.pid, signal.SIGCONT)
    results = [finish(leader), finish(follower)]
    assert all("decoder done" in done(result) for result in results)
    assert "another run has taken over" in results[0].stderr
    assert re.search(r"decoder: taking over: .+ has not moved for 2 s\n", results[1].stderr)
    _assert_one_result(store, undisturbed)
    assert sorted(attempts(store).values()) == [1, 2]
