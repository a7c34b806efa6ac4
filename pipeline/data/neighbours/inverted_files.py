"""Inverted files of codes: IVF-PQ indices (Jégou et al., 2011) of many rows, of which a query reads a few lists.

A list holds the rows that are nearest to one centroid. There can be 65,536 centroids, which lie in an inverted file,
too, with a list for each group of near ones: neither a row nor a query is compared with all of them. Both files are
packs, of which a piece is a list.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
from faiss.contrib.inspect_tools import get_invlist
from safetensors.numpy import load

from pipeline.data.neighbours.blocks import candidates, read_samples
from pipeline.data.neighbours.clusters import fit_clusters
from pipeline.data.neighbours.exchange import concatenate, read_packs, to_piece
from pipeline.data.neighbours.work import GROUP_PROBES, groups_of
from pipeline.data.pairs.row_index import SPLITS
from pipeline.graph.artifacts import Artifact, read_shards
from pipeline.graph.packs import read_pieces, write_pack
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.store.records import read_blob

# A change of any is a new version.
CODE_COMPONENTS = 8  # components of a vector in one byte of its code
LIST_PROBES = 32  # lists that a search looks in
SEARCHED_GROUPS = 64  # groups of centroids in which it looks for them


@dataclass(frozen=True)
class TrainLists:
    """Trains an IVF-PQ index, of about as many lists as the "plan" says, on the samples of all blocks.

    "trained" is that index, "empty" the same without centroids, and "pack" has a group of centroids in each piece.
    """

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        sample = read_samples(self.store, task).astype(np.float32)
        centres = fit_clusters(sample, task.inputs["plan"].counts["lists"]).centres
        lists, width = centres.shape
        groups, kind = groups_of(lists), faiss.ScalarQuantizer.QT_fp16
        centroids = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(width), width, groups, kind, faiss.METRIC_INNER_PRODUCT
        )
        centroids.cp.min_points_per_centroid = 1  # with fewer than 39, faiss prints a warning
        centroids.train(centres)
        centroids.add(centres)
        centroids.nprobe = min(GROUP_PROBES, groups)
        centroids.make_direct_map()  # finds a row's centroid, from which its code says how it differs
        length = max(n for n in range(1, max(1, width // CODE_COMPONENTS) + 1) if width % n == 0)
        index = faiss.IndexIVFPQ(centroids, width, lists, length, 8, faiss.METRIC_INNER_PRODUCT)
        index.train(sample)  # of the codes alone: the lists have their centroids
        trained = faiss.serialize_index(index).tobytes()
        packed = write_pack(map(to_piece, _lists(centroids)), groups)
        centroids.make_direct_map(False)
        centroids.reset()
        blobs = {**packed.blobs, "trained": trained, "empty": faiss.serialize_index(index).tobytes()}
        return replace(packed, blobs=blobs, counts={"lists": lists})


@dataclass(frozen=True)
class CodeRows:
    """Writes the rows of a block into a pack with a piece for each list of the index "trained".

    The id of a row is its key as a number times the number of splits, plus the place of its split.
    """

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        index = open_index(self.store, task.inputs["lists"].blobs["trained"])
        for rows, vectors, _ in candidates(self.store, task):
            ids = [int(row["key"]) * len(SPLITS) + SPLITS.index(row["split"]) for row in rows]
            index.add_with_ids(vectors.astype(np.float32), np.array(ids, np.int64))
        return replace(write_pack(map(to_piece, _lists(index)), index.nlist), ledger=Ledger(kept=index.ntotal))


@dataclass(frozen=True)
class MergeLists:
    """Merges the same lists of all blocks: a query would have to ask for each list in every block."""

    store: Store

    def __call__(self, task: ShardTask) -> ShardOutput:
        packs = task.inputs["packs"]
        lists = [concatenate(pieces) for pieces in zip(*read_packs(self.store, packs), strict=True)]
        rows = sum(len(columns.get("ids", ())) for columns in lists)
        packed = write_pack(map(to_piece, lists), len(lists))
        return replace(packed, ledger=Ledger(kept=rows), counts={"first": packs.counts["start"]})


def open_index(store: Store, blob: str) -> Any:
    """Reads a faiss index of the store into memory, of the kind that was written."""
    return faiss.deserialize_index(np.frombuffer(read_blob(store, blob), np.uint8))


def read_near_lists(store: Store, index: Artifact, queries: np.ndarray, splits: Collection[str]) -> Any:
    """Reads the lists that a search for ``queries`` looks in.

    Returns:
        A faiss index of their rows in ``splits``; ids are row keys as numbers.
    """
    shards = read_shards(store, index)
    firsts, wanted = [shard.counts["first"] for shard in shards], [SPLITS.index(split) for split in splits]
    near = open_index(store, index.blobs["empty"])
    centroids: Any = faiss.downcast_index(near.quantizer)
    centroids.nprobe = min(SEARCHED_GROUPS, centroids.nlist)

    def read_centroids(number: int) -> dict[str, np.ndarray]:
        return _read_list(store, index.blobs["centroids"], number)

    def read_rows(number: int) -> dict[str, np.ndarray]:
        shard = shards[bisect(firsts, number) - 1]
        rows = _read_list(store, shard.blobs["pack"], number - shard.counts["first"])
        mine = np.isin(rows["ids"] % len(SPLITS), wanted)
        return {"ids": rows["ids"][mine] // len(SPLITS), "codes": rows["codes"][mine]}

    _fill(centroids, queries, read_centroids)
    centroids.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]
    near.nprobe = min(LIST_PROBES, near.nlist)
    _fill(near, queries, read_rows)
    return near


def _lists(index: Any) -> Iterator[dict[str, np.ndarray]]:
    for number in range(index.nlist):
        ids, codes = get_invlist(index.invlists, number)
        yield {"ids": ids, "codes": codes}


def _read_list(store: Store, pack: str, number: int) -> dict[str, np.ndarray]:
    [piece] = read_pieces(store, pack, number, number + 1)
    return load(piece) if piece else {"ids": np.empty(0, np.int64), "codes": np.empty((0, 1), np.uint8)}


def _fill(index: Any, queries: np.ndarray, read: Callable[[int], dict[str, np.ndarray]]) -> None:
    """Puts into an empty inverted file the lists that a search for ``queries`` looks in."""
    numbers = np.unique(index.quantizer.search(queries, index.nprobe)[1])
    numbers = numbers[numbers >= 0].tolist()  # -1 where the groups that were read have fewer centroids
    for number, rows in zip(numbers, ordered_map(read, numbers), strict=True):
        ids, codes = (np.ascontiguousarray(rows[name]) for name in ("ids", "codes"))
        index.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
        index.ntotal += len(ids)
