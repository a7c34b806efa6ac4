"""Reads that go wrong though the stored object is sound: in a cache, in memory, or on the way."""

from typing import Any

import pytest

from pipeline.store import Store


def flip_first_reads(patch: pytest.MonkeyPatch, store: Store, starting: str = "") -> list[str]:
    """Flips the last bit of all that ``store`` itself reads of these paths, and of nothing that it reads past caches.

    Returns the paths of what was flipped, as they are read.
    """
    kind, flipped = type(store), list[str]()
    read, read_parts = kind.read, kind.read_parts

    def flip(self: Any, path: str, data: bytes) -> bytes:
        if self is not store or not data or not path.startswith(starting):
            return data
        flipped.append(path)
        return data[:-1] + bytes([data[-1] ^ 1])

    patch.setattr(kind, "read", lambda self, path, *where: flip(self, path, read(self, path, *where)))
    patch.setattr(
        kind,
        "read_parts",
        lambda self, path, parts: (flip(self, path, data) for data in read_parts(self, path, parts)),
    )
    return flipped
