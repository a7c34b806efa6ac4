"""Leases: one process leads while others wait for its record. They save double work; correctness never needs them.

A waiter takes over only when the leader's lease and its other signs of activity have not changed for the whole lease
time on the waiter's own clock, or when the leader's process is known to be dead. A leader that lost its lease becomes a
waiter, and never takes the lease back while the new leader is active. So two drivers cannot fence each other in turn.

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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from pipeline.progress import ProgressLine, duration
from pipeline.store import Store
from pipeline.store.records import Count, Seconds, parse_object, read_plain, who, whoami

POLL_S = 1.0  # between two looks
SAY_EVERY_S = 30.0  # between two lines of a log about the leader's progress
log = logging.getLogger("unclip")


@dataclass(frozen=True)
class Holder:
    """Describes who holds a lease, as it is stored.

    Attributes:
        nonce: Random name of this lease.
        stage: Name of the work, for people.
        lease_s: Seconds without activity after which a waiter takes over.
        user: User of the process that works.
        host: Host of that process.
        boot: Boot of the machine and the container (see ``_boot``).
        pid: Number of the process.
        started: The kernel's time of its start.
        since: Begin of the work by its own clock, in seconds since the epoch.
        at: Time of its last sign of life, None before the first.
        beat: Random text, another one at each sign of life.
        progress: Text about the progress of the work, for people.
        released: Work has ended: nobody waits for the lease to expire.
    """

    nonce: str
    stage: str
    lease_s: Seconds
    user: str
    host: str
    boot: str
    pid: Count
    started: str
    since: Seconds
    at: Seconds | None = None
    beat: str = ""
    progress: str = ""
    released: bool = False

    @property
    def name(self) -> str:
        """Returns for example 'ana@gpu-7'."""
        return who({"user": self.user, "host": self.host})

    def as_json(self) -> bytes:
        """Returns the bytes of the lease."""
        return json.dumps(asdict(self)).encode()


class Lease:
    """Holds a lease as a context manager, renewed by a thread until it is released."""

    def __init__(
        self, store: Store, path: str, owner: Holder, lease_s: float, progress: Callable[[], str] = lambda: ""
    ):
        # Renewed four times a lease, so that one or two failed requests do not cost it.
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
            self._beat(replace(self._owner, released=True))
        except Exception as e:  # must not hide an error of the work; others wait until the lease expires
            log.warning("lease %s could not be released: %s", self._path, e)

    def _renew(self) -> None:
        while not self._stop.wait(self._every):
            try:
                beat = secrets.token_hex(4)
                if not self._beat(replace(self._owner, beat=beat, at=time.time(), progress=self._progress())):
                    return
            except Exception as e:  # a lease that cannot be renewed costs at most duplicate work
                log.warning("lease %s could not be renewed: %s", self._path, e)

    def _beat(self, now: Holder) -> bool:
        version, held = _read(self._store, self._path)
        ours = held is not None and held.nonce == self._owner.nonce
        return ours and self._store.swap(self._path, version, now.as_json())


def lead_or_wait(
    store: Store,
    key: str,
    lease_s: float,
    finished: Callable[[], bool],
    activity: Callable[[], str],
    stage: str = "work",
    progress: Callable[[], str] = lambda: "",
) -> Lease | None:
    """Returns a Lease if this process must do the work, None once another process has finished it.

    Args:
        store: The store that holds the lease.
        key: Key of the work.
        lease_s: Seconds without activity after which a waiter takes over.
        finished: Function that tells whether the work is done.
        activity: Function of a text that changes while the leader works, such as the name of its newest checkpoint.
        stage: Name of the work, for people.
        progress: Function of a text about the progress, which the lease shows to processes that wait.
    """
    path = lease_path(key)
    nonce = secrets.token_hex(8)
    # The waiter's own clock: that of another machine may be wrong by more than a lease.
    watched: tuple[str | None, str] | None = None
    since = time.monotonic()
    followed: tuple[Holder | None] | None = None  # the leader's lease, which may be damaged
    with ProgressLine(SAY_EVERY_S) as line:
        while True:
            if finished():
                return None
            version, held = _read(store, path)
            free = version is None or (held is not None and (held.released or _is_dead(held)))
            if (version, activity()) != watched:
                if not free and (followed is None or _nonce(held) != _nonce(followed[0])):
                    followed = (held,)
                    line.clear()
                    log.warning("%s: waiting for %s", stage, _leader(held))
                watched, since = (version, activity()), time.monotonic()
            if free or time.monotonic() - since > lease_s:
                owner = _this_process(nonce, stage, lease_s)
                if store.swap(path, version, owner.as_json()):
                    line.clear()
                    if followed:
                        log.warning("%s: taking over: %s", stage, _why(held, lease_s))
                    return Lease(store, path, owner, lease_s, progress)
                watched = None
                continue
            line.show(partial(_follow, stage, held))
            time.sleep(min(POLL_S, lease_s / 4))


def lease_path(key: str) -> str:
    """Returns the path of the lease on a key."""
    return f"leases/{key}.json"


def read_lease(store: Store, path: str) -> Holder | None:
    """Returns who holds a lease; None if it is released, or its process is known to be dead.

    Raises CorruptObject for an object that is not a lease.
    """
    held = read_plain(store, path, Holder)
    return None if held is None or held.released or _is_dead(held) else held


def _nonce(held: Holder | None) -> str | None:
    return held.nonce if held else None


def _who(held: Holder | None) -> str:
    return (held.name if held else "") or "another process"


def _leader(held: Holder | None) -> str:
    since = f", since {time.strftime('%Y-%m-%d %H:%M', time.gmtime(held.since))} UTC" if held else ""
    return f"{_who(held)}, which is working on this already{since}"


def _follow(stage: str, held: Holder | None) -> str:
    return f"{stage}: following {_who(held)}: {(held and held.progress) or 'no progress reported yet'}"


def _why(held: Holder | None, lease_s: float) -> str:
    if held and held.released:
        return f"{_who(held)} has stopped"
    return f"{_who(held)} " + ("is dead" if held and _is_dead(held) else f"has not moved for {duration(lease_s)}")


def _read(store: Store, path: str) -> tuple[str | None, Holder | None]:
    """Returns the version of a lease, None if there is none, and its holder, None where it is damaged."""
    standing = store.stat(path)
    if standing is None:
        return None, None
    try:
        return standing.version, parse_object(store.read(path), Holder)
    except FileNotFoundError:
        return None, None
    except ValueError:
        return standing.version, None


def _this_process(nonce: str, stage: str, lease_s: float) -> Holder:
    me, pid = whoami(), os.getpid()
    return Holder(nonce, stage, lease_s, me["user"], me["host"], _boot(), pid, _started(pid), time.time())


def _boot() -> str:
    """Returns an id of this boot of the machine and of its namespace of process ids; a container has its own."""
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


def _is_dead(held: Holder) -> bool:
    """Returns whether the holder was a process of this very boot of this host and of this container, and has ended."""
    here = _boot() and held.boot == _boot() and held.host == socket.gethostname()
    return bool(here) and _started(held.pid) != held.started
