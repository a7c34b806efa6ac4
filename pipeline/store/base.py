"""Shared by the stores: entries of a listing, cutting parts out of a stream, and tries of a request."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

TRIES = 6  # of a request; with the waits about a minute at most


@dataclass(frozen=True)
class Entry:
    """Describes one object.

    Attributes:
        path: Path in the store.
        size: Bytes.
        version: Token that changes whenever the object's content does.
        modified: Time of the last write by the store's clock, in seconds since the epoch.
    """

    path: str
    size: int
    version: str
    modified: float


def cut(chunks: Iterable[bytes], start: int, parts: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Yields bytes [start, stop) of each of ``parts`` of a stream that begins at ``start``.

    Parts are in rising order and do not overlap. A part is yielded as soon as its last chunk has come. A part that the
    stream does not reach is shorter, or empty.
    """
    stream = iter(chunks)
    chunk, begin = memoryview(b""), start
    for first, last in parts:
        pieces = [chunk[max(0, first - begin) : max(0, last - begin)]]
        while begin + len(chunk) < last and (more := next(stream, None)) is not None:
            begin += len(chunk)
            chunk = memoryview(more)
            pieces.append(chunk[max(0, first - begin) : last - begin])
        yield b"".join(pieces)


def tries() -> Iterator[bool]:
    """Yields TRIES times whether this is the last try.

    Between tries up to 1, 2, 4 ... 20 seconds pass, at random, so that many clients do not come back at once.
    """
    for attempt in range(TRIES):
        if attempt:
            time.sleep(random.random() * min(20, 2 ** (attempt - 1)))
        yield attempt == TRIES - 1


def has_bytes(read: Callable[[str], bytes], path: str, data: bytes) -> bool:
    """Returns whether an object is there and has these bytes."""
    try:
        return read(path) == data
    except FileNotFoundError:
        return False
