"""Lets one process lead while others wait for its record. Correctness never depends on a lease: it saves double work.

A waiter takes over only when the leader's lease and its other signs of activity have not changed for the whole lease
time on the waiter's own clock, or when the leader's process is known to be dead. A leader that was overtaken becomes a
waiter; it never takes the lease back while the new leader is active. So two drivers cannot fence each other in turn.

For people, a lease also says who leads, since when, and the progress of the work. Waiting processes and ``unclip show``
print that.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.progress import Line, duration
from pipeline.store import Store
from pipeline.store.records import who, whoami

SAY_EVERY_S = 30.0  # in a log, between lines about the progress of the leader
log = logging.getLogger("unclip")


class Lease:
    """Holds a lease as a context manager, renewed by a thread until it is released."""

    def __init__(
        self, store: Store, path: str, owner: dict[str, Any], lease_s: float, progress: Callable[[], str] = lambda: ""
    ):
        self._store, self._path, self._owner, self._every = store, path, owner, lease_s / 4
        self._progress = progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._beat({"released": True})
        except Exception as e:  # must not hide why the work ended; others wait until the lease expires
            log.warning("lease %s could not be released: %s", self._path, e)

    def _renew(self) -> None:
        while not self._stop.wait(self._every):
            try:
                if not self._beat({"beat": secrets.token_hex(4), "at": time.time(), "progress": self._progress()}):
                    return
            except Exception as e:  # a lease that cannot be renewed costs at most duplicate work
                log.warning("lease %s could not be renewed: %s", self._path, e)

    def _beat(self, fields: dict[str, Any]) -> bool:
        version, held = _read(self._store, self._path)
        ours = held.get("nonce") == self._owner["nonce"]
        return ours and self._store.swap(self._path, version, json.dumps(self._owner | fields).encode())


def lead_or_wait(
    store: Store,
    key: str,
    lease_s: float,
    finished: Callable[[], bool],
    activity: Callable[[], str],
    poll_s: float = 1.0,
    stage: str = "work",
    progress: Callable[[], str] = lambda: "",
) -> Lease | None:
    """Returns a Lease if this process must do the work, None once another process has finished it.

    Args:
        store: that holds the lease.
        key: of the work.
        lease_s: without activity, after which a waiter takes over.
        finished: tells whether the work is done.
        activity: text that changes while the leader works, such as the name of its newest checkpoint.
        poll_s: between two looks.
        stage: the name of the work, for people.
        progress: of the work, for people. The lease shows it to processes that wait.
    """
    path = lease_path(key)
    owner = {"nonce": secrets.token_hex(8), "stage": stage, "lease_s": lease_s, **_identity()}
    watched: tuple[str | None, str] | None = None
    since = time.monotonic()
    followed: dict[str, Any] = {}  # the leader's lease
    with Line(SAY_EVERY_S) as line:
        while True:
            if finished():
                return None
            version, held = _read(store, path)
            free = version is None or held.get("released") or _is_dead(held)
            if (version, activity()) != watched:
                if not free and held.get("nonce") != followed.get("nonce", ""):
                    followed = held
                    line.clear()
                    log.warning("%s: waiting for %s", stage, _leader(held))
                watched, since = (version, activity()), time.monotonic()
            if free or time.monotonic() - since > lease_s:
                owner["since"] = time.time()
                if store.swap(path, version, json.dumps(owner).encode()):
                    line.clear()
                    if followed:
                        log.warning("%s: taking over: %s", stage, _why(held, lease_s))
                    return Lease(store, path, owner, lease_s, progress)
                watched = None
                continue
            line.show(partial(_follow, stage, held))
            time.sleep(min(poll_s, lease_s / 4))


def lease_path(key: str) -> str:
    """Returns the path of the lease on a key."""
    return f"leases/{key}.json"


def read_lease(store: Store, path: str) -> dict[str, Any] | None:
    """Returns who holds a lease; None if it is released, or its process is known to be dead.

    That is user, host, pid, stage, ``since`` and ``at`` (its last sign of life) in seconds since the epoch, and the
    ``progress`` of the work.
    """
    try:
        held: dict[str, Any] = json.loads(store.read(path))
    except (FileNotFoundError, ValueError):
        return None
    return None if held.get("released") or _is_dead(held) else held


def _who(held: Mapping[str, Any]) -> str:
    return who(held) or "another process"


def _leader(held: Mapping[str, Any]) -> str:
    began = held.get("since")  # of a lease that is damaged nothing may be there
    since = f", since {time.strftime('%Y-%m-%d %H:%M', time.gmtime(began))} UTC" if began else ""
    return f"{_who(held)}, which works on this already{since}"


def _follow(stage: str, held: Mapping[str, Any]) -> str:
    return f"{stage}: following {_who(held)}: {held.get('progress') or 'no progress reported yet'}"


def _why(held: Mapping[str, Any], lease_s: float) -> str:
    if held.get("released"):
        return f"{_who(held)} has stopped"
    return f"{_who(held)} " + ("is dead" if _is_dead(held) else f"has not moved for {duration(lease_s)}")


def _read(store: Store, path: str) -> tuple[str | None, dict[str, Any]]:
    standing = store.stat(path)
    if standing is None:
        return None, {}
    try:
        found = json.loads(store.read(path))
        return standing.version, found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None, {}
    except ValueError:
        return standing.version, {}


def _identity() -> dict[str, Any]:
    return {**whoami(), "boot": _boot(), "pid": os.getpid(), "started": _started(os.getpid())}


def _boot() -> str:
    """Returns this boot of the machine, and whose process ids are seen here: another container has its own."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Returns the kernel's start time of a process, so that a reused pid is not taken for it; "" if it has ended.

    A zombie, such as a killed child of a container's first process, has ended.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except (OSError, ValueError, IndexError):
        return ""


def _is_dead(held: Mapping[str, Any]) -> bool:
    """Returns whether the holder was a process of this very boot of this host and of this container, and has ended."""
    here = _boot() and held.get("boot") == _boot() and held.get("host") == socket.gethostname()
    pid = held.get("pid")  # which becomes a path
    return bool(here) and isinstance(pid, int) and _started(pid) != held.get("started")
