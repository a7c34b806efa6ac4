"""Writes and reads the index of a shard: where every image lies and how its row ended. Curation keeps the schema."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.data.fetch.references import shown
from pipeline.data.source.tars import is_tar
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import NOTE, ShardRow, read_shard, read_table, write_table
from pipeline.local import open_local
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.store.records import blob_path, read_twice
from pipeline.terminal import printable

OPT_OUTS = f"{NOTE}opt_outs"
SPLITS = ("train", "validation", "test")
READERS = 8  # requests at once
GAP = 64 << 10  # bytes that are read and left, such as two images of 256 px, take less time than another request
STAGE_SIDES = (0, 64, 256, 1024)  # counts are kept for images whose short side is at least this
INDEX = pa.schema(
    {
        "key": pa.string(),
        "url": pa.string(),
        "width": pa.int64(),
        "height": pa.int64(),
        "sha256": pa.string(),
        "tar": pa.string(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "split": pa.string(),
        "status": pa.string(),
        "reason": pa.string(),
        "license": pa.string(),
        "attribution": pa.string(),
    }.items()
)


def index_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Returns the table of index rows, whose other values are left out.

    ``tar`` is null where the image lies in the shard's own ``images`` blob, else the path of an existing tar.
    ``offset`` and ``size`` are bytes; ``sha256`` is of the stored bytes; ``status`` is kept, rejected or deferred. A
    kept row that imports embeddings has no image, neither a place nor a size, and ``sha256`` is of its embeddings.
    """
    return pa.Table.from_pylist(rows, INDEX)


def index_counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Returns kept rows by split and by the stage sizes their short side reaches, e.g. {"train/64": 812}."""
    counts = {f"{split}/{side}": 0 for split in SPLITS for side in STAGE_SIDES}
    for row in rows:
        if row["status"] == "kept":
            short = min(row.get("width") or 0, row.get("height") or 0)
            for side in STAGE_SIDES:
                counts[f"{row['split']}/{side}"] += short >= side
    return counts


class Place(NamedTuple):
    """Says where an image's bytes lie: in the tar blob ``images`` of its shard, or in the user's own file ``tar``."""

    key: str
    images: str | None
    tar: str | None
    offset: int
    size: int
    sha256: str

    @classmethod
    def of(cls, row: Mapping[str, Any], images: str | None) -> Place:
        """Returns the place of an index row, in a shard with this blob."""
        return cls(row["key"], images, row["tar"], row["offset"], row["size"], row["sha256"])

    @property
    def in_place(self) -> bool:
        """Returns whether the image lies in a tar of the user's, so that others have made it."""
        return self.tar is not None


def read_images(store: Store, places: Sequence[Place]) -> list[bytes]:
    """Returns the stored bytes of images, each checked against its sha256. Neighbours are read together.

    Raises CorruptObject for a blob or a tar that is missing or whose bytes do not match.
    """

    def read(group: list[Place]) -> dict[Place, bytes]:
        return read_twice(store, partial(_checked, group))

    found: dict[Place, bytes] = {}
    groups = list(_neighbours(places))
    # At once: where a curation left gaps, a window of a training is dozens of requests of 30 ms.
    for part in ordered_map(read, groups, READERS) if len(groups) > 1 else map(read, groups):
        found |= part
    return [found[place] for place in places]


def _checked(group: Sequence[Place], store: Store) -> dict[Place, bytes]:
    found: dict[Place, bytes] = {}
    for place, data in zip(group, _read(store, group), strict=True):
        if hashlib.sha256(data).hexdigest() != place.sha256:
            path = place.tar or blob_path(place.images or "")
            raise CorruptObject(path, f"has another image of row {place.key} than the index says")
        found[place] = data
    return found


def _neighbours(places: Iterable[Place]) -> Iterator[list[Place]]:
    """Yields groups of one file with at most GAP bytes between two images, in order."""
    group: list[Place] = []
    for place in sorted(places, key=lambda p: (p.images or "", p.tar or "", p.offset)):
        if group:
            last = group[-1]
            near = 0 <= place.offset - last.offset - last.size <= GAP
            if not near or place.tar != last.tar or place.images != last.images:
                yield group
                group = []
        group.append(place)
    if group:
        yield group


def _read(store: Store, group: Sequence[Place]) -> Iterator[bytes]:
    images, tar = group[0].images, group[0].tar
    parts = [(place.offset, place.offset + place.size) for place in group]
    if tar is not None:
        if not is_tar(tar):  # as every list of that kind; an index may come from anybody
            raise CorruptObject(tar, "is named by an index, and is not a tar")
        try:
            with open_local(tar) as file:
                end = os.fstat(file.fileno()).st_size
                for start, stop in parts:  # not behind the end: a forged size would take all memory
                    yield os.pread(file.fileno(), max(0, min(stop, end) - start), start)
            return
        except OSError as e:
            raise CorruptObject(tar, f"cannot be read ({e.strerror})") from None
    assert images is not None
    try:
        yield from store.read_parts(blob_path(images), parts)
    except FileNotFoundError:
        raise CorruptObject(blob_path(images), "is missing") from None


# --- evidence of opt-outs ------------------------------------------------------------------------------------------


def opt_out_table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns Parquet of rows whose ``evidence`` is an opener.Evidence; ``seen`` in milliseconds, UTC.

    It has times, so it is a note beside a shard's result: the shard's record names it, the artefact's table does not.
    People read it: what a site said cannot control their terminal, and references are as shown.
    """
    columns: dict[str, Any] = {name: pa.array([row[name] for row in rows]) for name in ("key", "url", "reason")}
    columns["url"] = pa.array([shown(row["url"]) for row in rows])
    columns["evidence"] = pa.array([printable(row["evidence"].text) for row in rows])
    seen = [round(1000 * row["evidence"].seen) for row in rows]
    columns["seen"] = pa.array(seen, pa.timestamp("ms", "UTC"))
    return write_table(columns)


def read_opt_outs(store: Store, shards: Iterable[ShardRow]) -> Iterator[dict[str, Any]]:
    """Yields every opted-out or denied row of shards of pairs, in order.

    A row has key, url, reason, evidence, and ``seen``, a datetime.

    Raises CorruptObject for evidence that is missing or damaged.
    """
    for row in shards:
        shard = read_shard(store, "pairs", row.key)
        if shard is not None and OPT_OUTS in shard.blobs:
            yield from read_table(store, shard.blobs[OPT_OUTS]).to_pylist()
