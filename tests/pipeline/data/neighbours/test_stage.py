from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from pipeline.data.neighbours import indices
from pipeline.data.neighbours.indices import open_index, search
from pipeline.data.neighbours.stage import IndexRecipe, run_index
from pipeline.graph.artifacts import Artifact, read_shards
from pipeline.graph.packs import read_pieces
from pipeline.graph.stages import Stage
from pipeline.store import Store, open_store
from pipeline.store.records import blob_path
from tests.conftest import folder_store
from tests.pipeline.data.vectors import Listed, context, curate, planted, publish

ROWS = 600
store = folder_store


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indices, "FLAT_BLOCK_ROWS", 100)
    monkeypatch.setattr(indices, "CODED_BLOCK_ROWS", 200)


def listed(rows: int = ROWS) -> Listed:
    """Every fifth row is held out; every fiftieth picture is too small, so curation rejects it."""
    vectors, *_ = planted(ROWS, 64, 100, 0, 0.6)
    splits = ["test" if i % 5 == 3 else "train" for i in range(ROWS)]
    return Listed(vectors, splits, [63 if i % 50 == 7 else 64 for i in range(ROWS)]).first(rows)


def make(store: Store, rows: Listed, workers: int = 0, flat_rows: int = 1 << 20) -> Artifact:
    inputs = publish(store, rows)
    inputs["curation"] = curate(store, inputs, near_duplicate=None, near_held_out=None)
    stage = Stage("index", 1, IndexRecipe(flat_rows), ("embeddings", "curation"), run_index)
    return run_index(context(store, stage, inputs, workers))


def blobs(store: Store, index: Artifact) -> list[dict[str, str]]:
    return [dict(shard.blobs) for shard in read_shards(store, index)]


def test_small_indices_answer_as_all_pairs_do(store: Store) -> None:
    rows = listed()
    index = make(store, rows)
    assert index.ledger.kept == ROWS - 12
    assert len(read_shards(store, index)) == 5
    queries = np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32)
    queries[:4] = rows.vectors[[0, 7, 599, 300]]  # the second is of a row that was rejected
    keys = np.array([int(key) for key in rows.row_keys])
    for splits in (("train", "validation", "test"), ("train",), ("test",)):
        there = np.array([side >= 64 and own in splits for side, own in zip(rows.sides, rows.splits, strict=True)])
        cosine = queries.astype(np.float64) @ rows.vectors[there].astype(np.float64).T
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :10]
        similarity, found = search(store, index, queries, 10, splits)
        assert similarity.shape == found.shape == (9, 10)
        np.testing.assert_array_equal(found, keys[there][order])
        np.testing.assert_allclose(similarity, np.take_along_axis(cosine, order, 1), atol=1e-5)
    similarity, found = search(store, index, queries, 10, ("validation",))
    assert (found == -1).all()
    assert (similarity == -np.inf).all()


def test_more_answers_than_rows_and_equal_ones_in_the_order_of_keys(store: Store) -> None:
    vectors = np.repeat(listed().vectors[:1], 30, axis=0)
    index = make(store, Listed(vectors, ["train", "test"] * 15, [64] * 30))
    similarity, found = search(store, index, vectors[:1], 40)
    assert found[0].tolist() == [*range(25), 10_000, 10_001, 10_002, 10_003, 10_004, *[-1] * 10]
    assert np.isfinite(similarity[0, :30]).all()


def test_large_indices_hold_codes_that_find_most(store: Store) -> None:
    rows = listed()
    index = make(store, rows, flat_rows=256)
    trained = {shard.blobs["empty"] for shard in read_shards(store, index)}
    assert all(isinstance(part := open_index(store, blob), faiss.IndexIVFPQ) and part.pq.M == 8 for blob in trained)
    kept = np.array([side >= 64 for side in rows.sides])
    keys = np.array([int(key) for key in rows.row_keys])[kept]
    _, found = search(store, index, rows.vectors[kept].astype(np.float32), 5)
    assert (found == keys[:, None]).any(1).mean() > 0.9


@pytest.mark.parametrize("probes", [1, 3, 32])
def test_lists_that_are_read_answer_as_the_whole_inverted_file_does(
    store: Store, monkeypatch: pytest.MonkeyPatch, probes: int
) -> None:
    monkeypatch.setattr(indices, "LIST_PROBES", probes)
    rows = listed()
    index = make(store, rows, flat_rows=256)
    whole = open_index(store, read_shards(store, index)[0].blobs["empty"])
    kept = np.array([side >= 64 and split == "train" for side, split in zip(rows.sides, rows.splits, strict=True)])
    whole.add_with_ids(
        rows.vectors[kept].astype(np.float32), np.array([int(key) for key in rows.row_keys], np.int64)[kept]
    )
    whole.nprobe = min(probes, whole.nlist)
    for queries in (rows.vectors[:1].astype(np.float32), rows.vectors[:9].astype(np.float32)):
        expected, ids = whole.search(queries, 10)
        similarity, found = search(store, index, queries, 10, ("train",))
        np.testing.assert_allclose(np.where(found < 0, 0, similarity), np.where(ids < 0, 0, expected), atol=1e-6)
        assert [set(row) for row in found.tolist()] == [set(row) for row in ids.tolist()]


def test_a_query_reads_the_lists_that_it_looks_in_and_not_the_index(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted on the store: of 20,000 rows in 128 lists, 4 lists and what says where they lie."""
    monkeypatch.setattr(indices, "CODED_BLOCK_ROWS", 1 << 20)
    vectors, *_ = planted(20_000, 64, 2000, 0, 0.6)
    index = make(store, Listed(vectors, ["train"] * 20_000, [64] * 20_000), flat_rows=256)
    monkeypatch.setattr(indices, "LIST_PROBES", 4)
    [shard] = read_shards(store, index)
    size = store.stat(blob_path(shard.blobs["pack"]))
    read: list[bytes] = []

    def counted(*asked: Any) -> list[bytes]:
        read.extend(pieces := read_pieces(*asked))
        return pieces

    monkeypatch.setattr(indices, "read_pieces", counted)
    search(store, index, vectors[:1].astype(np.float32), 10)
    assert len(read) == 4
    assert size is not None
    assert 0 < sum(map(len, read)) < size.size / 8


@pytest.mark.parametrize("flat_rows", [256, 1 << 20])
def test_the_bytes_do_not_depend_on_who_made_what_when(store: Store, tmp_path: Path, flat_rows: int) -> None:
    whole = make(store, listed(), flat_rows=flat_rows)
    other = open_store(str(tmp_path / "other"))
    make(other, listed(500), flat_rows=flat_rows)
    grown = make(other, listed(), flat_rows=flat_rows)
    assert blobs(other, grown) == blobs(store, whole)
    if flat_rows > 256:  # codes are trained again
        assert grown.times["shards_made"] < whole.times["shards_made"] / 2


def test_nothing_to_index_is_an_empty_index(store: Store) -> None:
    rows = listed(20)
    index = make(store, Listed(rows.vectors, rows.splits, [10] * 20))
    assert index.ledger.rows == 0
    assert (search(store, index, rows.vectors[:1], 3)[1] == -1).all()
