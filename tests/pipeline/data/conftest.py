from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.data.source.reader import ListReader

LISTS = 50  # that a child reads before another takes its place


@pytest.fixture(scope="session")
def idle_children() -> Iterator[list[tuple[Any, ...]]]:
    idle: list[tuple[Any, ...]] = []
    yield idle
    for process, *_ in idle:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def kept_children(idle_children: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a child that has read a list read the next one: to start one for each would take most of the time."""
    ask = ListReader._ask

    def asked(self: ListReader, *request: Any) -> None:
        if self._process is None and idle_children:
            self._process, self._socket, self._pipe, self.lists = idle_children.pop()  # type: ignore[attr-defined]
        ask(self, *request)

    def left(self: ListReader, error: type[BaseException] | None, *_: object) -> None:
        lists = getattr(self, "lists", 0) + 1
        # Behind an error there may be rows that nobody has taken.
        if error or self._process is None or self.spent or lists > LISTS:
            self.close()
        else:
            idle_children.append((self._process, self._socket, self._pipe, lists))
            self._process = self._socket = self._pipe = None

    monkeypatch.setattr(ListReader, "_ask", asked)
    monkeypatch.setattr(ListReader, "__exit__", left)
