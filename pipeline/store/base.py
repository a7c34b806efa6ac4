"""Shared by both stores: entries of a listing, and cutting parts out of a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


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
