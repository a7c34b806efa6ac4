"""Near-duplicates and leaks over shards: against all pairs, and whatever the order of work, kills and appended rows."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.curation import near_passes, near_rows
from pipeline.data.curation.rejected import Rejected
from pipeline.data.neighbours import clusters as neighbours
from pipeline.data.pairs.row_index import index_counts
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import Artifact, Shard, artifact_path, read_shards, read_table
from pipeline.graph.stages import Context
from pipeline.graph.workers import ShardTask
from pipeline.ledger import Ledger
from pipeline.store import Store, open_store
from pipeline.store.records import blob_path
from pipeline.upkeep.check import repair_store
from tests.pipeline.data.vectors import SHARD_ROWS, Listed, curate, planted, publish, rejected, unit

BOUND = 0.8
ROWS = 600


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches, blocks, clusters and groups as of a large list, in a short one."""
    for name, value in {"FIRST_ROWS": 100, "BLOCK_ROWS": 60, "CLUSTER_ROWS": 25, "GROUP_ROWS": 50}.items():
        monkeypatch.setattr(near_rows, name, value)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def listed(seed: int = 0, rows: int = ROWS) -> Listed:
    """Every tenth row is held out for validation, every tenth for the test; sides reach different stages."""
    vectors, *_ = planted(rows, 64, rows // 3, seed, 0.7)
    vectors = np.random.default_rng(seed).permutation(vectors)
    splits = ["validation" if i % 10 == 3 else "test" if i % 10 == 7 else "train" for i in range(rows)]
    g = np.random.default_rng(seed)
    return Listed(vectors, splits, [(64, 100, 256, 1024)[i] for i in g.integers(0, 4, rows)])


def all_pairs(rows: Listed) -> dict[str, Rejected]:
    """What curation rejects if it looks at every pair."""
    vectors = rows.vectors.astype(np.float64)
    near = vectors @ vectors.T >= BOUND
    near |= (rows.vectors[:, None] == rows.vectors[None]).all(2)
    splits = np.array(rows.splits)
    sizes = np.searchsorted([64, 256, 1024], rows.sides, side="right")
    keys = rows.row_keys
    found = {}
    for i in range(len(keys)):
        held = np.flatnonzero(near[i] & (splits != "train")) if splits[i] == "train" else []
        twins = np.flatnonzero(near[i, :i] & (splits[:i] == splits[i]) & (sizes[:i] >= sizes[i]))
        if len(held):
            found[keys[i]] = Rejected(keys[i], "near_held_out", keys[held[0]])
        elif len(twins):
            found[keys[i]] = Rejected(keys[i], "near_duplicate", keys[twins[0]])
    return found


def run(store: Store, rows: Listed, workers: int = 0) -> Artifact:
    return curate(store, publish(store, rows), workers, near_duplicate=BOUND, near_held_out=BOUND)


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
    """What the driver holds grows with the blocks and with the groups of clusters, not with their product."""
    held: dict[str, tuple[int, int]] = {}
    original = near_rows.run_pass

    def noting(ctx: Context, worker: object, tasks: list[ShardTask], *rest: str) -> list[Shard]:
        made = original(ctx, worker, tasks, *rest)
        held[type(worker).__name__] = (max(len(t.inputs) for t in tasks), max(len(s.blobs) for s in made))
        return made

    monkeypatch.setattr(near_rows, "run_pass", noting)
    rows = listed()
    found, expected = rejected(store, run(store, rows)), all_pairs(rows)
    assert len(list(store.list("shards/curation/"))) > 100  # it did take many tasks
    assert {row.key for row in found} <= expected.keys()
    assert len(found) >= 0.95 * len(expected)  # of up to 16 clusters rows look in 8
    assert sum(expected[row.key] == row for row in found) >= 0.95 * len(found)
    assert held["CompareRows"][0] == 2  # the table of blocks, and the number of the group
    assert held["ScatterRows"][1] == 1  # all groups of a block


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
    records = {entry.path: json.loads(store.read(entry.path))["blobs"] for entry in store.list("shards/curation/")}
    found = {name: blob for blobs in records.values() for name, blob in blobs.items()}
    for name in ("sample", "clusters", "rows", "block 00000001", "shard 00000000"):
        needed = [path for path, blobs in records.items() if name not in blobs]  # so all that needs it is made again
        store.delete([blob_path(found[name]), artifact_path("curation", expected.key), *needed])
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
    made = []
    for vectors in (rows.vectors, poisoned):
        own = open_store(str(tmp_path / str(len(made))))
        run(own, Listed(vectors, rows.splits, rows.sides))
        records = [json.loads(own.read(entry.path))["blobs"] for entry in own.list("shards/curation/")]
        made.append(sorted(blobs["clusters"] for blobs in records if "clusters" in blobs))
    assert len(made[0]) == 2
    assert made[0] == made[1]
