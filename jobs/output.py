"""What commands write: lines for people, one JSON object, or the events of a run as JSON lines."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import UserError
from pipeline.progress import ProgressLine, counts_under_way

PROGRESS_S = 5.0  # between two events about what is under way


def say(text: object = "", end: str = "\n") -> None:
    """Prints to standard output, unless ``--quiet`` is given."""
    if not ProgressLine.quiet:
        print(text, end=end, flush=True)


def warn(text: object) -> None:
    """Prints to standard error."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Prints a value as one JSON object; dataclasses are objects, and sets are sorted lists."""
    print(json.dumps(value, indent=2, default=_plain, ensure_ascii=False))


def _plain(value: Any) -> Any:
    from dataclasses import asdict, is_dataclass  # a tenth of the time that unclip --help takes

    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


class Events:
    """Writes what happens in a run to a file, a JSON object a line, each with ``at`` and ``event``."""

    def __init__(self, file: TextIO | None):
        self._file = file
        self._lock = threading.Lock()

    def tell(self, event: str, **values: Any) -> None:
        """Writes one event, if there is a file."""
        if self._file is not None:
            line = json.dumps({"at": round(time.time(), 3), "event": event, **values}, default=_plain)
            with self._lock:
                self._file.write(line + "\n")
                self._file.flush()


@contextmanager
def events_to(path: Path | None) -> Iterator[Events]:
    """Yields events that go to the end of a file, with progress every few seconds and how it ended; to none for None.

    Raises UserError for a file that cannot be written.
    """
    if path is None:
        yield Events(None)
        return
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as e:
        raise UserError(
            f"--events {path}: cannot be written ({e.strerror}); name a file in a folder that exists"
        ) from e
    with file:
        events, ended = Events(file), threading.Event()

        def follow() -> None:
            while not ended.wait(PROGRESS_S):
                for name, done, total, unit in counts_under_way():
                    events.tell("progress", stage=name, done=done, total=total, unit=unit)

        follower = threading.Thread(target=follow, daemon=True, name="events")
        follower.start()
        try:
            yield events
            events.tell("done")
        except BaseException as e:
            events.tell("failed", error=str(e) or type(e).__name__)
            raise
        finally:
            ended.set()
            follower.join()
