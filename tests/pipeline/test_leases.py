import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import Unreachable
from pipeline.leases import Lease, lead_or_wait
from pipeline.store import Store

LEASE_S = 1.5


def unreachable(*_: object) -> bool:
    raise Unreachable("gone")


def _lead(
    store: Store, finished: Callable[[], bool] = lambda: False, progress: Callable[[], str] = lambda: ""
) -> Lease | None:
    return lead_or_wait(store, "k", LEASE_S, finished, progress, poll_s=0.02)


def test_one_leads_and_the_other_waits_for_its_record(store: Store) -> None:
    done = threading.Event()
    lease = _lead(store)
    assert lease is not None
    seen: list[object] = []
    with lease:
        waiter = threading.Thread(target=lambda: seen.append(_lead(store, done.is_set)))
        waiter.start()
        time.sleep(3 * LEASE_S)  # the lease is renewed meanwhile, so nobody takes over
        assert not seen
        done.set()
        waiter.join(20)
    assert seen == [None]


def test_a_released_lease_is_free_at_once(store: Store) -> None:
    with _lead(store) or Lease(store, "", {}, 1):
        pass
    again = _lead(store)
    assert again is not None


def test_a_lease_that_cannot_be_released_does_not_hide_why_the_work_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lease = _lead(store)
    assert lease is not None
    monkeypatch.setattr(type(store), "swap", unreachable)
    with pytest.raises(ZeroDivisionError), lease:
        raise ZeroDivisionError
    assert "could not be released: gone" in caplog.text


def test_a_leader_that_stands_still_is_replaced_and_does_not_take_back(store: Store) -> None:
    still = _lead(store)  # never entered, so never renewed
    assert still is not None
    taken = _lead(store)
    assert taken is not None
    assert not still._beat({"beat": 1})  # the old leader cannot renew what it no longer holds
    with taken:
        done = threading.Event()
        seen: list[object] = []
        old = threading.Thread(target=lambda: seen.append(_lead(store, done.is_set)))
        old.start()
        time.sleep(3 * LEASE_S)
        assert not seen
        done.set()
        old.join(20)
    assert seen == [None]


def test_moving_checkpoints_keep_a_leader_whose_lease_stands_still(store: Store) -> None:
    assert _lead(store) is not None
    steps = iter(range(10_000))
    end = time.monotonic() + 3 * LEASE_S
    result = _lead(store, lambda: time.monotonic() > end, lambda: str(next(steps)))
    assert result is None


def test_a_dead_process_of_this_host_is_replaced_at_once(store: Store, tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.store import open_store; from pipeline.leases import lead_or_wait;"
        "assert lead_or_wait(open_store(sys.argv[1]), 'k', 3600, lambda: False, lambda: '')"
    )
    subprocess.run([sys.executable, "-c", code, store.url], check=True, cwd=Path(__file__).parents[2])
    assert lead_or_wait(store, "k", 3600, lambda: False, lambda: "", poll_s=0.02) is not None
