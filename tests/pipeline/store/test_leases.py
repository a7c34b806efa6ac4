import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.errors import CorruptObject, Unreachable
from pipeline.store import Store, leases
from pipeline.store.leases import Lease, lead_or_wait, lease_path, read_lease
from pipeline.store.records import who, whoami

LEASE_S = 1.5


def unreachable(*_: object) -> bool:
    raise Unreachable("gone")


def _lead(
    store: Store,
    finished: Callable[[], bool] = lambda: False,
    activity: Callable[[], str] = lambda: "",
    progress: Callable[[], str] = lambda: "",
) -> Lease | None:
    return lead_or_wait(store, "k", LEASE_S, finished, activity, poll_s=0.02, stage="decoder", progress=progress)


def _change(store: Store, **fields: object) -> None:
    """Write something else into the lease, as another process would have."""
    (entry,) = store.list(lease_path("k"))
    assert store.swap(entry.path, entry.version, json.dumps(json.loads(store.read(entry.path)) | fields).encode())


def test_one_leads_and_the_other_waits_for_its_record(store: Store) -> None:
    done = threading.Event()
    lease = _lead(store)
    seen: list[object] = []
    with lease:
        waiter = threading.Thread(target=lambda: seen.append(_lead(store, done.is_set)))
        waiter.start()
        time.sleep(3 * LEASE_S)  # the lease is renewed meanwhile, so nobody takes over
        assert not seen
        done.set()
        waiter.join(120)
    assert seen == [None]


def test_a_released_lease_is_free_at_once(store: Store) -> None:
    with _lead(store) or pytest.fail("no lease"):
        pass
    looks = iter([False])  # at its second look it would find the work done
    assert _lead(store, lambda: next(looks, True)) is not None


def test_a_lease_that_cannot_be_released_does_not_hide_why_the_work_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lease = _lead(store)
    monkeypatch.setattr(type(store), "swap", unreachable)
    with pytest.raises(ZeroDivisionError), lease:
        raise ZeroDivisionError
    assert "could not be released: gone" in caplog.text


def test_a_leader_that_stands_still_is_replaced_and_does_not_take_back(store: Store) -> None:
    still = _lead(store)  # never entered, so never renewed
    taken = _lead(store)
    assert not still._beat(still._owner)  # the old leader cannot renew what it no longer holds
    with taken:
        done = threading.Event()
        seen: list[object] = []
        old = threading.Thread(target=lambda: seen.append(_lead(store, done.is_set)))
        old.start()
        time.sleep(3 * LEASE_S)
        assert not seen
        done.set()
        old.join(120)
    assert seen == [None]


def test_moving_checkpoints_keep_a_leader_whose_lease_stands_still(store: Store) -> None:
    assert _lead(store) is not None
    steps = iter(range(10_000))
    end = time.monotonic() + 3 * LEASE_S
    result = _lead(store, lambda: time.monotonic() > end, lambda: str(next(steps)))
    assert result is None


def test_a_dead_process_of_this_host_is_replaced_at_once(store: Store, tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.store import open_store; from pipeline.store.leases import lead_or_wait;"
        "assert lead_or_wait(open_store(sys.argv[1]), 'k', 3600, lambda: False, lambda: '')"
    )
    subprocess.run([sys.executable, "-c", code, store.url], check=True, cwd=Path(__file__).parents[3])
    assert lead_or_wait(store, "k", 3600, lambda: False, lambda: "", poll_s=0.02) is not None


def test_a_process_that_waits_says_whom_it_follows_and_the_progress(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(leases, "SAY_EVERY_S", 0.1)
    said = iter(f"{8 * i} of 64 samples" for i in range(1000))
    lease = _lead(store, progress=lambda: next(said))
    end = time.monotonic() + 2 * LEASE_S
    with lease:
        assert _lead(store, lambda: time.monotonic() > end) is None
    (message,) = (record.getMessage() for record in caplog.records)
    since = time.strftime("%Y-%m-%d", time.gmtime())
    assert message.startswith(f"decoder: waiting for {who(whoami())}, which works on this already, since {since}")
    lines = capsys.readouterr().err.splitlines()
    assert f"  decoder: following {who(whoami())}: no progress reported yet" in lines
    assert f"  decoder: following {who(whoami())}: 8 of 64 samples" in lines
    assert len(set(lines)) > 2  # it moves
    assert len(lines) < 2 * LEASE_S / 0.1 + 1  # and is not said at every look


def test_a_lease_tells_who_holds_it_until_it_is_released(store: Store) -> None:
    lease = _lead(store, progress=lambda: "8 of 64 samples")
    began = read_lease(store, lease_path("k"))
    with lease:
        while (held := read_lease(store, lease_path("k"))) is None or held.at is None:
            time.sleep(0.02)
    assert held.progress == "8 of 64 samples"
    assert {"user": held.user, "host": held.host} == whoami()
    assert held.stage == "decoder"
    assert held.since == began.since <= held.at <= time.time()
    assert read_lease(store, lease_path("k")) is None
    assert read_lease(store, lease_path("another")) is None


def test_taking_over_says_why(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """From one on another host, who cannot be known to be dead, after the time of a lease; one message, one holder."""
    assert _lead(store) is not None  # never entered, so never renewed
    _change(store, host="gpu-7", user="ana", boot="another")
    taken = _lead(store)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("decoder: waiting for ana@gpu-7, which works on this already")
    assert messages[1] == "decoder: taking over: ana@gpu-7 has not moved for 2 s"
    with taken:
        held = read_lease(store, lease_path("k"))
        assert {"user": held.user, "host": held.host} == whoami()


@pytest.mark.parametrize(("change", "why"), [({"started": "0"}, "is dead"), ({"released": True}, "has stopped")])
def test_taking_over_at_once_says_why(
    store: Store, caplog: pytest.LogCaptureFixture, change: dict[str, object], why: str
) -> None:
    assert _lead(store) is not None
    looks = iter(range(10))

    def finished() -> bool:
        if next(looks) == 3:
            _change(store, **change)
        return False

    assert lead_or_wait(store, "k", 3600, finished, lambda: "", poll_s=0.02, stage="decoder") is not None
    assert caplog.records[-1].getMessage() == f"decoder: taking over: {who(whoami())} {why}"


def test_a_process_whose_user_has_no_name_is_named_by_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert who(whoami()) == whoami()["host"] != ""
    assert who({}) == ""


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"nonce": "a"}'])
def test_a_damaged_lease_is_taken_over_after_its_time(content: bytes, store: Store) -> None:
    store.swap(lease_path("k"), None, content)
    led = lead_or_wait(store, "k", 0.2, lambda: False, lambda: "", poll_s=0.05)
    with led:
        held = read_lease(store, lease_path("k"))
        assert held.pid == os.getpid()


def test_a_process_of_another_container_counts_as_held(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process id, which is of this boot and this host, is nobody's here, or somebody else's."""
    with monkeypatch.context() as there:
        there.setattr(leases.os, "readlink", lambda _: "pid:[4026532000]")
        held = replace(leases._this_process("nonce", "decoder", 60.0), started="1")
    store.swap(lease_path("k"), None, held.as_json())
    assert read_lease(store, lease_path("k")) == held
    _change(store, boot=leases._boot())
    assert read_lease(store, lease_path("k")) is None


def test_a_time_that_no_calendar_has_stops_nobody(store: Store) -> None:
    held = replace(leases._this_process("nonce", "decoder", 60.0), boot="another", since=1e300)
    store.swap(lease_path("k"), None, held.as_json())
    with pytest.raises(CorruptObject, match=r"is damaged \(since: "):
        read_lease(store, lease_path("k"))
    assert lead_or_wait(store, "k", 0.2, lambda: False, lambda: "", poll_s=0.05) is not None


@pytest.mark.parametrize("pid", ["../../x", "self", 1.5, None, [1]])
def test_what_a_lease_calls_a_process_becomes_no_path(pid: object, store: Store) -> None:
    """Such a lease is damaged: it counts as held until it has stood still for its time."""
    own = leases._this_process("nonce", "decoder", 60.0)
    store.swap(lease_path("k"), None, json.dumps(asdict(own) | {"pid": pid, "started": "never"}).encode())
    with pytest.raises(CorruptObject, match=r"is damaged \(pid: "):
        read_lease(store, lease_path("k"))
    assert lead_or_wait(store, "k", 0.2, lambda: False, lambda: "", poll_s=0.05) is not None
