"""One leads, the others wait for its record. A lease saves duplicate work; correctness never rests on it.

A waiter takes over only when the leader's lease, and whatever else shows its progress, have stood still for the whole
lease time on the waiter's own clock, or when the leader's process is known to be dead. A leader that was overtaken
becomes a waiter; it never takes the lease back while the new one moves. So two drivers cannot fence each other in turn.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.store import Store

log = logging.getLogger("unclip")


class Lease:
    """A held lease, renewed by a thread until released. Use as a context manager."""

    def __init__(self, store: Store, path: str, owner: dict[str, Any], lease_s: float):
        self._store, self._path, self._owner, self._every = store, path, owner, lease_s / 4
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
        except Exception as e:  # it must not hide why the work ended; others wait for as long as a lease is good
            log.warning("lease %s could not be released: %s", self._path, e)

    def _renew(self) -> None:
        while not self._stop.wait(self._every):
            try:
                if not self._beat({"beat": secrets.token_hex(4)}):
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
    progress: Callable[[], str],
    poll_s: float = 1.0,
) -> Lease | None:
    """A Lease if this process is to do the work; None once somebody else has ``finished`` it.

    ``progress`` is any text that changes while the leader gets on, such as the name of its newest checkpoint.
    """
    path = f"leases/{key}.json"
    owner = {"nonce": secrets.token_hex(8), **_identity()}
    claim = json.dumps(owner).encode()
    watched: tuple[str | None, str] | None = None
    since = time.monotonic()
    while True:
        if finished():
            return None
        version, held = _read(store, path)
        free = version is None or held.get("released") or _is_dead(held)
        if (version, progress()) != watched:
            if watched is None and not free:
                log.warning("waiting for %s, which works on this already", held.get("host", "another process"))
            watched, since = (version, progress()), time.monotonic()
        if free or time.monotonic() - since > lease_s:
            if store.swap(path, version, claim):
                return Lease(store, path, owner, lease_s)
            watched = None
            continue
        time.sleep(min(poll_s, lease_s / 4))


def is_held(store: Store, path: str) -> bool:
    """Whether a lease is neither released nor known to be a dead process's. One of another host may be dead too."""
    version, held = _read(store, path)
    return version is not None and not held.get("released") and not _is_dead(held)


def _read(store: Store, path: str) -> tuple[str | None, dict[str, Any]]:
    for entry in store.list(path):
        if entry.path == path:
            try:
                return entry.version, json.loads(store.read(path))
            except (FileNotFoundError, ValueError):
                return entry.version, {}
    return None, {}


def _identity() -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "started": _started(os.getpid())}


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """The kernel's start time of a process, so that a reused pid is not taken for it; empty if it is no more.

    A process that was killed and that nobody has waited for yet, as under a container's first process, is no more.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except (OSError, ValueError, IndexError):
        return ""


def _is_dead(held: dict[str, Any]) -> bool:
    """Known to be dead: a process of this very boot of this host that is no more."""
    here = _boot() and held.get("boot") == _boot() and held.get("host") == socket.gethostname()
    return bool(here) and _started(held["pid"]) != held["started"]
