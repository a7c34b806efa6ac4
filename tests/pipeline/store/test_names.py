"""What a record, a table or a pin says becomes no path to anything but an object of the store."""

import copy
import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from pipeline.data.source.segments import Segment
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import (
    Artifact,
    Shard,
    ShardList,
    ancestors,
    artifact_path,
    load_artifact,
    publish_artifact,
    read_shard,
    read_shards,
    shard_path,
    write_table,
)
from pipeline.graph.plan import pin_path, read_pin
from pipeline.graph.records import RunRecord
from pipeline.graph.runs import last_run
from pipeline.ledger import Ledger
from pipeline.release.pointer import Pointer, read_releases, release_path
from pipeline.store import Store
from pipeline.store.names import is_blob_or_record, is_file_name, is_part
from pipeline.store.records import Record, blob_path, put_blob, read_blob, read_record, seal
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.records import CheckpointRecord
from tests.conftest import folder_store
from tests.pipeline.store.objects import ARTIFACT, AWAY, BLOB, CHECKPOINT, LEDGER, RELEASE, RUN, SHARD, forge

store = folder_store
NO_BLOBS = (*AWAY, BLOB[:-1], BLOB.upper(), BLOB + "\n", f"{BLOB}/..", 7, None)


def test_no_name_of_a_file_or_of_a_part_leads_away() -> None:
    assert not [name for name in AWAY if is_file_name(name) or is_part(name)]
    for name in ("0000-64.png", "decoder/model.safetensors", "previews/000000000064.png", "note.times", "shard.000001"):
        assert is_file_name(name)
    for part in (BLOB, "upsampler_256", "my.project-2"):
        assert is_part(part)


def test_only_sha256_names_a_blob(store: Store) -> None:
    for name in NO_BLOBS:
        for read in (blob_path, partial(read_blob, store)):
            with pytest.raises(UserError, match="not the name of a blob"):
                read(name)


def test_what_may_be_quarantined() -> None:
    ours = (
        blob_path(BLOB), artifact_path("pairs", BLOB), f"shards/source/segment-{BLOB}.json",
        f"checkpoints/{BLOB}/attempts/0001.json",
    )  # fmt: skip
    foreign = (
        f"blobs/01/{BLOB[:-1]}", f"blobs/ff/{BLOB}", "blobs/../../x", "artifacts/pairs/../../x.json",
        "artifacts//x.json", "locks/x.json", "releases/p.json", "/etc/passwd",
    )  # fmt: skip
    assert [path for path in (*ours, *foreign) if is_blob_or_record(path)] == [*ours]


SOURCE_SHARD = {"number": 0, "image_key": BLOB, "caption_key": BLOB, "ledger": LEDGER, "refs": BLOB, "captions": BLOB}
SEGMENT = {"shards": [SOURCE_SHARD], "hashes": [BLOB]}
PATHS: dict[type[Record], str] = {
    Artifact: artifact_path("bundle", "k"),
    Shard: shard_path("pairs", "k"),
    Segment: "shards/source/segment-x.json",
    CheckpointRecord: "checkpoints/t/000000000008-0001.json",
    RunRecord: "runs/p/00000001-00000000.json",
    Pointer: release_path("p"),
}
SOUND: dict[type[Record], dict[str, Any]] = {
    Artifact: ARTIFACT, Shard: SHARD, Segment: SEGMENT, CheckpointRecord: CHECKPOINT,
    RunRecord: RUN, Pointer: RELEASE,
}  # fmt: skip


def _with(body: dict[str, Any], *where: Any) -> dict[str, Any]:
    """A copy with the value at a path of keys replaced: the last of ``where``."""
    *places, last, value = where
    changed = inner = copy.deepcopy(body)
    for place in places:
        inner = inner[place]
    inner[last] = value
    return changed


FORGED: list[tuple[type[Record], dict[str, Any]]] = [
    *((Artifact, _with(ARTIFACT, "blobs", {name: BLOB})) for name in AWAY),
    *((Artifact, _with(ARTIFACT, "blobs", {"a": name})) for name in NO_BLOBS),
    (Artifact, _with(ARTIFACT, "blobs", [BLOB])),
    (Artifact, _with(ARTIFACT, "shard_table", "../../x")),
    (Artifact, _with(ARTIFACT, "stage", "../..")),
    (Artifact, _with(ARTIFACT, "key", "..")),
    (Artifact, _with(ARTIFACT, "inputs", {"../../x": "k"})),
    (Artifact, _with(ARTIFACT, "inputs", {"clip": "../../../x"})),
    (Shard, _with(SHARD, "blobs", {"index": "../../x"})),
    (Shard, _with(SHARD, "key", "../x")),
    (Segment, _with(SEGMENT, "shards", 0, "refs", "../../x")),
    (Segment, _with(SEGMENT, "shards", 0, "captions", "../../x")),
    (Segment, _with(SEGMENT, "hashes", ["../../x"])),
    (CheckpointRecord, _with(CHECKPOINT, "blobs", {"model": "../../x"})),
    (CheckpointRecord, _with(CHECKPOINT, "journal", "lines", 0, "preview", "../../x")),
    (RunRecord, _with(RUN, "project", "../x")),
    (RunRecord, _with(RUN, "stages", {"../x": RUN["stages"]["clip"]})),
    *((RunRecord, _with(RUN, "stages", "clip", name, "../x")) for name in ("key", "trajectory", "trunk")),
    (RunRecord, _with(RUN, "stages", "clip", "inputs", {"pairs": "../x"})),
    (RunRecord, _with(RUN, "package", "../../x.zip")),
    *((Pointer, _with(RELEASE, "moves", 0, name, "../x")) for name in ("bundle", "evaluation")),
]


@pytest.mark.parametrize("kind", SOUND)
def test_a_record_of_each_kind_passes_the_gate(kind: type[Record], store: Store) -> None:
    forge(store, PATHS[kind], SOUND[kind] | {"a field of a newer version": 1})
    found = read_record(store, PATHS[kind], kind)
    assert found
    store.delete([PATHS[kind]])
    assert store.create(PATHS[kind], seal(found, PATHS[kind]))
    assert read_record(store, PATHS[kind], kind) == found


@pytest.mark.parametrize(("kind", "body"), FORGED)
def test_a_forged_record_is_damaged(kind: type[Record], body: dict[str, Any], store: Store) -> None:
    forge(store, PATHS[kind], body)
    with pytest.raises(CorruptObject, match="is not a record that belongs there") as caught:
        read_record(store, PATHS[kind], kind)
    assert caught.value.path == PATHS[kind]


def test_no_forged_record_is_made(store: Store) -> None:
    made = Artifact("bundle", "k", {}, {}, Ledger(), times={"finished": 0.0, "seconds": 1.0})
    seal(made, PATHS[Artifact])
    for forged in (replace(made, blobs={"../x": BLOB}), replace(made, key="../x"), replace(made, shard_table="x")):
        with pytest.raises(ValueError, match=r"not a name that a record may hold|not the name of a file|shard_table"):
            seal(forged, PATHS[Artifact])
    with pytest.raises(ValueError, match="it is the artefact bundle k"):
        seal(made, artifact_path("bundle", "another"))


def test_readers_of_each_kind_refuse_a_forged_record_or_pass_it_over(store: Store) -> None:
    forge(store, artifact_path("bundle", "k"), _with(ARTIFACT, "blobs", {"../../x": BLOB}))
    forge(store, shard_path("pairs", "k"), _with(SHARD, "blobs", {"index": "../../x"}))
    forge(store, "checkpoints/t/000000000008-0001.json", _with(CHECKPOINT, "blobs", {"model": "../../x"}))
    forge(store, "runs/p/00000001-00000000.json", _with(RUN, "stages", "clip", "key", "../x"))
    for read in (lambda: load_artifact(store, "bundle", "k"), lambda: read_shard(store, "pairs", "k")):
        with pytest.raises(CorruptObject, match="is not a record that belongs there"):
            read()
    assert Checkpoints(store, "t", 1).journal(100) is None
    assert last_run(store, "p") == {}
    forge(store, release_path("p"), _with(RELEASE, "moves", 0, "bundle", "../x"))
    with pytest.raises(UserError, match=r"releases/p\.json is not a record that belongs there \(moves\.0\.bundle: "):
        read_releases(store, "p")


def test_inputs_of_a_record_lead_to_artefacts_only(store: Store) -> None:
    """Those of a forged record, and those of an artefact in memory."""
    publish_artifact(store, Artifact("clip", "c", {}, {}, Ledger()), 1.0)
    made = publish_artifact(store, Artifact("bundle", "b", {"clip": "c"}, {}, Ledger()), 1.0)
    assert [artifact.stage for artifact in ancestors(store, made)] == ["bundle", "clip"]
    forge(store, artifact_path("bundle", "k"), _with(ARTIFACT, "inputs", {"..": "../../x"}))
    with pytest.raises(CorruptObject, match="is not a record that belongs there"):
        load_artifact(store, "bundle", "k")
    with pytest.raises(UserError, match="leads out of the store"):
        list(ancestors(store, Artifact("bundle", "k", {"..": "../../x"}, {}, Ledger())))


@pytest.mark.parametrize(
    "column",
    [
        {"blob.index": ["../../x"]},
        {"blob.index": [BLOB[:-1]]},
        {"blob.../../x": [BLOB]},
        {"blob./etc/x": [BLOB]},
        {"key": ["../../x"]},
        {"number": ["../x"]},
        {"count.train/0": ["../x"]},
    ],
)
def test_a_forged_list_of_shards_is_damaged(column: dict[str, list[Any]], store: Store) -> None:
    sound = {"number": [0], "key": ["k"], "kept": [1], "rejected": [0], "deferred": [0], "blob.index": [BLOB]}
    table = put_blob(store, write_table(sound | column))
    forged = Artifact("pairs", "k", {}, {}, Ledger(kept=1), shard_table=table)
    with pytest.raises(CorruptObject, match="is not a list of shards") as caught:
        read_shards(store, forged)
    assert caught.value.path == blob_path(table)
    with pytest.raises(CorruptObject, match="is not a list of shards"):
        ShardList(store, forged)[0]
    if "number" not in column:
        made = Artifact("pairs", "k", {}, {}, Ledger(kept=1), shard_table=put_blob(store, write_table(sound)))
        assert ShardList(store, made)[0].blobs == {"index": BLOB}


def test_what_is_not_a_table_at_all_is_damaged(store: Store) -> None:
    forged = Artifact("pairs", "k", {}, {}, Ledger(), shard_table=put_blob(store, b"not Parquet"))
    for read in (read_shards, ShardList):
        with pytest.raises(CorruptObject, match="is not a list of shards"):
            read(store, forged)


def test_a_forged_pin_is_refused(store: Store) -> None:
    for number, data in enumerate([b"", b"[]", b"{}", *(json.dumps({"key": name}).encode() for name in (*AWAY, 7))]):
        store.swap(pin_path(f"lineage{number}"), None, data)
        with pytest.raises(UserError, match=rf"locks/lineage{number}.json is damaged"):
            read_pin(store, pin_path(f"lineage{number}"))
