"""The workers of the passes over all shards that find near rows (see ``near_rows``).

Each makes the input of the next, and holds a block of rows or a group of clusters, never all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
from safetensors.numpy import load, save

from pipeline.data.curation.rejected import Rejected, rejected_table
from pipeline.data.neighbours.blocks import candidates, input_name, is_a, read_samples
from pipeline.data.neighbours.clusters import NONE, Clusters, Rows, compare, fit_clusters
from pipeline.data.neighbours.exchange import read_columns, to_piece
from pipeline.data.neighbours.work import PROBES
from pipeline.data.pairs.row_index import SPLITS, STAGE_SIDES
from pipeline.graph.packs import write_pack
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.records import read_blob

SHARD_KEYS = 10**4  # row keys of a shard, as numbers


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
    """Packs the rows of a block by the groups of clusters that they are in or look in: the third pass.

    The number ``looks`` says whether its rows look for others, or can only be found; ``range`` is that of the block.
    """

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        plan = task.inputs["plan"].counts
        rows, parts = [], []
        for part, vectors, _ in candidates(self.store, task):
            rows += part
            parts.append(vectors)
        vectors = np.concatenate(parts)
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
        firsts = [-(-group * count // plan["groups"]) for group in range(plan["groups"])]
        return write_pack(_by_group(table, firsts, plan["range"]), plan["groups"])


def _by_group(rows: Rows, firsts: list[int], number: int) -> Iterator[bytes]:
    """Yields for each group of clusters the rows that are in it or look there, with the number of their range.

    ``firsts`` are the first clusters of the groups.
    """
    clusters = np.column_stack([rows.home, rows.probes])
    groups = np.where(clusters < 0, -1, np.searchsorted(firsts, clusters, side="right") - 1)
    row, column = np.nonzero(groups >= 0)
    pairs = np.unique(groups[row, column] * len(clusters) + row)  # of a group and a row, each once, in order
    bounds = np.searchsorted(pairs, np.arange(len(firsts) + 1) * len(clusters))
    for group, (low, high) in enumerate(pairwise(bounds.tolist())):
        mine = pairs[low:high] - group * len(clusters)
        here = np.where(groups[mine] == group, clusters[mine], np.int32(-1))
        columns = {field.name: getattr(rows, field.name)[mine] for field in fields(Rows)}
        ranges = np.full(len(mine), number, np.int32)
        yield to_piece(columns | {"home": here[:, 0], "probes": here[:, 1:], "range": ranges})


@dataclass(frozen=True)
class CompareRows:
    """Compares the rows in a group of clusters, which are a partition of "packs": the fourth pass.

    Packs what it finds by ranges of blocks: "keys", "near_duplicate" and "near_held_out" of ``compare``, int64 [n].
    """

    store: Store
    duplicate: float | None
    held_out: float | None

    def __call__(self, task: ShardTask) -> ShardOutput:
        ranges = task.inputs["plan"].counts["ranges"]
        columns = read_columns(self.store, task.inputs["packs"])
        if not columns:
            return write_pack([b""] * ranges, ranges)
        places = columns.pop("range")
        rows = Rows(**columns)
        duplicate, held_out = compare(rows, self.duplicate, self.held_out)
        found = {"keys": rows.keys, "near_duplicate": duplicate, "near_held_out": held_out}
        said = np.flatnonzero((duplicate != NONE) | (held_out != NONE))
        bounds = np.searchsorted(places[said], np.arange(ranges + 1))
        parts = (said[low:high] for low, high in pairwise(bounds.tolist()))
        return write_pack((to_piece({name: column[part] for name, column in found.items()}) for part in parts), ranges)


@dataclass(frozen=True)
class MergeFound:
    """Merges all that was found in a range of blocks, the partitions "found", for its "judged" shards: the last pass.

    Makes a table of rejected rows for each shard that has some. A row that is a leak and a duplicate counts as a leak.
    """

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        parts = [read_columns(self.store, found) for name, found in sorted(task.inputs.items()) if is_a(name, "found")]
        parts = [part for part in parts if part]
        if not parts:
            return ShardOutput(Ledger(kept=1), {})
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        keys, place = np.unique(found["keys"], return_inverse=True)
        duplicate, held_out = (np.full(len(keys), NONE) for _ in range(2))
        np.minimum.at(duplicate, place, found["near_duplicate"])
        np.minimum.at(held_out, place, found["near_held_out"])
        leaks = held_out != NONE
        near = np.where(leaks, held_out, duplicate)
        blobs = {}
        for name, shard in task.inputs.items():
            first = shard.number * SHARD_KEYS
            if is_a(name, "judged"):
                low, high = np.searchsorted(keys, [first, first + SHARD_KEYS])
                mine = zip(*(column[low:high].tolist() for column in (keys, leaks, near)), strict=True)
                rejected = [
                    Rejected(f"{key:012d}", "near_held_out" if leak else "near_duplicate", f"{cause:012d}")
                    for key, leak, cause in mine
                ]
                if rejected:
                    blobs[input_name("shard", shard.number)] = rejected_table(rejected)
        return ShardOutput(Ledger(kept=1), blobs)
