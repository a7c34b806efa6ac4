"""A check finds what is damaged; a repair quarantines it, unless a pin, a release or a list names it."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.pairs.row_index import Place, read_images
from pipeline.data.source.journal import change_journal, journal_path
from pipeline.data.source.segments import Segment
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import (
    SEGMENTS,
    Artifact,
    Shard,
    artifact_path,
    load_artifact,
    publish_artifact,
    read_shards,
    shard_path,
)
from pipeline.graph.packs import read_pieces, write_pack
from pipeline.graph.plan import pin_path, plan, read_pin
from pipeline.graph.runs import record_run
from pipeline.ledger import Ledger
from pipeline.release.pointer import Move, Releases, move_release, read_releases, release_path
from pipeline.store import Store, open_store
from pipeline.store.records import blob_path, create_record, peek_record, put_blob, read_blob, read_record
from pipeline.upkeep.check import Damage, repair_store, verify_store
from pipeline.upkeep.collect import collect
from pipeline.upkeep.repair import protected_objects, quarantine
from tests.flips import flip_first_reads
from tests.pipeline.upkeep.runs import (
    DAY,
    NOW,
    forget,
    lift_when_listed,
    publish_model,
    release,
    released,
    rows,
    run,
    sweep,
    two_stages,
)


def spoil(store: Store, path: str) -> bytes:
    """Puts other bytes in the place of an object, and returns them."""
    data = b"x" + store.read(path)
    store.delete([path])
    assert store.create(path, data)
    return data


def contents(store: Store) -> dict[str, bytes]:
    return {entry.path: store.read(entry.path) for entry in store.list("")}


def _pieces(store: Store) -> bytes:
    output = write_pack([b"one", b"two"], 2)
    return read_pieces(store, put_blob(store, output.blobs["pack"]), 1, 2)[0]


def _pictures(store: Store) -> bytes:
    place = Place("0", put_blob(store, b"..picture.."), None, 2, 7, hashlib.sha256(b"picture").hexdigest())
    return read_images(store, [place])[0]


def _pin(store: Store) -> str | None:
    store.swap(pin_path("lineage"), None, json.dumps({"key": "k"}).encode())
    return read_pin(store, pin_path("lineage"))


def _release(store: Store) -> tuple[Move, ...]:
    move_release(store, "p", Releases(), Move("promote", "bundle", "evaluation", NOW))
    return read_releases(store, "p").moves


SHARD, SHARD_PATH = Shard(0, "k", Ledger(kept=1)), shard_path("pairs", "k")


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (_pin, "k"),
        (_release, (Move("promote", "bundle", "evaluation", NOW),)),
        (lambda store: read_blob(store, put_blob(store, b"blob")), b"blob"),
        (lambda store: create_record(store, SHARD_PATH, SHARD) and read_record(store, SHARD_PATH, Shard), SHARD),
        (lambda store: create_record(store, SHARD_PATH, SHARD) and peek_record(store, SHARD_PATH, Shard), SHARD),
        (_pieces, b"two"),
        (_pictures, b"picture"),
    ],
    ids=["pin", "release", "blob", "record", "record that is only looked at", "piece", "picture"],
)
def test_one_read_that_went_wrong_costs_nothing(
    read: Callable[[Store], Any],
    found: Any,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flipped = flip_first_reads(monkeypatch, store)
    assert read(store) == found
    assert flipped


def test_the_second_look_goes_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    store.create("blobs/a", b"0123")
    dropped: list[str] = []

    def advise(handle: int, start: int, length: int, advice: int) -> None:
        assert (start, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        dropped.append(os.readlink(f"/proc/self/fd/{handle}"))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    assert store.read("blobs/a", 1) == b"123"
    assert not dropped
    assert store.fresh().read("blobs/a", 1) == b"123"
    assert list(store.fresh().read_parts("blobs/a", [(1, 3)])) == [b"12"]
    assert dropped == [str(tmp_path / "blobs/a")] * 2


def test_the_second_look_takes_other_connections(s3: Any) -> None:
    store: Any = open_store(f"{s3.url}/fresh-{os.getpid()}")
    fresh: Any = store.fresh()
    assert fresh._client is not store._client
    assert fresh._client._endpoint.http_session is not store._client._endpoint.http_session


def mend(store: Store, *names: str) -> Sequence[Damage]:
    """Checks what the project p needs, or these objects, and quarantines what is damaged. Returns what stays."""
    return [damage for damage in repair_store(store, "p", 30 * DAY, names).damage if damage.stays]


def test_what_is_damaged_lies_aside_until_it_is_garbage(store: Store) -> None:
    path = artifact_path("pairs", "k")
    damaged = []
    for kept in (0, 1):
        publish_artifact(store, Artifact("pairs", "k", {}, {}, Ledger(kept=kept)), 1.0)
        damaged.append(spoil(store, path))
        with pytest.raises(CorruptObject, match=f"^{path}: is corrupt$"):
            load_artifact(store, "pairs", "k")
        assert not mend(store, path)
    assert load_artifact(store, "pairs", "k") is None
    aside = [entry.path for entry in store.list("")]
    assert all(each.startswith(f"damaged/{path}.") for each in aside)
    assert sorted(map(store.read, aside)) == sorted(damaged)
    collect(store, 30 * DAY, DAY, NOW, delete=True)
    assert [entry.path for entry in store.list("damaged/")] == aside
    collect(store, 30 * DAY, DAY, NOW + DAY, delete=True)
    assert not list(store.list("damaged/"))


def test_all_that_a_project_needs_is_checked(store: Store) -> None:
    keys = run(store, 0)
    pairs, clip = (load_artifact(store, stage, keys[stage]) for stage in ("pairs", "clip"))
    assert pairs
    assert clip
    first, second = read_shards(store, pairs)
    index = blob_path(second.blobs["index"])
    (state,) = (entry.path for entry in store.list("checkpoints/"))
    saved = json.loads(store.read(state))["blobs"]["model"]
    sound = verify_store(store, "p", 30 * DAY)
    assert (sound.damage, sound.blobs) == ([], sorted(entry.path for entry in store.list("blobs/")))
    damaged = {
        index: {shard_path("pairs", second.key), artifact_path("pairs", pairs.key)},
        shard_path("pairs", first.key): set(),
        blob_path(clip.blobs["model"]): {artifact_path("clip", clip.key)},
        blob_path(saved): {state},
    }
    for path in damaged:
        spoil(store, path)
    store.delete([blob_path(clip.blobs["model"])])
    before = contents(store)
    found = verify_store(store, "p", 30 * DAY)
    assert {damage.path: {*damage.records} for damage in found.damage} == damaged
    assert {damage.why for damage in found.damage} == {"is missing", "is corrupt", "has other bytes than its name says"}
    assert {stage for damage in found.damage for stage in damage.stages} == {"pairs", "clip"}
    assert contents(store) == before
    assert repair_store(store, "p", 30 * DAY).damage == found.damage
    gone = before.keys() - contents(store).keys()
    assert gone == {path for path, records in damaged.items() for path in (path, *records)} & before.keys()
    run(store, 0)
    assert not verify_store(store, "p", 30 * DAY).damage


def test_neither_what_was_forgotten_nor_what_another_project_needs_is_missed(store: Store) -> None:
    old = run(store, 0)
    release(store, old, project="p")
    forget(store, "p")
    run(store, 1, forgettings=1)
    assert rows(store, old)
    sweep(store)
    assert not verify_store(store, "p", 30 * DAY).damage
    graph = two_stages(2)
    verdicts = plan(graph, {}, "q", store, {})
    record_run(store, "q", graph, verdicts)
    path = artifact_path(verdicts[0].stage, verdicts[0].key)
    store.create(path, b"{")
    assert not verify_store(store, "p", 30 * DAY).damage
    assert [damage.path for damage in verify_store(store, "q", 30 * DAY).damage] == [path]


def test_a_table_that_is_no_list_of_shards_is_quarantined(store: Store) -> None:
    """Its name is that of its bytes, which a stranger may have written."""
    keys = run(store, 0, made=())
    table = put_blob(store, b"no table")
    publish_artifact(store, Artifact("pairs", keys["pairs"], {"source": "s"}, {}, Ledger(), shard_table=table), 1.0)
    (damage,) = verify_store(store, "p", 30 * DAY).damage
    assert damage.why.startswith("is not a list of shards (")
    assert not mend(store, blob_path(table))
    assert load_artifact(store, "pairs", keys["pairs"]) is None


def test_quarantining_again_after_a_kill_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = blob_path(put_blob(store, b"1"))

    def killed(name: str, about: str) -> None:
        assert (name, about) == ("damage.before_delete", path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.upkeep.repair.crash_point", killed)
        with pytest.raises(KeyboardInterrupt):
            quarantine(store, [path])
    assert len(contents(store)) == 2
    quarantine(store, [path, path])
    quarantine(store, [path])
    assert list(contents(store).values()) == [b"1"]


def test_nothing_but_blobs_and_records_is_quarantined(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "precious.txt").write_text("precious")
    inside = ("locks/pin.json", "releases/p.json", "damaged/x", "leases/k.json")
    for path in inside:
        store.create(path, b"1")
    before = contents(store)
    for path in ("../precious.txt", "blobs/../../precious.txt", "/precious.txt", "list.tar", *inside):
        for attempt in (quarantine, lambda store, paths: mend(store, *paths)):
            with pytest.raises(UserError, match="neither a blob nor a record"):
                attempt(store, [path])
    assert contents(store) == before
    assert (tmp_path / "precious.txt").exists()


STAYS = "it stays, because {} names it: put a sound copy in its place; if there is none, {}, and run again"
BEHIND = {
    "blob of a model": lambda made: blob_path(made["decoder"].blobs["model.safetensors"]),
    "blob of the bundle": lambda made: blob_path(made["bundle"].blobs["README.md"]),
    "blob of the evaluation": lambda made: blob_path(made["evaluation"].blobs["model.safetensors"]),
    "record of a model": lambda _: artifact_path("decoder", "decoder-key"),
    "record of the bundle": lambda _: artifact_path("bundle", "bundle-key"),
    "record of the evaluation": lambda _: artifact_path("evaluation", "evaluation-key"),
}


@pytest.mark.parametrize("victim", BEHIND)
def test_what_is_behind_a_release_stays(victim: str, store: Store) -> None:
    made, is_blob = released(store), "blob" in victim
    path = BEHIND[victim](made)
    spoil(store, path)
    way_out = "roll it back, or delete releases/p.json" if is_blob else "delete it"
    for lost in (False, True)[: 1 + is_blob]:
        if lost:
            store.delete([path])
        before = contents(store)
        (damage,) = mend(store, path)
        assert (damage.path, damage.stays) == (path, STAYS.format("the release of p", way_out))
        assert contents(store) == before
    store.delete([release_path("p")])
    assert not mend(store, path)
    assert path not in contents(store)


def test_data_behind_a_release_are_made_again(store: Store) -> None:
    made = released(store)
    path = blob_path(made["pairs"].blobs["a"])
    spoil(store, path)
    assert not mend(store, path)
    assert load_artifact(store, "pairs", "pairs-key") is None
    assert load_artifact(store, "decoder", "decoder-key") is not None


def test_what_was_rolled_back_is_nobodys_release(store: Store) -> None:
    made = released(store)
    assert artifact_path("bundle", "bundle-key") in protected_objects(store)
    move = Move("rollback", "bundle-key", "evaluation-key", NOW, "it drew cats")
    move_release(store, "p", read_releases(store, "p"), move)
    assert not protected_objects(store)
    path = BEHIND["blob of a model"](made)
    spoil(store, path)
    assert not mend(store, path)
    assert load_artifact(store, "bundle", "bundle-key") is None


@pytest.mark.parametrize("victim", ["blob", "record"])
def test_what_a_pin_names_stays(victim: str, store: Store) -> None:
    clip = publish_model(store, "clip")
    store.swap(pin_path("lineage"), None, json.dumps({"key": clip.key}).encode())
    path = blob_path(clip.blobs["model.safetensors"]) if victim == "blob" else artifact_path("clip", clip.key)
    spoil(store, path)
    before = contents(store)
    way_out = "delete it and artifacts/clip/clip-key.json" if victim == "blob" else "delete it"
    (damage,) = mend(store, path)
    assert damage.stays == STAYS.format("the pin locks/lineage.json", way_out)
    assert contents(store) == before
    store.delete([pin_path("lineage")])
    assert not mend(store, path)
    assert load_artifact(store, "clip", clip.key) is None


def test_what_another_process_deletes_during_a_repair_is_passed_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pin, and a record that names the damaged blob."""
    blob = put_blob(store, b"rows")
    create_record(store, f"{SEGMENTS}one.json", Segment([], [blob]))
    store.swap(pin_path("lineage"), None, json.dumps({"key": "k"}).encode())
    spoil(store, blob_path(blob))
    lift_when_listed(monkeypatch, store, SEGMENTS, "locks/")
    assert not mend(store, blob_path(blob))
    assert not [path for path in contents(store) if not path.startswith("damaged/")]


def test_rows_that_a_list_tries_again_stay(store: Store) -> None:
    blob = put_blob(store, b"rows")
    change_journal(store, "p", lambda journal: type(journal)(retries=(blob,)))
    spoil(store, blob_path(blob))
    before = contents(store)
    for names in ((), (blob_path(blob),)):
        (damage,) = mend(store, *names)
        assert damage.stays == STAYS.format("the list of p", f"take it out of the retries in {journal_path('p')}")
    assert contents(store) == before


@pytest.mark.parametrize("protector", [pin_path("lineage"), release_path("p"), journal_path("q")])
def test_with_a_damaged_pin_pointer_or_journal_nothing_is_quarantined(protector: str, store: Store) -> None:
    """What it protects cannot be known."""
    path = blob_path(put_blob(store, b"1"))
    spoil(store, path)
    store.swap(protector, None, b"{")
    before = contents(store)
    with pytest.raises(UserError, match=protector):
        mend(store, path)
    assert contents(store) == before
