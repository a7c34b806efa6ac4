"""A disk that damages and loses objects."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.machine.driver import History


class Disk(RuleBasedStateMachine):
    """Damages what lies in a store.

    Attributes:
        inner: Store itself.
        raw: Function that returns all objects, read without the code that is tested.
        spoiled: Damage by path: bytes before, and after; None for a lost object.
        foreign: Objects that a stranger wrote, as far as they stand.
        kept: Objects that each holder (a pin, a release) named while it was whole.
    """

    inner: Any
    raw: Callable[[], dict[str, bytes]]
    history: History

    def __init__(self) -> None:
        super().__init__()
        self.spoiled: dict[str, tuple[bytes, bytes | None]] = {}
        self.foreign: dict[str, bytes] = {}
        self.kept: dict[str, set[str]] = {}

    @rule(choice=st.integers(0, 2**16), way=st.sampled_from(("rot", "cut", "lose")))
    def spoil(self, choice: int, way: str) -> None:
        """Damages a record or a blob, or loses a blob."""
        kinds = ("blobs/",) if way == "lose" else ("blobs/", "artifacts/", "shards/")
        objects = self.raw()
        paths = sorted(path for path in objects.keys() - self.foreign.keys() if path.startswith(kinds))
        paths = [path for path in paths if not self.is_damaged(path, objects)]
        if not paths:
            return
        path = paths[choice % len(paths)]
        before = objects[path]
        now = {"rot": b"rot" + before[3:], "cut": before[: len(before) // 2], "lose": None}[way]
        if now != before:
            self._put(path, now)
            self.spoiled[path] = before, now
            self.kept = {holder: named - {path} for holder, named in self.kept.items()}

    def is_damaged(self, path: str, objects: dict[str, bytes]) -> bool:
        """Returns whether an object is as it was damaged: nobody has made it again since."""
        return path in self.spoiled and objects.get(path) == self.spoiled[path][1]

    def restore(self, paths: Container[str]) -> None:
        """Puts a sound copy in the place of those of some objects that were damaged."""
        objects = self.raw()
        for path, (before, now) in self.spoiled.items():
            if path in paths and objects.get(path) in (None, now):
                self._put(path, before)

    def _put(self, path: str, data: bytes | None) -> None:
        self.inner.delete([path])
        self.history.removed([path])
        if data is not None:
            assert self.inner.create(path, data)
            self.history.created(path, data)
