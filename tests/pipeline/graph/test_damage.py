"""What looks damaged is read again before it is believed, and set aside, unless a pin, a release or a list names it."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.build import build
from pipeline.config import load_config
from pipeline.data.curation.near_passes import pack, read_piece
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.data.source.journal import change_journal, journal_path
from pipeline.data.source.stage import Segment
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import (
    SEGMENTS,
    Artifact,
    Shard,
    artifact_path,
    load_artifact,
    publish_artifact,
    shard_path,
    write_shard_table,
)
from pipeline.graph.damage import create_record, read_record, set_aside, stands_on
from pipeline.graph.execute import heal
from pipeline.graph.plan import pin_path, read_pin
from pipeline.graph.pointer import Move, Releases, move_release, read_releases, release_path
from pipeline.ledger import Ledger
from pipeline.store import Store, open_store
from pipeline.store.records import blob_path, peek_record, put_blob, read_blob
from pipeline.upkeep.collect import collect
from tests.chain import ROOT
from tests.flips import flip_first_reads
from tests.pipeline.upkeep.runs import lift_when_listed

GRAPH = build(load_config(ROOT / "configs/nano.yaml"))

NOW = 1_800_000_000.0
DAY = 86_400.0


def spoil(store: Store, path: str) -> bytes:
    """Puts other bytes in the place of an object, and returns them."""
    data = b"x" + store.read(path)
    store.delete([path])
    assert store.create(path, data)
    return data


def contents(store: Store) -> dict[str, bytes]:
    return {entry.path: store.read(entry.path) for entry in store.list("")}


def _pieces(store: Store) -> bytes:
    return read_piece(store, put_blob(store, pack([b"one", b"two"], 2)), 1)


def _pictures(store: Store) -> bytes:
    place = Place("0", put_blob(store, b"..picture.."), None, 2, 7, hashlib.sha256(b"picture").hexdigest())
    return read_images(store, [place])[0]


def _pin(store: Store) -> str | None:
    store.swap(pin_path("lineage"), None, json.dumps({"key": "k"}).encode())
    return read_pin(store, "lineage")


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
    caplog: pytest.LogCaptureFixture,
) -> None:
    flipped = flip_first_reads(monkeypatch, store)
    assert read(store) == found
    assert flipped
    assert not caplog.records
    assert not list(store.list("damaged/"))


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


def test_what_is_damaged_lies_aside_until_it_is_garbage(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    path = artifact_path("pairs", "k")
    publish_artifact(store, Artifact("pairs", "k", {}, {}, Ledger()), 1.0)
    damaged = [spoil(store, path)]
    with caplog.at_level(logging.WARNING):
        assert read_record(store, path, Artifact) is None
    (warning,) = caplog.records
    assert f"{path} is corrupt; it is set aside in damaged/" in warning.getMessage()
    assert read_record(store, path, Artifact) is None
    publish_artifact(store, Artifact("pairs", "k", {}, {}, Ledger(kept=1)), 1.0)
    damaged.append(spoil(store, path))
    assert load_artifact(store, "pairs", "k") is None
    aside = [entry.path for entry in store.list("")]
    assert all(each.startswith(f"damaged/{path}.") for each in aside)
    assert sorted(map(store.read, aside)) == sorted(damaged)
    collect(store, 30 * DAY, DAY, NOW, delete=True)
    assert [entry.path for entry in store.list("damaged/")] == aside
    collect(store, 30 * DAY, DAY, NOW + DAY, delete=True)
    assert not list(store.list("damaged/"))


def test_setting_aside_again_after_a_kill_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = blob_path(put_blob(store, b"1"))

    def killed(name: str, about: str) -> None:
        assert (name, about) == ("damage.before_delete", path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.graph.damage.crash_point", killed)
        with pytest.raises(KeyboardInterrupt):
            set_aside(store, [path])
    assert len(contents(store)) == 2
    set_aside(store, [path, path])
    set_aside(store, [path])
    assert list(contents(store).values()) == [b"1"]


@pytest.mark.parametrize(
    "path",
    ["../precious.txt", "blobs/../../precious.txt", "locks/pin.json", "releases/p.json", "damaged/x", "leases/k.json"],
)
def test_nothing_but_blobs_and_records_is_set_aside(path: str, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "precious.txt").write_text("precious")
    for inside in ("locks/pin.json", "releases/p.json", "damaged/x", "leases/k.json"):
        store.create(inside, b"1")
    before = contents(store)
    with pytest.raises(UserError, match="neither a blob nor a record"):
        set_aside(store, [path])
    assert contents(store) == before
    assert (tmp_path / "precious.txt").exists()


@pytest.mark.parametrize(
    "path", ["blobs/../../precious.txt", "blobs/..", "/precious.txt", "blobs/aa/" + "b" * 64, "list.tar"]
)
def test_healing_what_is_not_a_blob_deletes_nothing(path: str, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "precious.txt").write_text("precious")
    with pytest.raises(UserError, match="it is a file of yours"):
        heal(store, CorruptObject(path, "has other bytes"), {}, GRAPH)
    assert (tmp_path / "precious.txt").exists()


def _model(store: Store, stage: str, **inputs: str) -> Artifact:
    blobs = {"model.safetensors": put_blob(store, f"weights of {stage} {inputs}".encode())}
    return publish_artifact(store, Artifact(stage, f"{stage}-key", inputs, {}, Ledger(), blobs), 1.0)


def released(store: Store) -> dict[str, Artifact]:
    """A bundle of a model, which is the release, with the data that the model was trained on."""
    shard = put_blob(store, b"pictures")
    table, ledger = write_shard_table(store, [])
    pairs = publish_artifact(store, Artifact("pairs", "pairs-key", {}, {}, ledger, {"a": shard}, table), 1.0)
    decoder = _model(store, "decoder", pairs="pairs-key")
    blobs = {"decoder/model.safetensors": decoder.blobs["model.safetensors"], "README.md": put_blob(store, b"card")}
    inputs = {"decoder": "decoder-key"}
    bundle = publish_artifact(store, Artifact("bundle", "bundle-key", inputs, {}, Ledger(), blobs), 1.0)
    evaluation = _model(store, "evaluation", bundle="bundle-key")
    move_release(store, "p", Releases(), Move("promote", "bundle-key", "evaluation-key", NOW))
    return {"pairs": pairs, "decoder": decoder, "bundle": bundle, "evaluation": evaluation}


RELEASED = r"because the release of p names it: put a sound copy in its place; if there is none, "
BEHIND = {
    "blob of a model": lambda made: blob_path(made["decoder"].blobs["model.safetensors"]),
    "blob of the bundle": lambda made: blob_path(made["bundle"].blobs["README.md"]),
    "blob of the evaluation": lambda made: blob_path(made["evaluation"].blobs["model.safetensors"]),
}


@pytest.mark.parametrize("way", ["spoil", "delete"])
@pytest.mark.parametrize("victim", list(BEHIND))
def test_a_blob_behind_a_release_stays(victim: str, way: str, store: Store) -> None:
    made = released(store)
    path = BEHIND[victim](made)
    if way == "spoil":
        spoil(store, path)
    else:
        store.delete([path])
    before = contents(store)
    with pytest.raises(CorruptObject) as caught:
        read_blob(store, path.rpartition("/")[2])
    with pytest.raises(UserError, match=f"{path} is damaged or missing.*{RELEASED}roll it back, or delete releases/p"):
        heal(store, caught.value, made, GRAPH)
    assert contents(store) == before
    store.delete([release_path("p")])
    heal(store, caught.value, made, GRAPH)
    assert path not in contents(store)


@pytest.mark.parametrize("stage", ["decoder", "bundle", "evaluation"])
def test_a_record_behind_a_release_stays(stage: str, store: Store) -> None:
    made = released(store)
    spoil(store, artifact_path(stage, made[stage].key))
    before = contents(store)
    with pytest.raises(UserError, match=f"{made[stage].key}.json is damaged.*{RELEASED}delete it, and run again"):
        load_artifact(store, stage, made[stage].key)
    assert contents(store) == before


def test_data_behind_a_release_are_made_again(store: Store) -> None:
    made = released(store)
    path = blob_path(made["pairs"].blobs["a"])
    spoil(store, path)
    heal(store, CorruptObject(path, "has other bytes"), {"pairs": made["pairs"]}, GRAPH)
    assert load_artifact(store, "pairs", "pairs-key") is None
    assert load_artifact(store, "decoder", "decoder-key") is not None


def test_what_was_rolled_back_is_nobodys_release(store: Store) -> None:
    made = released(store)
    assert artifact_path("bundle", "bundle-key") in stands_on(store)
    move = Move("rollback", "bundle-key", "evaluation-key", NOW, "it drew cats")
    move_release(store, "p", read_releases(store, "p"), move)
    assert not stands_on(store)
    path = BEHIND["blob of a model"](made)
    spoil(store, path)
    heal(store, CorruptObject(path, "has other bytes"), made, GRAPH)
    assert load_artifact(store, "bundle", "bundle-key") is None


def _meet(store: Store, path: str, made: Artifact) -> None:
    """Does what a run does where this object of an artefact is damaged."""
    if path.startswith("artifacts/"):
        load_artifact(store, made.stage, made.key)
    else:
        heal(store, CorruptObject(path, "has other bytes"), {made.stage: made}, GRAPH)


@pytest.mark.parametrize("victim", ["blob", "record"])
def test_what_a_pin_names_stays(victim: str, store: Store) -> None:
    clip = _model(store, "clip")
    store.swap(pin_path("lineage"), None, json.dumps({"key": clip.key}).encode())
    path = blob_path(clip.blobs["model.safetensors"]) if victim == "blob" else artifact_path("clip", clip.key)
    spoil(store, path)
    before = contents(store)
    way_out = "delete it and artifacts/clip/clip-key.json" if victim == "blob" else "delete it, and run again"
    with pytest.raises(UserError, match=f"{path} is damaged.*because the pin locks/lineage.json names it.*{way_out}"):
        _meet(store, path, clip)
    assert contents(store) == before
    store.delete([pin_path("lineage")])
    _meet(store, path, clip)
    assert load_artifact(store, "clip", clip.key) is None


def test_what_another_run_deletes_while_one_heals_is_passed_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pin, and a record that names the damaged blob."""
    blob = put_blob(store, b"rows")
    create_record(store, f"{SEGMENTS}one.json", Segment([], [blob]))
    store.swap(pin_path("lineage"), None, json.dumps({"key": "k"}).encode())
    lift_when_listed(monkeypatch, store, SEGMENTS, "locks/")
    heal(store, CorruptObject(blob_path(blob), "has other bytes"), {}, GRAPH)
    assert not [path for path in contents(store) if not path.startswith("damaged/")]


def test_rows_that_a_list_tries_again_stay(store: Store) -> None:
    blob = put_blob(store, b"rows")
    change_journal(store, "p", lambda journal: type(journal)(retries=(blob,)))
    spoil(store, blob_path(blob))
    before = contents(store)
    with pytest.raises(
        UserError, match=f"because the list of p names it.*take it out of .* in {journal_path('p')}, and"
    ):
        heal(store, CorruptObject(blob_path(blob), "has other bytes"), {}, GRAPH)
    assert contents(store) == before


def test_a_damaged_pin_or_pointer_stops_healing(store: Store) -> None:
    """What it protects cannot be known."""
    path = blob_path(put_blob(store, b"1"))
    for protector in (pin_path("lineage"), release_path("p")):
        store.swap(protector, None, b"{")
        before = contents(store)
        with pytest.raises(UserError, match=protector):
            set_aside(store, [path])
        assert contents(store) == before
        store.delete([protector])
