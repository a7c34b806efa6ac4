"""The index of a shard: where every picture lies and how its row ended. Curation keeps the schema and drops rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.errors import CorruptObject
from pipeline.records import blob_path
from pipeline.store import Store
from pipeline.store_shared import read_file

STAGE_SIDES = (0, 64, 256, 1024)  # counts are kept for pictures whose short side is at least this
COLUMNS = (
    "key",
    "url",
    "width",
    "height",
    "sha256",
    "tar",
    "offset",
    "size",
    "split",
    "status",
    "reason",
    "license",
    "attribution",
)
WIDE = {"width", "height", "offset", "size"}


def index_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A pyarrow Table of index rows.

    ``tar`` is null where the picture lies in the shard's own ``images`` blob, else the path of an existing tar.
    ``offset`` and ``size`` are bytes; ``sha256`` is of the stored bytes; ``status`` is kept, rejected or deferred. A
    kept row that imports embeddings has no picture: neither a place nor a size, and ``sha256`` is of its embeddings.
    """
    import pyarrow as pa

    return pa.table(
        {
            name: pa.array([row.get(name) for row in rows], pa.int64() if name in WIDE else pa.string())
            for name in COLUMNS
        }
    )


def index_counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Kept rows by split and by the stage sizes their short side reaches, e.g. {"train/64": 812}."""
    counts = {f"{split}/{side}": 0 for split in ("train", "validation", "test") for side in STAGE_SIDES}
    for row in rows:
        if row["status"] == "kept":
            short = min(row.get("width") or 0, row.get("height") or 0)
            for side in STAGE_SIDES:
                counts[f"{row['split']}/{side}"] += short >= side
    return counts


def read_pictures(store: Store, images: str | None, rows: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """The stored bytes of index rows, each checked against its sha256. ``images`` is the shard's own tar blob.

    Neighbours are read together. Raises CorruptObject for a blob or a tar that is missing or whose bytes do not
    match.
    """
    result: list[bytes] = [b""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["tar"] or "", rows[i]["offset"]))
    start = 0
    while start < len(order):
        tar, offset, size = (rows[order[start]][name] for name in ("tar", "offset", "size"))
        stop, parts = start + 1, [(offset, offset + size)]
        # One read for members with at most a few headers and paddings between them.
        while stop < len(order):
            next_tar, offset, size = (rows[order[stop]][name] for name in ("tar", "offset", "size"))
            if next_tar != tar or not 0 <= offset - parts[-1][1] <= 4096:
                break
            parts.append((offset, offset + size))
            stop += 1
        for i, data in zip(order[start:stop], _read(store, images, tar, parts), strict=True):
            if hashlib.sha256(data).hexdigest() != rows[i]["sha256"]:
                path = tar or blob_path(images or "")
                raise CorruptObject(path, f"the picture of row {rows[i]['key']} has other bytes than the index says")
            result[i] = data
        start = stop
    return result


def _read(store: Store, images: str | None, tar: str | None, parts: list[tuple[int, int]]) -> Iterator[bytes]:
    if tar is not None:
        try:
            yield from read_file(tar, parts)
            return
        except OSError as e:
            raise CorruptObject(tar, f"cannot be read ({e.strerror})") from None
    assert images is not None
    try:
        yield from store.read_parts(blob_path(images), parts)
    except FileNotFoundError:
        raise CorruptObject(blob_path(images), "is missing") from None
