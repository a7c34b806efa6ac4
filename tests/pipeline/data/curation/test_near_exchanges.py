"""Rows and what is found in them are exchanged: exactly, past the driver, and by requests that grow with the rows."""

import pickle
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from pipeline.data.curation import near_passes, near_rows
from pipeline.data.curation.rejected import Rejected
from pipeline.data.neighbours.clusters import NONE, Rows, compare, fit_clusters
from pipeline.data.neighbours.exchange import Fan
from pipeline.data.pairs.row_index import SPLITS, STAGE_SIDES
from pipeline.graph.artifacts import ShardRow
from pipeline.store import open_store
from tests.pipeline.data.curation.near import BOUND, ROWS, all_pairs, cut_small, listed, noting, requests, run
from tests.pipeline.data.vectors import SHARD_ROWS, Listed, rejected, unit


def alone(rows: Listed) -> dict[str, Rejected]:
    """What is rejected if each stretch is one array in one process, and nothing is exchanged."""
    kept = [len(rows.splits[start : start + SHARD_ROWS]) for start in range(0, len(rows.splits), SHARD_ROWS)]
    shards = [ShardRow(number, "key", count, 0, {}, {}) for number, count in enumerate(kept)]
    stretches = near_rows.cut_stretches(shards, dict(enumerate(shards)))
    blocks = [
        np.concatenate([np.arange(s.number * SHARD_ROWS, s.number * SHARD_ROWS + s.kept) for s, _ in block.shards])
        for stretch in stretches
        for block in stretch.blocks
    ]
    faiss.omp_set_num_threads(1)  # as workers do
    keys, train = np.array([int(key) for key in rows.row_keys]), np.array(rows.splits) == "train"
    splits = np.array([SPLITS.index(split) for split in rows.splits], np.int8)
    sizes = (np.searchsorted(STAGE_SIDES, rows.sides, side="right") - 1).astype(np.int8)
    found = np.full((2, len(keys)), NONE)
    for stretch in stretches:
        before = stretch.rows_before
        own = slice(0, before + sum(block.rows for block in stretch.blocks))
        nearest = np.zeros((own.stop, 1), np.int32)
        if before:
            count = -(-before // near_rows.CLUSTER_ROWS)
            stride = max(1, before // (count * near_rows.CLUSTER_SAMPLES))
            sample = np.concatenate([block[train[block]][::stride] for block in blocks[: stretch.blocks_before]])
            nearest = fit_clusters(rows.vectors[sample], count).nearest(rows.vectors[own], near_passes.PROBES)
        probes = np.where(np.arange(own.stop)[:, None] < before, -1, nearest)
        whole = Rows(keys[own], splits[own], sizes[own], rows.vectors[own], nearest[:, 0], probes)
        found[:, own] = np.minimum(found[:, own], compare(whole, BOUND, BOUND))
    verdicts = {}
    for key, duplicate, leak in zip(rows.row_keys, *found.tolist(), strict=True):
        near, reason = (leak, "near_held_out") if leak != NONE else (duplicate, "near_duplicate")
        if near != NONE:
            verdicts[key] = Rejected(key, reason, f"{near:012d}")
    return verdicts


@pytest.mark.parametrize(("fan", "group"), [(Fan(2, 2), 50), (Fan(3, 1), 30), (Fan(2, 5), 10), (Fan(64, 64), 200)])
def test_exchanges_change_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fan: Fan, group: int) -> None:
    """However many packs are merged and however few rows a group has; in clusters that miss some pairs."""
    cut_small(monkeypatch, fan, group)
    monkeypatch.setattr(near_passes, "PROBES", 2)
    rows, store = listed(group), open_store(str(tmp_path))
    expected = alone(rows)
    assert {row.key: row for row in rejected(store, run(store, rows))} == expected
    assert 0 < len(expected) < len(all_pairs(rows))


def test_the_driver_holds_nothing_of_what_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of copies and one without any: the driver gets as many bytes back from the workers."""
    cut_small(monkeypatch, Fan(3, 2))
    rows = listed(1)
    spread = unit(np.random.default_rng(1).standard_normal(rows.vectors.shape))
    copies = np.repeat(spread[:: ROWS // 20], ROWS // 20, axis=0)
    sizes, many = [], []
    for name, vectors in (("spread", spread), ("copies", copies)):
        with monkeypatch.context() as patch:
            held = noting(patch)
            own = open_store(str(tmp_path / name))
            many.append(len(rejected(own, run(own, replace(rows, vectors=vectors)))))
        sizes.append([len(pickle.dumps(held["CompareRows"][1])), len(pickle.dumps(held["MergePacks"][1]))])
    assert many[0] == 0
    assert many[1] > ROWS / 2
    assert sizes[0] == sizes[1]


def test_requests_and_objects_grow_with_the_rows() -> None:
    """By what the driver would have workers do, where rows are merged. Were they not, it would be 16 times as many."""
    small, large = (requests(rows) for rows in (1 << 24, 1 << 28))
    assert large[0] < 1.6 * small[0] < 0.016
    assert large[1] < 1.6 * small[1] < 0.001
