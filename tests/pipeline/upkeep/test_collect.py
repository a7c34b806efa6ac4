"""Garbage collection keeps what is needed, does not disturb readers and writers meanwhile, and deletes the rest."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.embeddings.stage import EmbeddingsRecipe
from pipeline.data.pairs.recipe import PairsRecipe
from pipeline.data.source.journal import ListJournal, change_journal
from pipeline.data.source.segments import Segment, SourceShard, segment_path
from pipeline.graph.artifacts import Artifact, load_artifact, publish_artifact, publish_shard
from pipeline.graph.leases import lead_or_wait
from pipeline.graph.plan import pin_path, plan
from pipeline.graph.runs import record_run
from pipeline.graph.stages import Stage
from pipeline.ledger import Ledger
from pipeline.parse import ContentFile
from pipeline.release.pointer import Move, move_release, read_releases
from pipeline.store import Store, open_store
from pipeline.store.records import blob_path, create_record, digest, put_blob, read_blob
from pipeline.upkeep.roots import find_live
from tests.pipeline.upkeep.runs import (
    DAY,
    NOW,
    forget,
    indices,
    lift_when_listed,
    look,
    model,
    never,
    paths,
    publish_clip,
    release,
    rows,
    run,
    sweep,
    there,
    two_stages,
)


def collect_while(store: Store, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Collect a day later, while ``act`` happens once between the look and the deletion."""
    original = type(store).list
    seen: list[Any] = []

    def list_and_act(self: Store, prefix: str) -> object:
        if prefix == "blobs/" and not seen:
            seen.append(prefix)
            act()
        return original(self, prefix)

    monkeypatch.setattr(type(store), "list", list_and_act)
    look(store, NOW + DAY)
    assert seen


def test_what_is_pinned_while_gc_looks_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    old = run(store, 0, age_s=42 * DAY)
    run(store, 1)
    look(store)
    pin = json.dumps({"key": old["clip"]}).encode()
    collect_while(store, monkeypatch, lambda: store.swap(pin_path("lineage"), None, pin))
    assert there(store, old, "clip")
    assert not there(store, old)


def test_a_pin_that_is_lifted_while_gc_looks_protects_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.swap(pin_path("lineage"), None, json.dumps({"key": "k"}).encode())
    lift_when_listed(monkeypatch, store, "locks/")
    assert not find_live(store, 30 * DAY, NOW).paths


def test_of_an_old_run_stays_what_the_last_one_shares_or_a_pin_names(make_store: Callable[[], Store]) -> None:
    store = make_store()
    old, pinned, last = (run(store, seed, age_s=(42 - seed) * DAY) for seed in (0, 1, 2))
    store.swap(pin_path("lineage"), None, json.dumps({"key": pinned["clip"]}).encode())
    dry = look(store, delete=False)
    assert dry.garbage["artifacts"].objects == 3
    before = paths(store)
    sweep(store)
    after = paths(store)
    assert sum(p.startswith("artifacts/") for p in before - after) == 3  # both of the old run, and pairs of the pinned
    assert not there(store, old)
    assert model(store, pinned) == b"model 1 64"
    assert indices(store, last) == [b"2 0", b"2 1"]
    assert sum(path.startswith("blobs/") for path in after) == 2 + 2 + 1 + 2 + 1  # pinned; shards, table, model, state
    assert not dry.deleted


def test_a_run_under_way_and_its_readers_are_not_hurt(store: Store) -> None:
    keys = run(store, made=())
    in_hand = put_blob(store, b"of a shard that has no record yet")
    look(store)  # finds that blob to be garbage
    before = paths(store)
    look(store, NOW + DAY / 2)
    assert paths(store) == before
    shard = publish_shard(store, "pairs", 2, "2", Ledger(kept=1), {"index": b"of a shard that has no record yet"}, {})
    assert shard.blobs["index"] == in_hand
    look(store, NOW + DAY)
    assert read_blob(store, in_hand)
    assert len(list(store.list("shards/pairs/"))) == 3
    publish_clip(store, 0, keys, 32, key="milestone")  # of the training that is under way
    sweep(store, NOW + 2 * DAY)
    assert load_artifact(store, "clip", "milestone") is not None


def test_what_a_run_of_today_finds_made_outlives_another_configuration(store: Store) -> None:
    """A model of two months ago, which a run finds today, is needed, though it is not the project's last any more."""
    old, graph = run(store, 0, age_s=60 * DAY), two_stages(0)
    record_run(store, "p", graph, plan(graph, {}, "p", store, {}), repeated=True)
    run(store, 1)
    sweep(store)
    assert model(store, old) == b"model 0 64"


def test_a_long_training_is_needed_however_old_its_run(store: Store) -> None:
    """As is all that a recent run has made."""
    long = run(store, 0, made=("pairs",), age_s=40 * DAY)
    run(store, 1)
    with lead_or_wait(store, long["clip"], 60.0, lambda: False, lambda: "") or pytest.fail("no lease"):
        before = paths(store)
        sweep(store)
        assert paths(store) == before
        # Who was not heard of for days keeps nothing, such as a driver of another machine that was killed.
        sweep(store, NOW + 4 * DAY)
        assert not there(store, long)


def test_a_run_that_makes_a_few_stages_keeps_no_old_shards_of_the_others(store: Store) -> None:
    """What was forgotten is in them, too."""
    run(store, 0, age_s=DAY)
    forget(store, "p")
    graph = two_stages(1)
    verdicts = plan(graph, {}, "p", store, {})
    record_run(store, "p", graph, verdicts, forgettings=1, wanted=["clip"])
    sweep(store)
    assert list(store.list("shards/pairs/")) == []
    record_run(store, "p", graph, verdicts, forgettings=1)
    publish_shard(store, "pairs", 0, "under-way", Ledger(kept=1), {"index": b"index"}, {})
    sweep(store)
    assert len(list(store.list("shards/pairs/"))) == 1


def _segment(store: Store, name: str) -> Segment:
    """A list of one shard, whose keys and tables are of this name."""
    refs, captions, hashes = (put_blob(store, f"{what} of {name}".encode()) for what in ("refs", "captions", "hashes"))
    shard = SourceShard(0, digest(["refs", name]), digest(["captions", name]), Ledger(1), refs=refs, captions=captions)
    return Segment([shard], [hashes])


def test_an_unfinished_run_keeps_segments_of_its_own_list_and_shards_made_from_them(store: Store) -> None:
    """Those of other lists, and of before a forgetting, go, though other stages under way have shards of them."""
    recipe, names = two_stages()["pairs"].recipe, {"source": (), "pairs": ("source",), "embeddings": ("pairs",)}
    graph = {name: Stage(name, 1, recipe, inputs, never) for name, inputs in names.items()}
    record_run(store, "p", graph, plan(graph, {}, "p", store, {}), segments=[digest("now")])
    kept, gone = set[str](), {"shards/embeddings/orphan.json"}
    for name in ("now", "then"):
        segment = _segment(store, name)
        create_record(store, segment_path(digest(name)), segment)
        before = paths(store)
        (listed,) = segment.shards
        publish_shard(store, "pairs", 0, f"p-{name}", Ledger(1), {"a": name.encode()}, {}, {"source": listed.image_key})
        of_pairs = {"pairs 00000000": f"p-{name}", "plan": digest("numbers")}
        publish_shard(store, "embeddings", 0, f"e-{name}", Ledger(1), {"b": f"b {name}".encode()}, {}, of_pairs)
        of_pass = {"judged": f"e-{name}"}
        publish_shard(store, "embeddings", 0, f"j-{name}", Ledger(1), {"c": f"c {name}".encode()}, {}, of_pass)
        made = paths(store) - before
        assert len(made) == 6
        made |= {segment_path(digest(name)), *map(blob_path, segment.named)}
        (kept if name == "now" else gone).update(made)
    publish_shard(store, "embeddings", 0, "orphan", Ledger(1), {"d": b"d"}, {}, {"pairs": "deleted-long-ago"})
    sweep(store)
    assert kept <= paths(store)
    assert not gone & paths(store)


def test_what_comes_while_it_looks_is_spared(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage of an old run becomes the data of a new one between the look and the deletion."""
    keys = run(store, 0, age_s=40 * DAY)
    run(store, 1)
    look(store)
    collect_while(store, monkeypatch, lambda: run(store, 0))
    assert indices(store, keys) == [b"0 0", b"0 1"]


def test_what_was_forgotten_is_not_kept_by_the_runs_of_before(store: Store) -> None:
    old = run(store, 0, age_s=DAY)
    forget(store, "p")
    sweep(store)
    assert there(store, old)  # there is nothing newer yet
    new = run(store, 1, forgettings=1)
    sweep(store)
    assert not there(store, old)
    assert there(store, new)


def test_before_and_after_a_forgetting_is_what_a_run_was_planned_with_whatever_clocks_say(store: Store) -> None:
    """The run of before makes its pairs last of all."""
    old = run(store, 0, made=())
    forget(store, "p")
    new = run(store, 1, forgettings=1, age_s=3 * DAY)
    run(store, 0)
    forget(store, "another")  # of which this project knows nothing
    sweep(store)
    assert not there(store, old)
    assert there(store, new)


def test_a_release_loses_rows_forgotten_while_it_was_made(store: Store) -> None:
    old = run(store, 0, made=("clip",))
    forget(store, "p")
    run(store, 0)  # goes on, and makes its pairs with what was forgotten
    new = run(store, 1, forgettings=1)
    for keys in (old, new):
        release(store, keys, project="p")
    forgotten, kept = ({*rows(store, keys).values()} for keys in (old, new))
    last = run(store, 2, forgettings=1)
    sweep(store)
    assert not forgotten & paths(store)
    assert kept <= paths(store)
    assert there(store, old, "clip")
    assert there(store, last, "clip")


def test_a_release_stays_with_all_behind_it_until_it_is_rolled_back(store: Store) -> None:
    old, older, _ = (run(store, seed, age_s=(42 - seed) * DAY) for seed in (0, 1, 2))
    release(store, older)
    judged = release(store, old)
    before = paths(store)
    sweep(store)
    gone = before - paths(store)  # only the run, and the checkpoints that nobody will go on from
    assert {path.partition("/")[0] for path in gone} == {"runs", "checkpoints", "blobs"}
    assert len([path for path in gone if path.startswith("blobs/")]) == 2  # the state of each
    for keys in (old, older):
        assert all(indices(store, keys))
        assert model(store, keys)

    release(store, older, "rollback")
    sweep(store)
    assert not there(store, old)
    assert load_artifact(store, "bundle", f"bundle-{old['clip']}") is None
    assert load_artifact(store, "evaluation", f"e-bundle-{old['clip']}") is None
    assert not judged & paths(store)
    assert there(store, older)
    assert load_artifact(store, "evaluation", f"e-bundle-{older['clip']}") is not None


def test_of_a_release_what_was_forgotten_goes_and_models_and_figures_stay(store: Store) -> None:
    old = run(store, 0, age_s=DAY)
    figures, pictures = sorted(release(store, old), key=lambda path: b"nearest" in store.read(path))
    pairs, clip = (load_artifact(store, name, old[name]) for name in ("pairs", "clip"))
    gone = {*rows(store, old).values(), pictures, blob_path(clip.blobs["preview.png"])}
    forget(store, "released")
    forget(store, "p")
    run(store, 1, forgettings=1)
    sweep(store, NOW + 2 * DAY)
    assert not gone & paths(store)
    assert model(store, old)
    assert load_artifact(store, "pairs", old["pairs"]) == pairs
    assert figures in paths(store)


def test_a_release_that_comes_while_it_looks_is_spared(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody promotes an old bundle between the look and the deletion; the pointer was there before."""
    old, older, _ = (run(store, seed, age_s=(42 - seed) * DAY) for seed in (0, 1, 2))
    release(store, older)
    publish_artifact(store, Artifact("bundle", "b", {"clip": old["clip"]}, {}, Ledger()), 1.0)
    look(store)
    move = Move("promote", "b", "e", NOW)
    collect_while(store, monkeypatch, lambda: move_release(store, "released", read_releases(store, "released"), move))
    assert model(store, old) == b"model 0 64"


def test_rows_to_be_tried_again_stay(store: Store) -> None:
    run(store)
    blob = put_blob(store, b"rows")
    change_journal(store, "p", lambda _: ListJournal(retries=(blob,)))
    sweep(store)
    assert read_blob(store, blob) == b"rows"


def test_a_segment_of_the_list_that_comes_while_it_looks_keeps_its_tables(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list is cut again between the look and the deletion, into tables that had been garbage."""
    segment = _segment(store, "s")
    look(store)
    collect_while(store, monkeypatch, lambda: create_record(store, "shards/source/segment-s.json", segment))
    assert [store.stat(blob_path(blob)) is None for blob in segment.named] == [False] * 3


def test_files_that_a_recipe_names_stay(store: Store, tmp_path: Path) -> None:
    hosts, head = tmp_path / "hosts.txt", tmp_path / "head.safetensors"
    hosts.write_text("example.org")
    head.write_text("weights")
    pairs = PairsRecipe(deny_hosts=ContentFile.at(str(hosts), "deny_hosts"))
    embeddings = EmbeddingsRecipe(heads={"aesthetic": ContentFile.at(str(head), "heads")})
    recipes = {"pairs": pairs, "embeddings": embeddings}
    graph = {name: Stage(name, 1, recipe, (), never) for name, recipe in recipes.items()}
    record_run(store, "p", graph, plan(graph, {}, "p", store, {}))
    blobs = [put_blob(store, file) for file in (hosts, head)]
    sweep(store)
    assert [read_blob(store, blob) for blob in blobs] == [b"example.org", b"weights"]


def test_half_written_files_of_killed_writers_go(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    run(store)
    half = tmp_path / "blobs/ab/.abcd.0123456789ab"
    young = tmp_path / "blobs/ab/.abce.0123456789ab"
    for file in (half, young):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half")
    os.utime(half, (NOW - 2 * DAY, NOW - 2 * DAY))
    locks = set(tmp_path.rglob(".*.lock"))
    assert look(store).abandoned == 1
    assert not half.exists()
    assert young.exists()
    assert locks <= set(tmp_path.rglob(".*.lock"))


def test_a_damaged_checkpoint_stays_where_it_is(store: Store) -> None:
    """Another machine may be able to read it."""
    run(store)
    (path,) = (entry.path for entry in store.list("checkpoints/"))
    store.delete([path])
    store.create(path, b"{")
    blobs = set(store.list("blobs/"))
    sweep(store)
    assert store.read(path) == b"{"
    assert not list(store.list("damaged/"))
    assert set(store.list("blobs/")) == blobs  # any of them may be the checkpoint's
