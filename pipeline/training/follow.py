"""A progress line for workers in other processes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.progress import Progress

log = logging.getLogger("unclip")


@contextmanager
def following(stage: str, total: int, newest: Callable[[], int], every_s: float = 5.0) -> Iterator[None]:
    """Show how far workers elsewhere have come, in samples, for as long as the context lasts.

    ``newest`` says it by their latest checkpoint; it is asked every ``every_s`` seconds. If it cannot answer the line
    stands still: looking on must not end a training.
    """
    stop = threading.Event()

    def follow() -> None:
        try:
            with Progress(stage, total, "samples", start=newest()) as progress:
                while not stop.wait(every_s):
                    progress.advance(newest() - progress.done)
                progress.advance(newest() - progress.done)
        except Exception as e:
            log.warning("%s: its progress cannot be shown any more: %s", stage, e)

    thread = threading.Thread(target=follow, daemon=True, name="follow")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
