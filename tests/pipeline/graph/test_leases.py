"""Leases on a clock of their own: who leads, who waits, who takes over and when."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CorruptObject, Unreachable
from pipeline.graph import leases
from pipeline.graph.leases import Lease, lead_or_wait, lease_path, read_lease
from pipeline.store import Store
from pipeline.store.records import who, whoami

LEASE_S = 60.0


class Clock:
    """The clock of this process: it passes only while somebody sleeps, and then ``act`` is called."""

    def __init__(self) -> None:
        self.seconds, self.act = 1.8e9, lambda: None

    def time(self) -> float:
        return self.seconds

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.act()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(leases, "time", clock)
    return clock


def _lead(
    store: Store, finished: Callable[[], bool] = lambda: False, activity: Callable[[], str] = lambda: ""
) -> Lease | None:
    return lead_or_wait(store, "k", LEASE_S, finished, activity, stage="decoder")


def _change(store: Store, **fields: object) -> None:
    """Write something else into the lease, as another process would have."""
    (entry,) = store.list(lease_path("k"))
    assert store.swap(entry.path, entry.version, json.dumps(json.loads(store.read(entry.path)) | fields).encode())


def _own() -> leases.Holder:
    return leases._this_process("nonce", "decoder", LEASE_S)


def test_one_leads_while_it_moves_and_one_that_stands_still_is_replaced_for_good(store: Store, clock: Clock) -> None:
    first = _lead(store)
    assert first

    def beat(lease: Lease) -> bool:
        return lease._beat(replace(lease._owner, beat=str(clock.seconds)))

    def wait_in_vain(leader: Lease) -> None:
        end = clock.seconds + 10 * LEASE_S
        clock.act = lambda: beat(leader) or pytest.fail("lost the lease")
        assert _lead(store, lambda: clock.seconds > end) is None
        clock.act = lambda: None

    wait_in_vain(first)
    stopped = clock.seconds
    taken = _lead(store)
    assert taken
    assert LEASE_S < clock.seconds - stopped < 2 * LEASE_S
    assert not beat(first)  # the old leader cannot renew what it no longer holds
    wait_in_vain(taken)


def test_moving_checkpoints_keep_a_leader_whose_lease_stands_still(store: Store, clock: Clock) -> None:
    assert _lead(store)
    end = clock.seconds + 3 * LEASE_S
    assert _lead(store, lambda: clock.seconds > end, lambda: str(clock.seconds)) is None


def test_a_released_lease_is_free_at_once(store: Store) -> None:
    with _lead(store) or pytest.fail("no lease"):
        pass
    looks = iter([False])  # at its second look it would find the work done
    assert _lead(store, lambda: next(looks, True)) is not None


def test_a_lease_that_cannot_be_released_does_not_hide_why_the_work_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(*_: object) -> bool:
        raise Unreachable("gone")

    lease = _lead(store)
    assert lease
    monkeypatch.setattr(type(store), "swap", unreachable)
    with pytest.raises(ZeroDivisionError), lease:
        raise ZeroDivisionError
    assert "could not be released: gone" in caplog.text


def test_a_dead_process_of_this_host_is_replaced_at_once(store: Store) -> None:
    code = (
        "import sys; from pipeline.store import open_store; from pipeline.graph.leases import lead_or_wait;"
        "assert lead_or_wait(open_store(sys.argv[1]), 'k', 3600, lambda: False, lambda: '')"
    )
    subprocess.run([sys.executable, "-c", code, store.url], check=True, cwd=Path(__file__).parents[3])
    looks = iter([False])
    assert _lead(store, lambda: next(looks, True)) is not None


def test_a_process_that_waits_says_whom_it_follows_and_the_progress(
    store: Store,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(leases, "SAY_EVERY_S", 0.0)
    assert _lead(store)
    end = clock.seconds + LEASE_S / 2
    clock.act = lambda: _change(store, progress="8 of 64 samples")
    assert _lead(store, lambda: clock.seconds > end) is None
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(
        f"decoder: waiting for {who(whoami())}, which is working on this already, since 2027-01-15"
    )
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"  decoder: following {who(whoami())}: no progress reported yet"
    assert lines[-1] == f"  decoder: following {who(whoami())}: 8 of 64 samples"


def test_a_lease_tells_who_holds_it_until_it_is_released(store: Store) -> None:
    lease = lead_or_wait(store, "k", 0.1, lambda: False, lambda: "", stage="decoder", progress=lambda: "8 of 64")
    began = read_lease(store, lease_path("k"))
    assert lease
    assert began
    with lease:
        while (held := read_lease(store, lease_path("k"))) is None or held.at is None:
            time.sleep(0.01)
    assert (held.progress, held.stage) == ("8 of 64", "decoder")
    assert {"user": held.user, "host": held.host} == whoami()
    assert held.since == began.since <= held.at <= time.time()
    assert read_lease(store, lease_path("k")) is None
    assert read_lease(store, lease_path("another")) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"started": "0"}, "is dead"),
        ({"released": True}, "has stopped"),
        ({"boot": "another"}, "has not moved for 1 min 00 s"),  # on another host, who cannot be known to be dead
    ],
)
def test_taking_over_says_why(
    store: Store, clock: Clock, caplog: pytest.LogCaptureFixture, change: dict[str, object], why: str
) -> None:
    assert _lead(store)
    looks = iter(range(1000))

    def finished() -> bool:
        if next(looks) == 3:
            _change(store, **change, user="ana", host=whoami()["host"])
        return False

    assert _lead(store, finished)
    assert caplog.records[-1].getMessage() == f"decoder: taking over: ana@{whoami()['host']} {why}"


def test_a_process_whose_user_has_no_name_is_named_by_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert who(whoami()) == whoami()["host"] != ""
    assert who({}) == ""


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b'{"nonce": "a"}', {"since": 1e300}, *({"pid": pid} for pid in ("../../x", "self", 1.5, [1]))],
)
def test_a_damaged_lease_is_taken_over_after_its_time(content: Any, store: Store, clock: Clock) -> None:
    """What it calls a process becomes no path."""
    began, damaged = clock.seconds, content
    if isinstance(content, dict):
        damaged = json.dumps(asdict(_own()) | {"started": "never"} | content).encode()
    store.swap(lease_path("k"), None, damaged)
    with pytest.raises(CorruptObject, match="is damaged"):
        read_lease(store, lease_path("k"))
    assert _lead(store)
    assert clock.seconds - began > LEASE_S
    held = read_lease(store, lease_path("k"))
    assert held
    assert held.pid == os.getpid()


def test_a_process_of_another_container_counts_as_held(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process id, which is of this boot and this host, is nobody's here, or somebody else's."""
    with monkeypatch.context() as there:
        there.setattr(leases.os, "readlink", lambda _: "pid:[4026532000]")
        held = replace(_own(), started="1")
    store.swap(lease_path("k"), None, held.as_json())
    assert read_lease(store, lease_path("k")) == held
    _change(store, boot=leases._boot())
    assert read_lease(store, lease_path("k")) is None
