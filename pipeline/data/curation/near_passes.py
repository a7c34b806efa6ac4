"""The workers of the passes over all shards that find near rows (see ``near_rows``).

Each makes the input of the next, and holds a block of rows or a group of clusters, never all rows.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
from safetensors.numpy import load, save

from pipeline.data.curation.rejected import Rejected, rejected_table
from pipeline.data.neighbours.blocks import candidates, input_name, is_a, read_samples, shards_of
from pipeline.data.neighbours.clusters import NONE, PROBES, Clusters, Rows, compare, fit_clusters
from pipeline.data.pairs.row_index import SPLITS, STAGE_SIDES
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import read_table
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.records import blob_path, read_blob, read_twice


@dataclass(frozen=True)
class FitClusters:
    """Fits the "clusters" of a stretch to samples of all blocks before it: the second pass."""

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        clusters = fit_clusters(read_samples(self.store, task), task.inputs["plan"].counts["clusters"])
        blob = save({"centres": clusters.centres, "groups": clusters.groups})
        return ShardOutput(Ledger(kept=1), {"clusters": blob})


@dataclass(frozen=True)
class ScatterRows:
    """Cuts the "rows" of a block into a piece for each group of clusters: the third pass.

    The number ``looks`` says whether its rows look for others, or can only be found.
    """

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        plan = task.inputs["plan"].counts
        parts = list(candidates(self.store, task))
        rows = [row for part, _, _ in parts for row in part]
        vectors = np.concatenate([vectors for _, vectors, _ in parts])
        if "clusters" in task.inputs:
            clusters = Clusters(**load(read_blob(self.store, task.inputs["clusters"].blobs["clusters"])))
            nearest, count = clusters.nearest(vectors, PROBES), len(clusters.centres)
        else:
            nearest, count = np.zeros((len(rows), 1), np.int32), 1
        sides = [min(row["width"] or 0, row["height"] or 0) for row in rows]  # null of embeddings without images
        table = Rows(
            keys=np.array([int(row["key"]) for row in rows], np.int64),
            splits=np.array([SPLITS.index(row["split"]) for row in rows], np.int8),
            sizes=(np.searchsorted(STAGE_SIDES, sides, side="right") - 1).astype(np.int8),
            vectors=vectors,
            home=nearest[:, 0],
            probes=nearest if plan["looks"] else np.full_like(nearest, -1),
        )
        bounds = [-(-group * count // plan["groups"]) for group in range(plan["groups"] + 1)]
        pieces = (_within(table, low, high) for low, high in pairwise(bounds))
        return ShardOutput(Ledger(kept=len(rows)), {"rows": pack(pieces, plan["groups"])})


def _within(rows: Rows, low: int, high: int) -> bytes:
    """Returns the rows that are in clusters [low, high) or look there; no bytes where there are none."""
    home = np.where((rows.home >= low) & (rows.home < high), rows.home, -1)
    probes = np.where((rows.probes >= low) & (rows.probes < high), rows.probes, -1)
    mine = (home >= 0) | (probes >= 0).any(1)
    columns = {field.name: getattr(rows, field.name) for field in fields(Rows)} | {"home": home, "probes": probes}
    return save({name: np.ascontiguousarray(column[mine]) for name, column in columns.items()}) if mine.any() else b""


@dataclass(frozen=True)
class CompareRows:
    """Compares the rows in a group of clusters, from all "blocks" (a table of shards): the fourth pass.

    Finds for rows of each block "keys", "near_duplicate" and "near_held_out", int64 [n], as ``compare`` does.
    """

    store: Store
    duplicate: float | None
    held_out: float | None

    def __call__(self, task: ShardTask) -> ShardOutput:
        group = task.inputs["plan"].counts["group"]
        names, parts = [], []
        for block in read_table(self.store, task.inputs["blocks"].blobs["blocks"]).to_pylist():
            if piece := read_piece(self.store, block["blob.rows"], group):
                names.append(input_name("block", block["number"]))
                parts.append(load(piece))
        if not parts:
            return ShardOutput(Ledger(kept=1), {})
        rows = Rows(**{field.name: np.concatenate([part[field.name] for part in parts]) for field in fields(Rows)})
        ends = np.cumsum([len(part["keys"]) for part in parts])[:-1]
        columns = [np.split(column, ends) for column in (rows.keys, *compare(rows, self.duplicate, self.held_out))]
        blobs = {}
        for name, keys, duplicate, held_out in zip(names, *columns, strict=True):
            said = (duplicate != NONE) | (held_out != NONE)
            if said.any():
                found = {"keys": keys, "near_duplicate": duplicate, "near_held_out": held_out}
                blobs[name] = save({column: np.ascontiguousarray(values[said]) for column, values in found.items()})
        return ShardOutput(Ledger(kept=1), blobs)


@dataclass(frozen=True)
class MergeFound:
    """Merges all that was found for a block into a table of rejected rows for each of its shards: the last pass.

    A row that is a leak and a duplicate counts as a leak.
    """

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        reasons: dict[int, tuple[str, int]] = {}
        for reason in ("near_duplicate", "near_held_out"):
            found: dict[int, int] = {}
            for name, part in sorted(task.inputs.items()):
                if is_a(name, "said"):
                    [blob] = part.blobs.values()
                    said = load(read_blob(self.store, blob))
                    for key, near in zip(said["keys"].tolist(), said[reason].tolist(), strict=True):
                        found[key] = min(near, found.get(key, NONE))
            reasons |= {key: (reason, near) for key, near in found.items() if near != NONE}
        judged = [shard for shard, _ in shards_of(task)]
        rejected = [Rejected(f"{key:012d}", reason, f"{near:012d}") for key, (reason, near) in reasons.items()]
        blobs = {}
        for shard in judged:
            near = [row for row in rejected if row.key.startswith(f"{shard.number:08d}")]
            blobs[input_name("shard", shard.number)] = rejected_table(near)
        return ShardOutput(Ledger(kept=sum(shard.kept for shard in judged)), blobs)


# Many pieces in one blob, each read and checked by itself: a blob for each piece would be as many objects, and names in
# records, as there are tasks that write times tasks that read. The head of the blob has a place for each piece: where
# it begins and ends, its sha256, and a checksum of these.
PLACE = struct.Struct("<qq32s")
SUM = struct.Struct("<I")
HEAD = PLACE.size + SUM.size


def pack(pieces: Iterable[bytes], count: int) -> bytes:
    """Packs ``count`` pieces into one blob, and holds one of them at a time besides."""
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
