"""One line of progress: rewritten in place on a terminal, printed from time to time in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from shutil import get_terminal_size
from threading import Lock, RLock
from typing import Self, TextIO, TypeVar
from unicodedata import east_asian_width

from pipeline.terminal import printable

T = TypeVar("T")
END = object()


def duration(seconds: float) -> str:
    """Returns a text such as '7 s', '3 min 20 s', '2 h 05 min' or, from 1,000 hours on, '42 days'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 3_600_000:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{round(whole / 86_400):,} days"


def counted(count: int, noun: str) -> str:
    """Returns a text such as '1 row' or '7,016 rows'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def add(total: dict[str, float], more: Mapping[str, float]) -> None:
    """Adds numbers by name, in place."""
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


class Steps:
    """Sums ``seconds`` by named step, on any thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                add(self.seconds, {name: time.monotonic() - began})

    def each(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """Yields the items; the time spent waiting for them counts as a step."""
        while True:
            with self(name):
                item = next(items, END)
            if item is END:
                return
            yield item  # type: ignore[misc]


class ProgressLine:
    """Text rewritten in place on a terminal, printed every ``every_s`` seconds in a log. Use as a context manager.

    Lines of several threads stand below each other. Where ``quiet`` is set, none is shown.
    """

    quiet = False

    def __init__(self, every_s: float = 10.0, stream: TextIO | None = None):
        stream = stream or sys.stderr
        # A line that is rewritten in place needs what is kept from all other text.
        self.stream: TextIO = getattr(stream, "unfiltered", stream)
        self.text = ""
        self.shown = time.monotonic()
        self.every = 0.2 if self.stream.isatty() else every_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Removes the line from a terminal, before something else is printed."""
        self._replace("")

    def _replace(self, text: str, last: str = "") -> None:
        """Puts a text in this line's place on a terminal, or none, and what is to stay above all lines."""
        with _lock:
            terminal = self.stream.isatty()
            if terminal:
                _erase(self.stream)
            self.text = text
            self.stream.write(last)
            if terminal:
                _shown[:] = [line for line in _shown if line is not self or text]
                _shown.extend([self] if text and self not in _shown else [])
                _draw(self.stream)
            self.stream.flush()

    def show(self, text: Callable[[], str]) -> None:
        """Shows the text if a line is due. ``text`` is called only then, because it may be expensive."""
        now = time.monotonic()
        if ProgressLine.quiet or now - self.shown < self.every:
            return
        self.shown = now
        said = printable(text())
        if self.stream.isatty():
            self._replace(said)
        else:
            self._replace("", f"  {said}\n")


_lock = RLock()
_shown: list[ProgressLine] = []  # on terminals now, from above


def _erase(stream: TextIO) -> None:
    stream.write("\r\033[K" + "\033[A\r\033[K" * (sum(line.stream is stream for line in _shown) - 1))


def _draw(stream: TextIO) -> None:
    width = get_terminal_size().columns - 3  # one that wraps would take two rows, of which one alone is erased
    texts = [_cut(line.text, width) for line in _shown if line.stream is stream]
    stream.write("\n".join(f"  {text}" for text in texts))


def _cut(text: str, width: int) -> str:
    """Returns as much of a text as fits into some cells of a terminal, of which CJK and emoji take two."""
    ends = accumulate(2 if east_asian_width(letter) in "WF" else 1 for letter in text)
    return "".join(letter for letter, end in zip(text, ends, strict=True) if end <= width)


@contextmanager
def above_lines() -> Iterator[None]:
    """Lets what the context prints stand above the lines that terminals show."""
    with _lock:
        streams = {id(line.stream): line.stream for line in _shown}.values()
        for stream in streams:
            _erase(stream)
            stream.flush()
        yield
        for stream in streams:
            _draw(stream)
            stream.flush()


class Progress(ProgressLine):
    """Counts ``unit`` up to ``total``; shows rate and time left. Use as a context manager."""

    def __init__(self, name: str, total: int, unit: str, start: int = 0, stream: TextIO | None = None):
        super().__init__(stream=stream)
        self.name, self.total, self.unit = name, total, unit
        self.done = self.first = start
        self.began = self.moved = self.shown

    def __enter__(self) -> Self:
        _under_way[self.name] = self
        return self

    def __exit__(self, *_: object) -> None:
        _under_way.pop(self.name, None)
        self._replace(
            "", f"  {self.name}: {self.line()}\n" if self.done > self.first and not ProgressLine.quiet else ""
        )

    def advance(self, amount: int, note: str | Callable[[], str] = "") -> None:
        """Advances the count. An expensive ``note`` is a function, which is called when a line is shown."""
        if amount:
            self.done += amount
            self.moved = time.monotonic()
        self.show(lambda: self._text(note if isinstance(note, str) else note()))

    def correct(self, amount: int) -> None:
        """Adds to what was there before, which was guessed."""
        self.first += amount
        self.done += amount

    def _text(self, note: str) -> str:
        return f"{self.name}: {self.line()}{'  ' + note if note else ''}"

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.began, 1e-9)

    def line(self) -> str:
        """Returns a text such as '1,200 of 7,213 rows, 143/s, 42 s left'."""
        rate = (self.done - self.first) / max(self.moved - self.began, 1e-9)  # does not fall between two counts
        speed = f"{rate:.2g}" if rate < 10 else f"{rate:,.0f}"
        each = f" {self.unit}/s" if self.unit.endswith("B") else "/s"  # of bytes nobody guesses the unit
        text = f"{self.done:,} of {self.total:,} {self.unit}, {speed}{each}"
        if self.done >= self.total:
            return f"{text}, {duration(self.seconds)}"
        return f"{text}, {duration((self.total - self.done) / rate)} left" if rate else text


_under_way: dict[str, Progress] = {}


def counts_under_way() -> list[tuple[str, int, int, str]]:
    """Returns name, count, total and unit of everything that this process is counting now."""
    return [(name, one.done, one.total, one.unit) for name, one in list(_under_way.items())]


def under_way(stage: str) -> str:
    """Returns the progress line of a stage that this process is running, "" where none is shown."""
    lines = [line for name, line in list(_under_way.items()) if name.split()[0] == stage]
    if not lines:
        return ""
    title = lines[-1].name.removeprefix(stage).strip()
    return f"{title}: {lines[-1].line()}" if title else lines[-1].line()


@cache  # a stage of many passes says it once, and so does a list that is read more than once
def say_once(text: str) -> None:
    """Logs a line, once in a process; an empty one never."""
    if text:
        logging.getLogger("unclip").info(text)
