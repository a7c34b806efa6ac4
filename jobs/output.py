"""What commands write: lines for people, one JSON object, or the events of a run as JSON lines."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def events_to(path: Path | None) -> Iterator[Callable[..., None]]:
    """Yields a function that tells an event with its values, to the end of a file, or to nobody for None.

    Each is a JSON object on a line, with ``at`` and ``event``. Progress is told every few seconds, and in the end how
    it ended. Raises UserError for a file that cannot be written.
    """
    if path is None:
        yield lambda event, **values: None
        return
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as e:
        raise UserError(
            f"--events {path}: cannot be written ({e.strerror}); name a file in a folder that exists"
        ) from e
    lock, ended = threading.Lock(), threading.Event()

    def tell(event: str, **values: Any) -> None:
        line = json.dumps({"at": round(time.time(), 3), "event": event, **values}, default=_plain)
        with lock:
            file.write(line + "\n")
            file.flush()

    def follow() -> None:
        while not ended.wait(PROGRESS_S):
            for name, done, total, unit in counts_under_way():
                tell("progress", stage=name, done=done, total=total, unit=unit)

    with file:
        follower = threading.Thread(target=follow, daemon=True, name="events")
        follower.start()
        try:
            yield tell
            tell("done")
        except BaseException as e:
            tell("failed", error=str(e) or type(e).__name__)
            raise
        finally:
            ended.set()
            follower.join()
