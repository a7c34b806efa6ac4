from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from pipeline.data.neighbours import indices, inverted_files
from pipeline.data.neighbours.indices import search
from pipeline.data.neighbours.inverted_files import open_index
from pipeline.data.neighbours.stage import IndexRecipe, run_index
from pipeline.data.neighbours.work import groups_of, lists_of
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import Artifact, Shard, read_shard, read_shards
from pipeline.graph.stages import Stage
from pipeline.store import Store, open_store
from pipeline.store.records import blob_path
from pipeline.upkeep.repair import find_namers, quarantine
from tests.conftest import folder_store
from tests.pipeline.data.vectors import CountedStore, Listed, context, curate, planted, publish

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
    trained = open_index(store, index.blobs["empty"])
    assert isinstance(trained, faiss.IndexIVFPQ)
    assert trained.pq.M == 8
    assert index.ledger.kept == ROWS - 12
    assert len(read_shards(store, index)) == 3  # as many as blocks, each with some of the lists of all blocks
    kept = np.array([side >= 64 for side in rows.sides])
    keys = np.array([int(key) for key in rows.row_keys])[kept]
    _, found = search(store, index, rows.vectors[kept].astype(np.float32), 5)
    assert (found == keys[:, None]).any(1).mean() > 0.9


@pytest.mark.parametrize("probes", [1, 3, 32])
@pytest.mark.parametrize("splits", [("train",), ("train", "test"), ("validation",)])
def test_lists_that_are_read_answer_as_the_whole_inverted_file_does(
    store: Store, monkeypatch: pytest.MonkeyPatch, splits: tuple[str, ...], probes: int
) -> None:
    """The whole one has all centroids and all rows."""
    monkeypatch.setattr(inverted_files, "GROUP_PROBES", probes)
    monkeypatch.setattr(inverted_files, "SEARCHED_GROUPS", probes)
    monkeypatch.setattr(inverted_files, "LIST_PROBES", probes)
    rows = listed()
    index = make(store, rows, flat_rows=256)
    [whole] = [open_index(store, shard.blobs["trained"]) for shard in passed(store) if "trained" in shard.blobs]
    kept = np.array([side >= 64 and split in splits for side, split in zip(rows.sides, rows.splits, strict=True)])
    keys = np.array([int(key) for key in rows.row_keys], np.int64)[kept]
    whole.add_with_ids(rows.vectors[kept].astype(np.float32), keys)
    whole.nprobe = min(probes, whole.nlist)
    for queries in (rows.vectors[:1].astype(np.float32), rows.vectors[:9].astype(np.float32)):
        expected, ids = whole.search(queries, 10)
        similarity, found = search(store, index, queries, 10, splits)
        np.testing.assert_allclose(np.where(found < 0, 0, similarity), np.where(ids < 0, 0, expected), atol=1e-6)
        assert [set(row) for row in found.tolist()] == [set(row) for row in ids.tolist()]


def passed(store: Store) -> list[Shard]:
    """The shards of all passes."""
    names = [entry.path.rpartition("/")[2].removesuffix(".json") for entry in store.list("shards/index/")]
    return [shard for name in names if (shard := read_shard(store, "index", name))]


class MeasuredStore(CountedStore):
    """A store that notes also how many bytes were read at each request."""

    def __init__(self, store: Store):
        super().__init__(store)
        self.sizes: list[int] = []

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        data = super().read(path, start, stop)
        self.sizes.append(len(data))
        return data


def query_bytes(rows: int, dim: int, groups_read: int, lists_read: int) -> float:
    """By arithmetic, what a search for one vector reads: the index without rows, groups of centroids, and lists."""
    lists = lists_of(rows)
    groups = groups_of(lists)
    trained = 4 * dim * (groups + 256)
    return trained + groups_read / groups * lists * (2 * dim + 8) + lists_read / lists * rows * (dim / 8 + 8)


def test_a_query_reads_the_lists_that_it_looks_in_whatever_the_number_of_blocks(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted on the store: of 20,000 rows in 128 lists 4 lists, of 22 groups of centroids 4, and where these lie."""
    monkeypatch.setattr(inverted_files, "SEARCHED_GROUPS", 4)
    monkeypatch.setattr(inverted_files, "LIST_PROBES", 4)
    vectors, *_ = planted(20_000, 64, 2000, 0, 0.6)
    inputs = publish(store, Listed(vectors, ["train"] * 20_000, [64] * 20_000))
    inputs["curation"] = curate(store, inputs, near_duplicate=None, near_held_out=None)
    measured = []
    for version, block_rows in enumerate((1 << 20, 2_000)):
        monkeypatch.setattr(indices, "CODED_BLOCK_ROWS", block_rows)
        stage = Stage("index", version, IndexRecipe(256), ("embeddings", "curation"), run_index)
        index = run_index(context(store, stage, inputs))
        assert len(read_shards(store, index)) == -(-20_000 // block_rows)
        counted: Any = MeasuredStore(store)
        search(counted, index, vectors[:1].astype(np.float32), 10)
        tables = {blob_path(str(index.shard_table))}
        reads = [size for path, size in zip(counted.read_paths, counted.sizes, strict=True) if path not in tables]
        assert len(reads) == 1 + 2 * (4 + 4)  # the trained index, and two for each group and list
        measured.append(sum(reads))
    assert measured[0] == measured[1]
    assert 0.5 < measured[0] / query_bytes(20_000, 64, 4, 4) < 1.5


@pytest.mark.parametrize("rows", [1 << 20, 4_000_000, 64_000_000, 379_000_000, 650_000_000])
def test_a_query_of_hundreds_of_millions_of_rows_reads_less_than_50_mb(rows: int) -> None:
    assert query_bytes(rows, 768, inverted_files.SEARCHED_GROUPS, inverted_files.LIST_PROBES) < 50e6


def test_damage_to_a_list_that_is_read_names_its_object(store: Store) -> None:
    rows = listed()
    index = make(store, rows, flat_rows=256)
    for blob in (index.blobs["centroids"], read_shards(store, index)[1].blobs["pack"]):
        path = blob_path(blob)
        whole = store.read(path)
        for data in (whole[:-1] + bytes([whole[-1] ^ 1]), b"\0" + whole[1:]):
            store.delete([path])
            store.create(path, data)
            with pytest.raises(CorruptObject, match=path):
                search(store, index, rows.vectors.astype(np.float32), 10)
        store.delete([path])
        store.create(path, whole)


@pytest.mark.parametrize("name", ["empty", "centroids", "pack"])
def test_a_damaged_index_is_made_again_with_the_pass_that_made_it(store: Store, name: str) -> None:
    rows = listed()
    index = make(store, rows, flat_rows=256)
    path = blob_path({**read_shards(store, index)[1].blobs, **index.blobs}[name])
    whole = store.read(path)
    namers, _ = find_namers(store, [path])
    quarantine(store, [path, *namers[path]])
    assert make(store, rows, flat_rows=256).blobs == index.blobs
    assert store.read(path) == whole


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
