"""Drivers that stop before every operation on their store, where another one may go on or they may be killed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from greenlet import getcurrent, greenlet

from pipeline.errors import CorruptObject, UserError
from pipeline.store.base import Entry

ONCE = ("blobs/", "artifacts/", "shards/", "checkpoints/", "runs/")  # never overwritten
MOST_STEPS = 20_000  # of one command, after which it does not end


class Killed(BaseException):
    """The end of a driver's process, at the operation that it was about to ask for."""


class Clock:
    """The time of every machine and of the store: it moves by itself a little with each operation."""

    def __init__(self) -> None:
        self.seconds = 1.8e9
        self.pause: Callable[[], None] = lambda: None

    def time(self) -> float:
        return self.seconds

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.pause()

    def __getattr__(self, name: str) -> Any:  # strftime and the like
        return getattr(time, name)


@dataclass
class History:
    """What has happened to the objects of a store, whoever asked for it."""

    clock: Clock
    when: dict[str, float] = field(default_factory=dict)  # each object was written last
    first: dict[str, str] = field(default_factory=dict)  # sha256 of what was created at a path and not deleted since
    sound: dict[str, bytes] = field(default_factory=dict)  # blobs that somebody has created, by their path
    missed: dict[str, None] = field(default_factory=dict)  # paths that somebody looked for in vain, in order

    def created(self, path: str, data: bytes) -> None:
        self.when[path] = self.clock.seconds
        if path.startswith(ONCE):
            self.first[path] = hashlib.sha256(data).hexdigest()

    def aged(self, entry: Entry) -> Entry:
        """Returns an entry whose time, where it tells one, is that of the machine's clock."""
        told = {"modified": self.when.get(entry.path, self.clock.seconds)} if hasattr(entry, "modified") else {}
        return replace(entry, **told)

    def removed(self, paths: Sequence[str]) -> None:
        for path in paths:
            self.first.pop(path, None)


class StepStore:
    """A store as one driver sees it."""

    def __init__(self, inner: Any, driver: Driver, history: History, fresh: Callable[[], Any]):
        self._inner, self._driver, self._history, self._fresh = inner, driver, history, fresh

    @property
    def url(self) -> str:
        return str(self._inner.url)

    def fresh(self) -> StepStore:
        return StepStore(self._fresh(), self._driver, self._history, self._fresh)

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        self._driver.pause(f"read {path}")
        try:
            return bytes(self._inner.read(path, start, stop))
        except FileNotFoundError:
            self._history.missed[path] = None
            raise

    def read_parts(self, path: str, parts: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        self._driver.pause(f"read parts of {path}")
        yield from self._inner.read_parts(path, parts)

    def list(self, prefix: str) -> Iterator[Entry]:
        self._driver.pause(f"list {prefix}")
        for entry in self._inner.list(prefix):
            yield self._history.aged(entry)
            self._driver.pause(f"list {prefix} behind {entry.path}")

    def stat(self, path: str) -> Entry | None:
        self._driver.pause(f"stat {path}")
        found: Entry | None = self._inner.stat(path)
        if found is None:
            self._history.missed[path] = None
            return None
        return self._history.aged(found)

    def create(self, path: str, data: bytes | Path, move: bool = False) -> bool:
        self._history.missed[path] = None  # a stranger may come first
        self._driver.pause(f"create {path}")
        content = data if isinstance(data, bytes) else data.read_bytes()
        if path.startswith("blobs/"):
            self._history.sound[path] = content
        made = bool(self._inner.create(path, data, move))
        if made:
            self._history.created(path, content)
        return made

    def swap(self, path: str, old: str | None, new: bytes) -> bool:
        self._driver.pause(f"swap {path}")
        swapped = bool(self._inner.swap(path, old, new))
        if swapped:
            self._history.when[path] = self._driver.clock.seconds
        return swapped

    def delete(self, paths: Iterable[str]) -> None:
        doomed = list(paths)
        self._driver.pause(f"delete {doomed}")
        self._inner.delete(doomed)
        self._history.removed(doomed)

    def now(self) -> float:
        self._driver.pause("now")
        return self._driver.clock.seconds

    def clear_abandoned(self, before: float) -> int:
        self._driver.pause("clear abandoned")
        return 0  # what lies there is of the machine's own time, and not of the clock's


class Driver:
    """A process that runs one command after another. ``ended`` holds what came of each."""

    def __init__(self, name: str, clock: Clock):
        self.name, self.clock = name, clock
        self.doing, self.at = "", ""
        self.ended: list[tuple[str, Any]] = []
        self._greenlet: greenlet | None = None
        self._doomed = False

    @property
    def busy(self) -> bool:
        return self._greenlet is not None

    def start(self, what: str, command: Callable[[], Any]) -> None:
        """Begins a command, and stops at its first operation."""
        assert not self.busy
        self.doing, self._doomed = what, False

        def run() -> None:
            try:
                self.ended.append((what, command()))
            except Killed:
                self.ended.append((what, Killed()))
            except Exception as e:
                self.ended.append((what, e))

        self._greenlet = greenlet(run)
        self._go_on()

    def step(self, count: int) -> None:
        """Goes on for some operations, or to the end of the command."""
        while self.busy and count:
            self._go_on()
            count -= 1

    def finish(self) -> None:
        """Goes on to the end of the command."""
        self.step(MOST_STEPS)
        assert not self.busy, f"{self.name}: {self.doing} does not end, at {self.at}"

    def kill(self) -> None:
        """Ends the command as kill -9 does: no operation follows, also none that would tidy up."""
        self._doomed = True
        self.step(MOST_STEPS)

    def pause(self, at: str) -> None:
        """Lets others go on before the next operation. Threads of a driver's own are not stopped."""
        if getcurrent() is self._greenlet:
            self.at = at
            self.clock.seconds += 0.001
            getcurrent().parent.switch()
        if self._doomed:
            raise Killed

    def pause_if_here(self, at: str) -> None:
        """Lets others go on, if it is this driver that asks."""
        if getcurrent() is self._greenlet:
            self.pause(at)

    def _go_on(self) -> None:
        assert self._greenlet is not None
        self._greenlet.switch()
        if self._greenlet is not None and self._greenlet.dead:
            self._greenlet = None


def outcome(ended: Any) -> str:
    """Returns how a command ended: killed, value, refused (a UserError), damaged, or what it should not be."""
    if isinstance(ended, Killed):
        return "killed"
    if isinstance(ended, CorruptObject):
        return "damaged"
    if isinstance(ended, UserError):
        return "refused" if "\n" not in str(ended) else f"a message of several lines: {ended}"
    return f"{type(ended).__name__}: {ended}" if isinstance(ended, Exception) else "value"


def files(folder: str) -> dict[str, bytes]:
    """Returns the objects of a store in a folder, read without its code."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            if not name.startswith("."):
                with open(os.path.join(root, name), "rb") as file:
                    found[os.path.relpath(file.name, folder)] = file.read()
    return found
