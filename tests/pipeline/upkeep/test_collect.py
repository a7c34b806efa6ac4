"""Garbage collection keeps what is needed, does not disturb readers and writers meanwhile, and deletes the rest."""

import gzip
import json
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from pipeline.data.embeddings.stage import EmbeddingsRecipe
from pipeline.data.pairs.stage import PairsRecipe
from pipeline.data.source.journal import ListJournal, change_journal, with_forgotten
from pipeline.data.source.stage import Segment, SourceShard, segment_path
from pipeline.errors import UserError
from pipeline.graph.artifacts import (
    Artifact,
    load_artifact,
    publish_artifact,
    publish_shard,
    read_shards,
    write_shard_table,
)
from pipeline.graph.damage import create_record
from pipeline.graph.keys import flatten, trajectory
from pipeline.graph.plan import pin_path, plan
from pipeline.graph.pointer import Move, move_release, read_releases
from pipeline.graph.runs import remember, run_entries
from pipeline.graph.stages import Graph, Stage
from pipeline.ledger import Ledger
from pipeline.parse import ContentFile
from pipeline.store import Store, open_store
from pipeline.store.base import Entry
from pipeline.store.folder import FolderStore
from pipeline.store.leases import lead_or_wait
from pipeline.store.records import blob_path, digest, put_blob, read_blob
from pipeline.store.s3 import S3Store
from pipeline.training.recipes import ClipRecipe
from pipeline.training.records import CheckpointRecord, SavedJournal
from pipeline.upkeep.collect import MOST_UNPACKED, TOMBSTONES, collect
from pipeline.upkeep.roots import find_live

DAY = 86_400.0
NOW = time.time()


AGES: dict[tuple[str, str], float] = {}  # of runs, by store and path


@pytest.fixture(autouse=True)
def _ages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings say that runs are as old as a test wants them: no server lets it set the time of an object."""
    for kind in (FolderStore, S3Store):

        def listed(self: Store, prefix: str, original: Any = kind.list) -> Iterator[Entry]:
            for entry in original(self, prefix):
                yield replace(entry, modified=entry.modified - AGES.get((self.url, entry.path), 0.0))

        monkeypatch.setattr(kind, "list", listed)


def never(_: object) -> Artifact:
    raise AssertionError


def _graph(seed: int = 0) -> Graph:
    recipe = ClipRecipe(samples=64, batch=8, lanes=8, seed=seed)
    return {
        stage.name: stage
        for stage in (Stage("pairs", 1, recipe, (), never), Stage("clip", 1, recipe, ("pairs",), never, "training"))
    }


def _run(
    store: Store,
    seed: int = 0,
    made: tuple[str, ...] = ("pairs", "clip"),
    age_s: float = 0.0,
    forgettings: int = 0,
) -> dict[str, str]:
    """A run that made some of its stages: pairs has two shards, clip a model and a checkpoint. Keys by stage.

    ``age_s``: how long ago it began, by the store's clock. ``forgettings``: of the journal of its plan.
    """
    graph = _graph(seed)
    verdicts = plan(graph, {}, "p", store, {})
    remember(store, "p", graph, verdicts, forgettings=forgettings)
    AGES[store.url, run_entries(store, "p")[-1].path] = age_s
    keys = {verdict.stage: verdict.key for verdict in verdicts}
    shards = [
        publish_shard(store, "pairs", n, f"{seed}-{n}", Ledger(kept=1), {"index": f"{seed} {n}".encode()}, {})
        for n in range(2)
    ]
    if "pairs" in made:
        table, ledger = write_shard_table(store, shards)
        publish_artifact(store, Artifact("pairs", keys["pairs"], {"source": "s"}, {}, ledger, shard_table=table), 1.0)
    folder = trajectory("clip", graph["clip"].version, graph["clip"].recipe, {"pairs": keys["pairs"]})
    blob = put_blob(store, f"state {seed}".encode())
    journal = SavedJournal([{"samples": 64, "preview": put_blob(store, f"preview {seed}".encode())}])
    saved = CheckpointRecord(64, 1, 1.0, {}, journal, {"model": blob})
    create_record(store, f"checkpoints/{folder}/{64:012d}-0001.json", saved)
    if "clip" in made:
        _publish_clip(store, seed, keys, 64)
    return keys


def _publish_clip(store: Store, seed: int, keys: dict[str, str], samples: int, key: str = "") -> None:
    recipe = flatten(_graph(seed)["clip"].recipe) | {"samples": samples}
    blobs = {"model": put_blob(store, f"model {seed} {samples}".encode())}
    blobs["preview.png"] = put_blob(store, f"preview {seed}".encode())
    inputs = {"pairs": keys["pairs"]}
    publish_artifact(store, Artifact("clip", key or keys["clip"], inputs, recipe, Ledger(), blobs), 1.0)


def _paths(store: Store) -> set[str]:
    return {entry.path for entry in store.list("")} - {TOMBSTONES}


def _sweep(store: Store, now: float = NOW, keep_s: float = 30 * DAY, grace_s: float = DAY) -> None:
    """Find, and delete a day later, without anybody at work between."""
    collect(store, keep_s, grace_s, now, delete=True)
    collect(store, keep_s, grace_s, now + grace_s, delete=True)


def _collect_while(store: Store, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Collect a day later, while ``act`` happens once between the look and the deletion."""
    original, seen = type(store).list, []

    def list_and_act(self: Store, prefix: str) -> object:
        if prefix == "blobs/" and not seen:
            seen.append(prefix)
            act()
        return original(self, prefix)

    monkeypatch.setattr(type(store), "list", list_and_act)
    collect(store, 30 * DAY, DAY, NOW + DAY, delete=True)
    assert seen


def lift_when_listed(monkeypatch: pytest.MonkeyPatch, store: Store, *prefixes: str) -> None:
    """Deletes what is listed with one of the prefixes, after it is listed, as another process may."""
    original = type(store).list

    def list_and_delete(self: Store, prefix: str) -> object:
        entries = list(original(self, prefix))
        self.delete([entry.path for entry in entries if prefix in prefixes])
        return iter(entries)

    monkeypatch.setattr(type(store), "list", list_and_delete)


def test_what_recent_runs_made_stays(store: Store) -> None:
    for seed in (0, 1):
        _run(store, seed)
    before = _paths(store)
    _sweep(store)
    assert _paths(store) == before


def test_what_is_pinned_while_gc_looks_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    old = _run(store, 0, age_s=42 * DAY)
    _run(store, 1)
    collect(store, 30 * DAY, DAY, NOW, delete=True)
    pin = json.dumps({"key": old["clip"]}).encode()
    _collect_while(store, monkeypatch, lambda: store.swap(pin_path("lineage"), None, pin))
    assert load_artifact(store, "clip", old["clip"]) is not None
    assert load_artifact(store, "pairs", old["pairs"]) is None


def test_a_pin_that_is_lifted_while_gc_looks_protects_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.swap(pin_path("lineage"), None, json.dumps({"key": "k"}).encode())
    lift_when_listed(monkeypatch, store, "locks/")
    assert not find_live(store, 30 * DAY, NOW).paths


def test_of_an_old_run_stays_what_the_last_one_shares_or_a_pin_names(store: Store) -> None:
    old, pinned, last = (_run(store, seed, age_s=(42 - seed) * DAY) for seed in (0, 1, 2))
    store.swap(pin_path("lineage"), None, json.dumps({"key": pinned["clip"]}).encode())
    dry = collect(store, 30 * DAY, DAY, NOW, delete=False)
    assert dry.garbage["artifacts"].objects == 3
    before = _paths(store)
    _sweep(store)
    after = _paths(store)
    gone = before - after
    assert len([p for p in gone if p.startswith("artifacts/")]) == 3  # both of the old run, and pairs of the pinned
    assert load_artifact(store, "pairs", old["pairs"]) is None
    clip = load_artifact(store, "clip", pinned["clip"])
    assert clip is not None
    assert read_blob(store, clip.blobs["model"]) == b"model 1 64"
    pairs = load_artifact(store, "pairs", last["pairs"])
    assert pairs is not None
    assert [read_blob(store, s.blobs["index"]) for s in read_shards(store, pairs)] == [b"2 0", b"2 1"]
    assert sum(path.startswith("blobs/") for path in after) == 2 + 2 + 1 + 2 + 1  # pinned; shards, table, model, state
    assert not dry.deleted


def test_nothing_is_deleted_before_the_grace_is_over_nor_without_being_asked(store: Store) -> None:
    put_blob(store, b"garbage")
    before = _paths(store)
    for now in (NOW, NOW + DAY - 1):
        assert collect(store, 30 * DAY, DAY, now, delete=True).garbage["blobs"].objects == 1
    assert collect(store, 30 * DAY, DAY, NOW + 2 * DAY, delete=False).garbage["blobs"].objects == 1
    assert _paths(store) == before
    assert collect(store, 30 * DAY, DAY, NOW + DAY, delete=True).deleted["blobs"].objects == 1
    assert _paths(store) == set()


def test_a_run_under_way_and_its_readers_are_not_hurt(store: Store) -> None:
    keys = _run(store, made=())
    in_hand = put_blob(store, b"of a shard that has no record yet")
    collect(store, 30 * DAY, DAY, NOW, delete=True)  # finds that blob to be garbage
    before = _paths(store)
    collect(store, 30 * DAY, DAY, NOW + DAY / 2, delete=True)
    assert _paths(store) == before
    shard = publish_shard(store, "pairs", 2, "2", Ledger(kept=1), {"index": b"of a shard that has no record yet"}, {})
    assert shard.blobs["index"] == in_hand
    collect(store, 30 * DAY, DAY, NOW + DAY, delete=True)
    assert read_blob(store, in_hand)
    assert len(list(store.list("shards/pairs/"))) == 3
    _publish_clip(store, 0, keys, 32, key="milestone")  # of the training that is under way
    _sweep(store, NOW + 2 * DAY)
    assert load_artifact(store, "clip", "milestone") is not None


def test_a_long_training_is_needed_however_old_its_run(store: Store) -> None:
    long = _run(store, 0, made=("pairs",), age_s=40 * DAY)
    _run(store, 1)
    with lead_or_wait(store, long["clip"], 60.0, lambda: False, lambda: "") or pytest.fail("no lease"):
        before = _paths(store)
        _sweep(store)
        assert _paths(store) == before
    _sweep(store)
    assert load_artifact(store, "pairs", long["pairs"]) is None


def test_who_was_not_heard_of_for_days_keeps_nothing(store: Store) -> None:
    """Such as a driver of another machine, of which nobody here can know that it was killed."""
    long = _run(store, 0, made=("pairs",), age_s=40 * DAY)
    _run(store, 1)
    with lead_or_wait(store, long["clip"], 60.0, lambda: False, lambda: "") or pytest.fail("no lease"):
        _sweep(store, NOW + 4 * DAY)
    assert load_artifact(store, "pairs", long["pairs"]) is None


def test_a_run_that_makes_a_few_stages_keeps_no_old_shards_of_the_others(store: Store) -> None:
    """What was forgotten is in them, too."""
    _run(store, 0, age_s=DAY)
    _forget(store, "p")
    graph = _graph(1)
    verdicts = plan(graph, {}, "p", store, {})
    remember(store, "p", graph, verdicts, forgettings=1, wanted=["clip"])
    _sweep(store)
    assert list(store.list("shards/pairs/")) == []
    remember(store, "p", graph, verdicts, forgettings=1)
    publish_shard(store, "pairs", 0, "under-way", Ledger(kept=1), {"index": b"index"}, {})
    _sweep(store)
    assert len(list(store.list("shards/pairs/"))) == 1


def _segment(store: Store, name: str) -> Segment:
    """A list of one shard, whose keys and tables are of this name."""
    refs, captions, hashes = (put_blob(store, f"{what} of {name}".encode()) for what in ("refs", "captions", "hashes"))
    shard = SourceShard(0, digest(["refs", name]), digest(["captions", name]), Ledger(1), refs=refs, captions=captions)
    segment = Segment([shard], [hashes])
    create_record(store, segment_path(digest(name)), segment)
    return segment


def test_an_unfinished_run_keeps_segments_of_its_own_list_and_shards_made_from_them(store: Store) -> None:
    """Those of other lists, and of before a forgetting, go, though other stages under way have shards of them."""
    recipe, names = _graph()["pairs"].recipe, {"source": (), "pairs": ("source",), "embeddings": ("pairs",)}
    graph = {name: Stage(name, 1, recipe, inputs, never) for name, inputs in names.items()}
    remember(store, "p", graph, plan(graph, {}, "p", store, {}), segments=[digest("now")])
    kept, gone = set[str](), {"shards/embeddings/orphan.json"}
    for name in ("now", "then"):
        segment, before = _segment(store, name), _paths(store)
        (listed,) = segment.shards
        publish_shard(store, "pairs", 0, f"p-{name}", Ledger(1), {"a": name.encode()}, {}, {"source": listed.image_key})
        of_pairs = {"pairs 00000000": f"p-{name}", "plan": digest("numbers")}
        publish_shard(store, "embeddings", 0, f"e-{name}", Ledger(1), {"b": f"b {name}".encode()}, {}, of_pairs)
        of_pass = {"judged": f"e-{name}"}
        publish_shard(store, "embeddings", 0, f"j-{name}", Ledger(1), {"c": f"c {name}".encode()}, {}, of_pass)
        made = _paths(store) - before
        assert len(made) == 6
        made |= {segment_path(digest(name)), *map(blob_path, segment.named)}
        (kept if name == "now" else gone).update(made)
    publish_shard(store, "embeddings", 0, "orphan", Ledger(1), {"d": b"d"}, {}, {"pairs": "deleted-long-ago"})
    _sweep(store)
    assert kept <= _paths(store)
    assert not gone & _paths(store)


def test_what_comes_while_it_looks_is_spared(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage of an old run becomes the data of a new one between the look and the deletion."""
    _run(store, 0, age_s=40 * DAY)
    _run(store, 1)
    collect(store, 30 * DAY, DAY, NOW, delete=True)
    _collect_while(store, monkeypatch, lambda: _run(store, 0))
    keys = {verdict.stage: verdict.key for verdict in plan(_graph(0), {}, "p", store, {})}
    pairs = load_artifact(store, "pairs", keys["pairs"])
    assert pairs is not None
    assert [read_blob(store, s.blobs["index"]) for s in read_shards(store, pairs)] == [b"0 0", b"0 1"]


def test_what_was_forgotten_is_not_kept_by_the_runs_of_before(store: Store) -> None:
    old = _run(store, 0, age_s=DAY)
    _forget(store, "p")
    _sweep(store)
    assert load_artifact(store, "pairs", old["pairs"]) is not None  # there is nothing newer yet
    new = _run(store, 1, forgettings=1)
    _sweep(store)
    assert load_artifact(store, "pairs", old["pairs"]) is None
    assert load_artifact(store, "pairs", new["pairs"]) is not None


def _forget(store: Store, project: str) -> None:
    change_journal(store, project, lambda j: with_forgotten(j, [f"mark {j.forgettings}"]))


def test_before_and_after_a_forgetting_is_what_a_run_was_planned_with_whatever_clocks_say(store: Store) -> None:
    """The run of before makes its pairs last of all."""
    old = _run(store, 0, made=())
    _forget(store, "p")
    new = _run(store, 1, forgettings=1, age_s=3 * DAY)
    _run(store, 0)
    _forget(store, "another")  # of which this project knows nothing
    _sweep(store)
    assert load_artifact(store, "pairs", old["pairs"]) is None
    assert load_artifact(store, "pairs", new["pairs"]) is not None


def test_a_release_whose_pairs_were_made_after_a_forgetting_that_its_run_did_not_know_loses_them(store: Store) -> None:
    old = _run(store, 0, made=("clip",))
    _forget(store, "p")
    _run(store, 0)  # goes on, and makes its pairs with what was forgotten
    new = _run(store, 1, forgettings=1)
    kept = {}
    for keys in (old, new):
        _release(store, keys, project="p")
        pairs = load_artifact(store, "pairs", keys["pairs"])
        assert pairs is not None
        kept[keys["pairs"]] = {blob_path(blob) for s in read_shards(store, pairs) for blob in s.blobs.values()}
    last = _run(store, 2, forgettings=1)
    _sweep(store)
    assert not kept[old["pairs"]] & _paths(store)
    assert kept[new["pairs"]] <= _paths(store)
    assert load_artifact(store, "clip", old["clip"]) is not None
    assert load_artifact(store, "clip", last["clip"]) is not None


def _release(
    store: Store, keys: dict[str, str], action: Literal["promote", "rollback"] = "promote", project: str = "released"
) -> set[str]:
    """Make a bundle of a run's clip, with an evaluation, the release; return the names of the evaluation's blobs."""
    bundle = Artifact("bundle", f"bundle-{keys['clip']}", {"clip": keys["clip"]}, {}, Ledger())
    publish_artifact(store, bundle, 1.0)
    blobs = {name: put_blob(store, f"{name} {keys}".encode()) for name in ("evaluation.json", "nearest.png")}
    inputs = {"bundle": bundle.key, "pairs": keys["pairs"]}
    publish_artifact(store, Artifact("evaluation", f"e-{bundle.key}", inputs, {}, Ledger(), blobs), 1.0)
    move = Move(action, bundle.key, f"e-{bundle.key}", NOW)
    move_release(store, project, read_releases(store, project), move)
    return set(map(blob_path, blobs.values()))


def test_a_release_stays_with_all_behind_it_until_it_is_rolled_back(store: Store) -> None:
    old, older, _ = (_run(store, seed, age_s=(42 - seed) * DAY) for seed in (0, 1, 2))
    _release(store, older)
    judged = _release(store, old)
    before = _paths(store)
    _sweep(store)
    gone = before - _paths(store)  # only the run, and the checkpoints that nobody will go on from
    assert {path.partition("/")[0] for path in gone} == {"runs", "checkpoints", "blobs"}
    assert len([path for path in gone if path.startswith("blobs/")]) == 2  # the state of each
    for keys in (old, older):
        pairs, clip = (load_artifact(store, name, keys[name]) for name in ("pairs", "clip"))
        assert pairs is not None
        assert clip is not None
        assert all(read_blob(store, blob) for s in read_shards(store, pairs) for blob in s.blobs.values())
        assert read_blob(store, clip.blobs["model"])

    _release(store, older, "rollback")
    _sweep(store)
    assert load_artifact(store, "pairs", old["pairs"]) is None
    assert load_artifact(store, "bundle", f"bundle-{old['clip']}") is None
    assert load_artifact(store, "evaluation", f"e-bundle-{old['clip']}") is None
    assert not judged & _paths(store)
    assert load_artifact(store, "pairs", older["pairs"]) is not None
    assert load_artifact(store, "evaluation", f"e-bundle-{older['clip']}") is not None


def test_of_a_release_what_was_forgotten_goes_and_models_and_figures_stay(store: Store) -> None:
    old = _run(store, 0, age_s=DAY)
    figures, pictures = sorted(_release(store, old), key=lambda path: b"nearest" in store.read(path))
    pairs, clip = (load_artifact(store, name, old[name]) for name in ("pairs", "clip"))
    assert pairs is not None
    assert clip is not None
    blobs = {blob_path(blob) for shard in read_shards(store, pairs) for blob in shard.blobs.values()}
    _forget(store, "released")
    _forget(store, "p")
    _run(store, 1, forgettings=1)
    _sweep(store, NOW + 2 * DAY)
    assert not (blobs | {pictures, blob_path(clip.blobs["preview.png"])}) & _paths(store)
    assert read_blob(store, clip.blobs["model"])
    assert load_artifact(store, "pairs", old["pairs"]) == pairs
    assert figures in _paths(store)


def test_a_release_that_comes_while_it_looks_is_spared(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody promotes an old bundle between the look and the deletion; the pointer was there before."""
    old, older, _ = (_run(store, seed, age_s=(42 - seed) * DAY) for seed in (0, 1, 2))
    _release(store, older)
    publish_artifact(store, Artifact("bundle", "b", {"clip": old["clip"]}, {}, Ledger()), 1.0)
    collect(store, 30 * DAY, DAY, NOW, delete=True)
    move = Move("promote", "b", "e", NOW)
    _collect_while(store, monkeypatch, lambda: move_release(store, "released", read_releases(store, "released"), move))
    clip = load_artifact(store, "clip", old["clip"])
    assert clip is not None
    assert read_blob(store, clip.blobs["model"]) == b"model 0 64"


def test_rows_to_be_tried_again_stay(store: Store) -> None:
    _run(store)
    blob = put_blob(store, b"rows")
    change_journal(store, "p", lambda _: ListJournal(retries=(blob,)))
    _sweep(store)
    assert read_blob(store, blob) == b"rows"


def test_a_segment_of_the_list_that_comes_while_it_looks_keeps_its_tables(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list is cut again between the look and the deletion, into tables that had been garbage."""
    blobs = {name: put_blob(store, name.encode()) for name in ("refs", "captions", "hashes")}
    collect(store, 30 * DAY, DAY, NOW, delete=True)
    shard = SourceShard(0, "0" * 64, "0" * 64, Ledger(1), refs=blobs["refs"], captions=blobs["captions"])
    segment = Segment([shard], [blobs["hashes"]])
    _collect_while(store, monkeypatch, lambda: create_record(store, "shards/source/segment-s.json", segment))
    assert [read_blob(store, blob) for blob in blobs.values()] == [b"refs", b"captions", b"hashes"]


def test_the_grace_goes_by_the_stores_clock_not_by_this_machines(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.cli import main

    blob = put_blob(store, b"garbage")
    config = tmp_path / "p.yaml"
    config.write_text(f"project: p\npreset: nano\nstore: {store.url}\nsource: {{paths: ['drawings:nano']}}\n")
    collect_it = ["data", "gc", str(config), "--yes"]
    assert main(collect_it) == 0
    ahead = time.time() + 2 * DAY
    monkeypatch.setattr(time, "time", lambda: ahead)
    assert main(collect_it) == 0
    assert read_blob(store, blob) == b"garbage"


def test_files_that_a_recipe_names_stay(store: Store, tmp_path: Path) -> None:
    hosts, head = tmp_path / "hosts.txt", tmp_path / "head.safetensors"
    hosts.write_text("example.org")
    head.write_text("weights")
    pairs = PairsRecipe(deny_hosts=ContentFile.at(str(hosts), "deny_hosts"))
    embeddings = EmbeddingsRecipe(heads={"aesthetic": ContentFile.at(str(head), "heads")})
    recipes = {"pairs": pairs, "embeddings": embeddings}
    graph = {name: Stage(name, 1, recipe, (), never) for name, recipe in recipes.items()}
    remember(store, "p", graph, plan(graph, {}, "p", store, {}))
    blobs = [put_blob(store, file) for file in (hosts, head)]
    _sweep(store)
    assert [read_blob(store, blob) for blob in blobs] == [b"example.org", b"weights"]


def test_two_collections_at_once_are_one_too_many(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put_blob(store, b"garbage")
    from pipeline.upkeep import collect as module

    def meanwhile(*_: object) -> object:
        store.swap(TOMBSTONES, None, b"")
        return original(*_)

    original = module.find_live
    monkeypatch.setattr(module, "find_live", meanwhile)
    with pytest.raises(UserError, match="another collection"):
        collect(store, 30 * DAY, DAY, NOW, delete=True)


DAMAGE = {
    "empty": b"",
    "plain": b"no gzip",
    "half": gzip.compress(b"{}")[:9],
    "no JSON": gzip.compress(b"[1"),
    "number": gzip.compress(b"1"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_with_damaged_marks_the_grace_period_begins_again(
    store: Store, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    blob = put_blob(store, b"garbage")
    collect(store, 30 * DAY, DAY, NOW, delete=True)
    marked = store.stat(TOMBSTONES)
    assert marked is not None
    assert store.swap(TOMBSTONES, marked.version, damage)
    collect(store, 30 * DAY, DAY, NOW + 2 * DAY, delete=True)
    assert "tombstones.json.gz is damaged" in caplog.text
    assert read_blob(store, blob) == b"garbage"
    collect(store, 30 * DAY, DAY, NOW + 4 * DAY, delete=True)
    assert store.stat(blob_path(blob)) is None


def test_marks_that_unpack_to_gibibytes_are_damaged(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Else whoever may write to the store ends every collection, and with it forgetting, for want of memory."""
    blob = put_blob(store, b"garbage")
    spaces = gzip.compress(bytes([32]) * (64 << 20), 1)  # 64 MiB, which JSON passes over
    begin, end = (gzip.compress(data) for data in (f'{{"{blob_path(blob)}": 0.0'.encode(), b"}"))
    store.swap(TOMBSTONES, None, begin + spaces * 24 + end)
    tracemalloc.start()
    try:
        collect(store, 30 * DAY, DAY, NOW, delete=True)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 3 * MOST_UNPACKED
    assert "tombstones.json.gz is damaged" in caplog.text
    assert read_blob(store, blob) == b"garbage"
    collect(store, 30 * DAY, DAY, NOW + DAY, delete=True)
    assert store.stat(blob_path(blob)) is None


def test_half_written_files_of_killed_writers_go(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    _run(store)
    half = tmp_path / "blobs/ab/.abcd.0123456789ab"
    young = tmp_path / "blobs/ab/.abce.0123456789ab"
    for file in (half, young):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half")
    os.utime(half, (NOW - 2 * DAY, NOW - 2 * DAY))
    locks = set(tmp_path.rglob(".*.lock"))
    assert collect(store, 30 * DAY, DAY, NOW, delete=True).abandoned == 1
    assert not half.exists()
    assert young.exists()
    assert locks <= set(tmp_path.rglob(".*.lock"))


def test_a_damaged_checkpoint_stays_where_it_is(store: Store) -> None:
    """Another machine may be able to read it."""
    _run(store)
    (path,) = (entry.path for entry in store.list("checkpoints/"))
    store.delete([path])
    store.create(path, b"{")
    blobs = set(store.list("blobs/"))
    _sweep(store)
    assert store.read(path) == b"{"
    assert not list(store.list("damaged/"))
    assert set(store.list("blobs/")) == blobs  # any of them may be the checkpoint's
