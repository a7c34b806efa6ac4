"""An iterator whose items a thread makes in advance."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(source: Iterator[Item], depth: int = 2) -> Generator[Item, None, None]:
    """The items of an endless ``source``, made by a thread that is at most ``depth`` items ahead.

    Errors of ``source`` are raised here, after the items before them. Closing the generator ends the thread, and
    closes ``source`` if that is a generator, too.
    """
    ready: queue.Queue[Item | BaseException] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def offer(item: Item | BaseException) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in source:
                offer(item)
                if stopped.is_set():
                    return
        except BaseException as error:
            offer(error)

    thread = threading.Thread(target=work, daemon=True, name="read ahead")
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
        if isinstance(source, Generator):
            source.close()
