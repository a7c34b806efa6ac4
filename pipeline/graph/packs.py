"""Packs: blobs of pieces, one for each task of a later pass, which reads its own from every pack."""

from __future__ import annotations

import hashlib
import struct
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import CorruptObject
from pipeline.graph.workers import ShardOutput
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.records import blob_path, read_twice

# Each piece is read and checked by itself: a blob for each would be as many objects, and names in records, as there are
# tasks that write times tasks that read. The head of the blob has a place for each piece: where it begins and ends, its
# sha256, and a checksum of these.
PLACE = struct.Struct("<qq32s")
SUM = struct.Struct("<I")
HEAD = PLACE.size + SUM.size


def write_pack(pieces: Iterable[bytes], count: int) -> ShardOutput:
    """Writes ``count`` pieces as the blob "pack" of a task. Holds one of them at a time: the others lie in a file."""
    out = tempfile.NamedTemporaryFile(prefix="unclip-pack-")  # noqa: SIM115 - closing deletes it, see ``finished``
    places = []
    out.seek(HEAD * count)
    start = HEAD * count
    for piece in pieces:
        out.write(piece)
        place = PLACE.pack(start, start + len(piece), hashlib.sha256(piece).digest())
        places.append(place + SUM.pack(zlib.crc32(place)))
        start += len(piece)
    out.seek(0)
    out.write(b"".join(places))
    out.flush()
    return ShardOutput(Ledger(kept=1), {"pack": Path(out.name)}, finished=out.close)


def read_pieces(store: Store, pack: str, start: int, stop: int) -> list[bytes]:
    """Returns pieces [start, stop) of a blob of the store, read with two requests.

    Raises CorruptObject if the blob is missing, or damaged in one of them.
    """
    return read_twice(store, lambda store: _read_pieces(store, pack, start, stop))


def _read_pieces(store: Store, pack: str, start: int, stop: int) -> list[bytes]:
    path = blob_path(pack)
    try:
        head = store.read(path, start * HEAD, stop * HEAD)
        places = [_place(path, head, i, start + i) for i in range(stop - start)]
        begin, end = places[0][0], places[-1][1]
        data = store.read(path, begin, end) if begin < end else b""
    except FileNotFoundError:
        raise CorruptObject(path, "is missing") from None
    pieces = []
    for number, (low, high, sha256) in enumerate(places, start):
        pieces.append(data[low - begin : high - begin])
        if hashlib.sha256(pieces[-1]).digest() != sha256:
            raise CorruptObject(path, f"has other bytes in piece {number} than its place says")
    return pieces


def _place(path: str, head: bytes, i: int, number: int) -> tuple[int, int, bytes]:
    place = head[i * HEAD : (i + 1) * HEAD]
    if len(place) < HEAD or zlib.crc32(place[: PLACE.size]) != SUM.unpack(place[PLACE.size :])[0]:
        raise CorruptObject(path, f"has a damaged place for piece {number}")
    low, high, sha256 = PLACE.unpack(place[: PLACE.size])
    return low, high, sha256
