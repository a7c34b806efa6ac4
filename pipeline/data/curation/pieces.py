"""Many pieces in one blob, each read and checked by itself: what a task that scatters rows leaves for many others.

A blob each would be as many objects, and names in records, as there are tasks that write times tasks that read. The
head of the blob has a place for each piece: where it begins and ends, its sha256, and a checksum of these.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Iterable

from pipeline.errors import CorruptObject
from pipeline.store import Store
from pipeline.store.records import blob_path, read_twice

PLACE = struct.Struct("<qq32s")
SUM = struct.Struct("<I")
HEAD = PLACE.size + SUM.size


def pack(pieces: Iterable[bytes], count: int) -> bytes:
    """``count`` pieces as one blob; only one of them is held besides."""
    out = io.BytesIO()
    places = []
    out.seek(HEAD * count)
    for piece in pieces:
        start = out.tell()
        out.write(piece)
        place = PLACE.pack(start, out.tell(), hashlib.sha256(piece).digest())
        places.append(place + SUM.pack(zlib.crc32(place)))
    out.seek(0)
    out.write(b"".join(places))
    return out.getvalue()


def read_piece(store: Store, blob: str, number: int) -> bytes:
    """Returns one piece of a blob of the store. Raises CorruptObject if it is missing or damaged."""
    return read_twice(store, lambda store: _read_piece(store, blob, number))


def _read_piece(store: Store, blob: str, number: int) -> bytes:
    path = blob_path(blob)
    try:
        head = store.read(path, number * HEAD, (number + 1) * HEAD)
        if len(head) < HEAD or zlib.crc32(head[: PLACE.size]) != SUM.unpack(head[PLACE.size :])[0]:
            raise CorruptObject(path, f"has a damaged place for piece {number}")
        start, stop, sha256 = PLACE.unpack(head[: PLACE.size])
        piece = store.read(path, start, stop)
    except FileNotFoundError:
        raise CorruptObject(path, "is missing") from None
    if hashlib.sha256(piece).digest() != sha256:
        raise CorruptObject(path, f"has other bytes in piece {number} than its place says")
    return piece
