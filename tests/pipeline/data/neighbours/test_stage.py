from pathlib import Path

import faiss
import numpy as np
import pytest

from pipeline.data.neighbours import indices
from pipeline.data.neighbours.indices import open_index, search
from pipeline.data.neighbours.stage import IndexRecipe, run_index
from pipeline.graph.artifacts import Artifact, read_shards
from pipeline.graph.stages import Stage
from pipeline.store import Store, open_store
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
    parts = [open_index(store, blob) for shard in read_shards(store, index) for blob in shard.blobs.values()]
    assert all(isinstance(part, faiss.IndexIVFPQ) and part.pq.M == 8 for part in parts)  # 64 components, 8 a byte
    assert sum(part.ntotal for part in parts) == ROWS - 12
    kept = np.array([side >= 64 for side in rows.sides])
    keys = np.array([int(key) for key in rows.row_keys])[kept]
    _, found = search(store, index, rows.vectors[kept].astype(np.float32), 5)
    assert (found == keys[:, None]).any(1).mean() > 0.9


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
