"""Finds near neighbours among many unit vectors: k-means clusters (IVF lists), an exact test of each pair in a cluster.

Embeddings are float16 and about 1 long, so the dot product of two is a sum of multiples of 2**-48 that float64 holds
without rounding: whether a pair is near does not depend on the rows that it is compared among. Clusters only decide
which pairs are compared. OpenAI removed near-duplicates from the data of DALL-E 2 in this way, with clusters and
several probes an image ("DALL-E 2 pre-training mitigations", 2022). SemDeDup (Abbas et al., 2023) calls a row a
duplicate if any earlier row is near, kept or not. So does this module: a row's verdict depends on its own pairs alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

import faiss
import numpy as np

from pipeline.data.neighbours.work import TOP_PROBES
from pipeline.data.pairs.row_index import SPLITS, STAGE_SIDES

NONE = np.iinfo(np.int64).max  # stands for no row: after every key
FLAT_CLUSTERS = 4096  # up to which a search for the nearest clusters is exact
MARGIN = 1e-3  # of the fp32 search around the exact verdict
PAIRS = 1 << 22  # at most, in memory at once
ROUNDS = 6  # of k-means


@dataclass(frozen=True)
class Clusters:
    """Centres of clusters fp32 [k, d], and of groups of neighbouring clusters fp32 [g, d], all of unit norm."""

    centres: np.ndarray
    groups: np.ndarray

    def nearest(self, vectors: np.ndarray, probes: int) -> np.ndarray:
        """Returns the nearest clusters of vectors [n, d], in order: int32 [n, probes], -1 where there are fewer."""
        width = self.centres.shape[1]
        index: faiss.Index = faiss.IndexFlatIP(width)
        if len(self.centres) > FLAT_CLUSTERS:
            index.add(self.groups)
            index = faiss.IndexIVFFlat(index, width, len(self.groups), faiss.METRIC_INNER_PRODUCT)
            index.is_trained = True
            index.nprobe = TOP_PROBES
        index.add(self.centres)
        return index.search(np.ascontiguousarray(vectors, np.float32), probes)[1].astype(np.int32)


def fit_clusters(sample: np.ndarray, clusters: int) -> Clusters:
    """Fits about ``clusters`` clusters to a sample [n, d], by spherical k-means in two levels: groups, and in them.

    A row costs about the square root of the number of clusters. The same sample gives the same bits on one thread of
    one machine. An empty sample makes one cluster.
    """
    vectors = np.ascontiguousarray(sample, np.float32)
    if not len(vectors):
        axis = np.eye(1, vectors.shape[1], dtype=np.float32)
        return Clusters(axis, axis)
    groups = _kmeans(vectors, isqrt(clusters))
    mine = _nearest(groups, vectors)
    centres = []
    for group in range(len(groups)):
        if len(inside := vectors[mine == group]):
            centres.append(_kmeans(inside, max(1, round(clusters * len(inside) / len(vectors)))))
    return Clusters(np.concatenate(centres), groups)


def _kmeans(vectors: np.ndarray, count: int) -> np.ndarray:
    if count >= len(vectors):
        return vectors
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=ROUNDS,
        seed=1,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(vectors),
    )
    kmeans.train(vectors)
    return np.ascontiguousarray(kmeans.centroids)


def _nearest(centres: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    index = faiss.IndexFlatIP(centres.shape[1])
    index.add(centres)
    return index.search(vectors, 1)[1][:, 0]


@dataclass(frozen=True)
class Rows:
    """Rows in the order of their keys, with what a comparison needs.

    Attributes:
        keys: int64 [n].
        splits: int8 [n], places in SPLITS.
        sizes: int8 [n], places in STAGE_SIDES of the size that the image reaches.
        vectors: float16 [n, d].
        home: int32 [n], the cluster in which others find the row.
        probes: int32 [n, p], the clusters in which it looks for others. -1 is none: a row that can only be found has
            no probes.
    """

    keys: np.ndarray
    splits: np.ndarray
    sizes: np.ndarray
    vectors: np.ndarray
    home: np.ndarray
    probes: np.ndarray


def compare(rows: Rows, duplicate: float | None, held_out: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Finds for each row the earliest row that it duplicates, and the earliest held-out row near it.

    Equal vectors are always near.

    Args:
        rows: the rows, with their clusters.
        duplicate: the least dot product of a near-duplicate with an earlier row of its split whose image reaches at
            least the same stage size; None looks for none.
        held_out: the least dot product of a training row with a row of another split, earlier or later; None looks for
            none.

    Returns:
        Keys int64 [n] of duplicated rows and of held-out rows, NONE where there is none.
    """
    bounds = (duplicate, held_out)
    found = np.full((2, len(rows.keys)), NONE)
    looking = dict(_members(rows.probes.reshape(-1), np.repeat(np.arange(len(rows.keys)), rows.probes.shape[1])))
    for cluster, there in _members(rows.home, np.arange(len(rows.keys))):
        seekers = looking.get(cluster)
        if seekers is not None:
            _compare_in_cluster(rows, there, seekers, bounds, found)
    return found[0], found[1]


def _members(clusters: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each cluster with its rows, in order."""
    rows, clusters = rows[clusters >= 0], clusters[clusters >= 0]
    order = np.argsort(clusters, kind="stable")
    names, starts = np.unique(clusters[order], return_index=True)
    yield from zip(names.tolist(), np.split(rows[order], starts[1:]), strict=True) if len(names) else ()


def _compare_in_cluster(
    rows: Rows, there: np.ndarray, seekers: np.ndarray, bounds: tuple[float | None, ...], found: np.ndarray
) -> None:
    """Lowers ``found`` by the pairs of one cluster.

    Equal vectors are compared once, so a million copies of an image cost what one costs. A pair is found by the probes
    of its later row, or by those of its earlier row if that has any: so no later row can change a verdict on
    duplicates.
    """
    inside = np.union1d(there, seekers)
    bits = np.ascontiguousarray(rows.vectors[inside]).view(
        np.dtype((np.void, rows.vectors.itemsize * rows.vectors.shape[1]))
    )
    _, firsts, same = np.unique(bits[:, 0], return_index=True, return_inverse=True)
    vectors = rows.vectors[inside[firsts]]
    resident, seeking = (np.isin(inside, members) for members in (there, seekers))
    earliest_there, earliest_seeker = (
        _earliest(rows, inside[mask], same[mask], len(vectors)) for mask in (resident, seeking)
    )
    sought = [np.full_like(earliest_there, NONE) for _ in bounds]  # what a seeker finds in this cluster
    seen = [np.full_like(earliest_there, NONE) for _ in bounds]  # by whom a resident is found
    places, queries = np.unique(same[resident]), np.unique(same[seeking])
    for a, b, near in _near_pairs(vectors, queries, places, bounds):
        for kind in range(len(bounds)):
            np.minimum.at(sought[kind], a[near[kind]], earliest_there[b[near[kind]]])
            np.minimum.at(seen[kind], b[near[kind]], earliest_seeker[a[near[kind]]])
    split, size = rows.splits[inside], rows.sizes[inside]
    for kind, bound in enumerate(bounds):
        if bound is None:
            continue
        for table, mask in ((sought[kind], seeking), (seen[kind], resident)):
            if kind == 0:
                earlier = table[same, split, size]
                earlier = np.where(earlier < rows.keys[inside], earlier, NONE)
            else:
                earlier = np.where(split == 0, table[same, 1:, 0].min(1), NONE)
            np.minimum.at(found[kind], inside[mask], earlier[mask])


def _earliest(rows: Rows, members: np.ndarray, vector: np.ndarray, count: int) -> np.ndarray:
    """Returns the earliest key of ``members`` by vector, split and least size: int64 [count, 3, len(STAGE_SIDES)]."""
    table = np.full((count, len(SPLITS), len(STAGE_SIDES)), NONE)
    np.minimum.at(table, (vector, rows.splits[members], rows.sizes[members]), rows.keys[members])
    return np.minimum.accumulate(table[:, :, ::-1], axis=2)[:, :, ::-1]


def _near_pairs(
    vectors: np.ndarray, queries: np.ndarray, places: np.ndarray, bounds: tuple[float | None, ...]
) -> Iterator[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]:
    """Yields pairs of a query and a place that are near by any bound, as two arrays, and a mask for each bound."""
    lowest = min(bound for bound in bounds if bound is not None)
    there = vectors[places].astype(np.float32).T
    step = max(1, PAIRS // len(places))
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        products = vectors[block].astype(np.float32) @ there
        i, j = np.nonzero(products >= lowest - MARGIN)
        a, b, similarity = block[i], places[j], products[i, j]
        equal = a == b
        masks = []
        for bound in bounds:
            near = np.zeros(len(a), bool) if bound is None else equal | (similarity >= bound + MARGIN)
            if bound is not None:
                close = np.flatnonzero(np.abs(similarity - bound) < MARGIN)
                exact = (vectors[a[close]].astype(np.float64) * vectors[b[close]].astype(np.float64)).sum(1)
                near[close] |= exact >= bound
            masks.append(near)
        yield a, b, masks
