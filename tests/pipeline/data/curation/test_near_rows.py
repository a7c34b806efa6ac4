"""Near-duplicates and leaks over shards: against all pairs, and whatever the order of work, kills and appended rows."""

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.curation import near_passes
from pipeline.data.neighbours import clusters as neighbours
from pipeline.data.neighbours.exchange import Fan
from pipeline.data.pairs.row_index import index_counts
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import Artifact, artifact_path, read_shards, read_table
from pipeline.ledger import Ledger
from pipeline.store import Store, open_store
from pipeline.store.records import blob_path
from pipeline.upkeep.check import repair_store
from tests.conftest import folder_store
from tests.pipeline.data.curation.near import BOUND, ROWS, all_pairs, cut_small, listed, noting, run
from tests.pipeline.data.vectors import SHARD_ROWS, Listed, curate, publish, rejected, unit

store = folder_store


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches, blocks, clusters, groups and merges as of a large list, in a short one."""
    cut_small(monkeypatch, Fan(3, 2))


def blobs(store: Store, artifact: Artifact) -> list[dict[str, str]]:
    return [dict(shard.blobs) for shard in read_shards(store, artifact)]


def test_embeddings_without_pictures_are_curated_as_pictures_of_one_size(store: Store, tmp_path: Path) -> None:
    rows = listed()
    same = run(open_store(str(tmp_path / "same")), replace(rows, sides=[64] * ROWS))
    found = run(store, replace(rows, sides=[None] * ROWS))
    assert rejected(store, found) == rejected(open_store(str(tmp_path / "same")), same) != []


def test_a_list_of_which_no_row_is_left_has_no_near_rows(store: Store) -> None:
    rows = replace(listed(rows=60), sides=[16] * 60)
    assert run(store, rows).ledger == Ledger(rejected={"too_small": 60})


def test_a_short_list_is_curated_exactly(store: Store) -> None:
    rows = listed()
    made = run(store, rows)
    expected, keys = all_pairs(rows), rows.row_keys
    assert {row.key: row for row in rejected(store, made)} == expected
    assert len({row.reason for row in expected.values()}) == 2
    assert made.ledger.kept == ROWS - len(expected)
    for shard in read_shards(store, made):
        left = read_table(store, shard.blobs["index"]).to_pylist()
        own = [key for key in keys if key.startswith(f"{shard.number:08d}") and key not in expected]
        assert [row["key"] for row in left] == own
        assert shard.counts == index_counts(left)
        assert shard.kept == len(left)


@pytest.mark.usefixtures("small")
def test_a_long_list_is_curated_by_clusters(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """No task names as many others as there are blocks or groups of clusters, and none reads as many packs."""
    held = noting(monkeypatch)
    rows = listed()
    found, expected = rejected(store, run(store, rows)), all_pairs(rows)
    assert len(list(store.list("shards/curation/"))) > 100  # it did take many tasks
    assert {row.key for row in found} <= expected.keys()
    assert len(found) >= 0.95 * len(expected)  # of up to 16 clusters rows look in 8
    assert sum(expected[row.key] == row for row in found) >= 0.95 * len(found)
    for worker in ("ScatterRows", "MergePacks", "CompareRows"):
        tasks, made = held[worker]
        assert tasks
        assert {len(shard.blobs) for shard in made} == {1}
        read = [part.blobs["packs"] for task in tasks for part in task.inputs.values() if "packs" in part.blobs]
        assert all(len(read_table(store, table)) <= 3 for table in read)
        assert worker == "ScatterRows" or max(len(task.inputs) for task in tasks) <= 2


@pytest.mark.usefixtures("small")
def test_rows_that_are_appended_take_nothing_away_but_leaks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """In clusters that miss many pairs, so that a pair which is found only later would show."""
    monkeypatch.setattr(near_passes, "PROBES", 1)
    rows = listed(4)
    keys = rows.row_keys
    lengths = (80, 110, 400, 580, ROWS)
    found = [{row.key: row for row in rejected(store, run(store, rows.first(length)))} for length in lengths]
    assert len(found[-1]) < 0.9 * len(all_pairs(rows))
    for (length, first), (_, later) in pairwise(zip(lengths, found, strict=True)):
        both = {key: row for key, row in later.items() if key in keys[:length]}
        assert first.keys() <= both.keys()
        moved = [row for key, row in both.items() if first.get(key) != row]
        assert all(row.reason == "near_held_out" and row.near in keys[length:] for row in moved)
    assert len({row.reason for row in found[2].values()}) == 2


@pytest.mark.usefixtures("small")
def test_appended_training_rows_leave_the_shards_before_as_they_are(store: Store) -> None:
    rows = listed(5)
    before = 20 * SHARD_ROWS
    splits = [split if i < before else "train" for i, split in enumerate(rows.splits)]
    rows = Listed(rows.vectors, splits, rows.sides)
    first, later = (run(store, part) for part in (rows.first(before), rows))
    old, new = ([(s.key, s.blobs) for s in read_shards(store, artifact)] for artifact in (first, later))
    assert new[:20] == old
    assert later.times["shards_made"] == len(new) - len(old)


@pytest.mark.usefixtures("small")
def test_kills_change_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is killed after its tenth shard, in whatever pass, until one has less to do."""
    rows = listed(6, 300)
    calm = open_store(str(tmp_path / "calm"))
    expected = run(calm, rows)
    inputs = publish(store, rows)
    left, kills = [0], 0

    def die(point: str, about: str) -> None:
        left[0] -= point == "shard.after_record"
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.graph.artifacts.crash_point", die)
    while True:
        left[0] = 10
        try:
            made = curate(store, inputs, near_duplicate=BOUND, near_held_out=BOUND)
            break
        except KeyboardInterrupt:
            kills += 1
            assert len(list(store.list("shards/curation/"))) == 10 * kills
    assert kills >= 5
    assert blobs(store, made) == blobs(calm, expected)
    assert {e.path for e in store.list("shards/curation/")} == {e.path for e in calm.list("shards/curation/")}


@pytest.mark.usefixtures("small")
def test_what_a_pass_has_left_and_is_lost_is_made_again(store: Store) -> None:
    inputs = publish(store, listed(6, 200))
    bounds = {"near_duplicate": BOUND, "near_held_out": BOUND}
    expected = curate(store, inputs, **bounds)
    passes: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(dict)  # by the kinds of their inputs
    for entry in store.list("shards/curation/"):
        record = json.loads(store.read(entry.path))
        kinds = tuple(sorted({name.partition(" ")[0] for name in record["inputs"]}))
        passes[kinds][entry.path] = list(record["blobs"].values())
    near = [kind for kind in passes if kind not in (("captions", "embeddings", "pairs"), ("judged", "near"))]
    assert len(near) == 6  # samples and rows without clusters, clusters, rows, merges, comparisons, verdicts
    for kind in near:
        needed = [path for other, made in passes.items() if other != kind for path in made]  # so they are made again
        kept = {blob for other in near if other != kind for made in passes[other].values() for blob in made}
        lost = next(blob for made in passes[kind].values() for blob in made if blob not in kept)
        store.delete([blob_path(lost), artifact_path("curation", expected.key), *needed])
        with pytest.raises(CorruptObject, match="is missing") as damage:
            curate(store, inputs, **bounds)
        repair_store(store, "p", 0, [damage.value.path])
        assert blobs(store, curate(store, inputs, **bounds)) == blobs(store, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    import ray

    rows = listed(7)
    made = []
    try:
        for workers in (0, 1, 3):
            own = open_store(str(tmp_path / f"{workers}"))
            artifact = run(own, rows, workers)
            made.append((artifact.shard_table, blobs(own, artifact)))
    finally:
        ray.shutdown()
    assert made[0] == made[1] == made[2]


def test_a_million_equal_pictures_would_be_compared_once(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    """A cluster of one picture: pairs that are held grow with distinct vectors, not with rows."""
    vectors = np.repeat(unit(np.random.default_rng(0).standard_normal((2, 16))), 150, axis=0)
    monkeypatch.setattr(neighbours, "PAIRS", 4)  # 300 queries among 300 places would be 300 searches
    searches = []
    original = neighbours._near_pairs

    def counting(*arguments: object) -> object:
        for block in original(*arguments):
            searches.append(block)
            yield block

    monkeypatch.setattr(neighbours, "_near_pairs", counting)
    made = run(store, Listed(vectors, ["train"] * 300, [64] * 300))
    assert len(searches) == 1
    assert made.ledger.kept == 2
    assert {row.near for row in rejected(store, made)} == {"000000000000", "000000060000"}


def test_rules_one_by_one(store: Store) -> None:
    a, b, c, d = unit(np.random.default_rng(1).standard_normal((4, 32)))
    nan = np.full(32, np.nan, np.float16)
    cases = [  # vector, split, side, how it ends, and by which row
        (a, "train", 256, None, None),
        (a, "train", 1024, None, None),  # teaches what the first cannot
        (a, "train", 300, "near_duplicate", 0),
        (b, "test", 64, None, None),
        (b, "test", 64, "near_duplicate", 3),
        (b, "validation", 64, None, None),  # held-out splits are let alone by each other
        (b, "train", 64, "near_held_out", 3),
        (b, "train", 64, "near_held_out", 3),  # counts as a leak first
        (c, "train", 1024, "near_held_out", 9),  # of a later row
        (c, "validation", 64, None, None),  # training rows remove no held-out one
        (d, "train", 64, None, None),
        (nan, "train", 64, None, None),
        (nan, "test", 64, None, None),
        (nan, "train", 64, None, None),
    ]
    vectors, splits, sides, *_ = zip(*cases, strict=True)
    made = run(store, Listed(np.stack(vectors), splits, sides))
    found = {int(row.key): (row.reason, int(row.near or "-1")) for row in rejected(store, made)}
    assert found == {i: case[3:] for i, case in enumerate(cases) if case[3]}


@pytest.mark.usefixtures("small")
def test_no_held_out_row_teaches_the_clusters(tmp_path: Path) -> None:
    rows = listed(8, 400)
    poisoned = rows.vectors.copy()
    poisoned[[split != "train" for split in rows.splits]] = np.nan
    made: list[Any] = []
    for vectors in (rows.vectors, poisoned):
        own = open_store(str(tmp_path / str(len(made))))
        run(own, Listed(vectors, rows.splits, rows.sides))
        records = [json.loads(own.read(entry.path))["blobs"] for entry in own.list("shards/curation/")]
        made.append(sorted(blobs["clusters"] for blobs in records if "clusters" in blobs))
    assert len(made[0]) == 2
    assert made[0] == made[1]
