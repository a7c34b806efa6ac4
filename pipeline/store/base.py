"""What stores share: entries of a listing, counts of requests, and reading parts of a file or a stream."""

from __future__ import annotations

import os
import secrets
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

Buffers = Sequence[memoryview]  # of bytes, one after the other
COUNTS = ("GET", "PUT", "LIST", "HEAD", "DELETE", "bytes_read", "bytes_written")


@dataclass(frozen=True)
class Entry:
    """One object: its path, size in bytes, and a token that changes whenever its content does."""

    path: str
    size: int
    version: str


def cut(chunks: Iterable[bytes], start: int, parts: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes [start, stop) of each of ``parts``, in rising order and apart, of a stream that begins at ``start``.

    A part is there as soon as its last chunk is. One that the stream does not reach is shorter, or empty.
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


def read_file(file: str | Path, parts: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes [start, stop) of each of ``parts``, fewer where the file ends. Raises OSError."""
    with open(file, "rb", buffering=0) as f:
        for start, stop in parts:
            yield os.pread(f.fileno(), stop - start, start)


class Traffic:
    """Counts of requests and bytes (see COUNTS), over all threads of a process that use one store.

    A store takes it along when it is pickled: in another process it counts from zero, and copies that arrive there
    separately share it.
    """

    def __init__(self, name: str | None = None):
        self._name = name or secrets.token_hex(8)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        _in_this_process[self._name] = self

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _find, (self._name,)

    def add(self, **counts: int) -> None:
        """Raises ValueError for a name that is not in COUNTS."""
        if unknown := counts.keys() - set(COUNTS):
            raise ValueError(f"unknown count {sorted(unknown)}")
        with self._lock:
            self._counts.update(counts)

    def counts(self) -> dict[str, int]:
        """All of COUNTS, as they stand."""
        with self._lock:
            return {name: self._counts[name] for name in COUNTS}

    def take(self) -> dict[str, int]:
        """The same, and begin again at zero: for a process that tells another one what came up since it last did."""
        with self._lock:
            taken = {name: self._counts[name] for name in COUNTS}
            self._counts.clear()
            return taken


_in_this_process: WeakValueDictionary[str, Traffic] = WeakValueDictionary()
_finding = threading.Lock()


def _find(name: str) -> Traffic:
    with _finding:
        return _in_this_process.get(name) or Traffic(name)
