"""An object that is well sealed but of another shape, cut off or hostile, ends nobody's collection."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.data.source.journal import ListJournal, change_journal, journal_path
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import Artifact, artifact_path, load_artifact, publish_artifact, shard_path
from pipeline.graph.plan import pin_path, plan, read_pin
from pipeline.graph.runs import last_run, record_run, run_entries
from pipeline.graph.stages import Stage
from pipeline.ledger import Ledger
from pipeline.release.pointer import Move, move_release, read_releases, release_path
from pipeline.store import Store, open_store
from pipeline.store.leases import lease_path
from pipeline.store.names import is_blob_or_record
from pipeline.store.records import FORMAT, canonical, digest, put_blob, read_blob
from pipeline.upkeep.check import repair_store, verify_store
from pipeline.upkeep.collect import TOMBSTONES
from pipeline.upkeep.overview import overview
from pipeline.upkeep.repair import protected_objects
from pipeline.upkeep.show import show_overview
from tests.pipeline.store.test_names import ARTIFACT, BLOB, CHECKPOINT, RELEASE, RUN, SEGMENT, SHARD
from tests.pipeline.upkeep.runs import (
    AGES,
    DAY,
    NOW,
    forget,
    model,
    never,
    publish_clip,
    release,
    rows,
    run,
    sweep,
    there,
    two_stages,
)

DEEP = b"[" * 100_000


def sealed(body: Any) -> bytes:
    """What anybody can write who may write to the store."""
    if not isinstance(body, dict):
        return json.dumps(body).encode()
    body = {**body, "format": FORMAT}
    return canonical({**body, "checksum": digest(body)})


def without(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}


def put(store: Store, path: str, data: bytes) -> None:
    store.delete([path])
    assert store.create(path, data)


RUN_PATH = "runs/odd/00000001-00000000.json"
ROLLBACK = {"action": "rollback", "bundle": "b", "evaluation": "e", "at": 0, "failed": []}
ODD = {
    "an artefact without ledger": ("artifacts/bundle/k.json", sealed(without(ARTIFACT, "ledger"))),
    "an artefact at another's path": ("artifacts/bundle/other.json", sealed(ARTIFACT)),
    "an artefact of NaN times": (
        "artifacts/bundle/k.json",
        sealed({**ARTIFACT, "times": {"finished": float("nan"), "seconds": 1.0}}),
    ),
    "an artefact that is deep": ("artifacts/bundle/k.json", DEEP),
    "an artefact of no stage": ("artifacts/k.json", sealed(ARTIFACT)),
    "an artefact of two stages": ("artifacts/bundle/x/k.json", sealed(ARTIFACT)),
    "a run without forgettings": (RUN_PATH, sealed({**without(RUN, "forgettings"), "project": "odd"})),
    "a run that is a list": (RUN_PATH, b"[]"),
    "a run whose stages are a list": (RUN_PATH, sealed({**RUN, "project": "odd", "stages": ["clip"]})),
    "a run of another project": (RUN_PATH, sealed(RUN)),
    "a run that wants what it has not": (RUN_PATH, sealed({**RUN, "project": "odd", "wanted": ["decoder"]})),
    "a name that is no run's": ("runs/odd/x.json", sealed({**RUN, "project": "odd"})),
    "a run of no project": ("runs/x.json", sealed(RUN)),
    "a run of a newer version": (RUN_PATH, canonical({**RUN, "format": FORMAT + 1, "checksum": "0"})),
    "a lease that is a list": (lease_path("k"), b"[]"),
    "a lease of NaN": (lease_path("k"), b'{"since": NaN}'),
    "a release that begins with a rollback": (release_path("odd"), sealed({"project": "odd", "moves": [ROLLBACK]})),
    "a release of another project": (release_path("odd"), sealed(RELEASE)),
    "a release whose moves are numbers": (release_path("odd"), sealed({"project": "odd", "moves": [1]})),
    "a release of no project": ("releases/a/b.json", sealed(RELEASE)),
    "a release that is deep": (release_path("odd"), DEEP),
    "a pin that is deep": (pin_path("1" * 64), DEEP),
    "a pin that is a list": (pin_path("1" * 64), b"[]"),
    "a journal that is deep": (journal_path("odd"), DEEP),
    "a journal of numbers": (journal_path("odd"), b'{"retries": [1], "forgotten": 2, "forgettings": "3"}'),
    "a journal of a negative number": (journal_path("odd"), b'{"retries": [], "forgotten": [], "forgettings": -1}'),
    "a segment without tables": ("shards/source/segment-x.json", sealed({"shards": [{}], "hashes": []})),
    "a segment of lists": ("shards/source/segment-x.json", sealed({"shards": [[]], "hashes": {}})),
    "a shard of negative counts": (shard_path("odd", "k"), sealed({**SHARD, "counts": {"rows": -1}})),
    "a checkpoint of a list": ("checkpoints/t/000000000008-0001.json", sealed({**CHECKPOINT, "blobs": [BLOB]})),
    "a checkpoint of an odd name": ("checkpoints/t/9.json", sealed(CHECKPOINT)),
    "tombstones that are deep": (TOMBSTONES, DEEP),
}
UNNEEDED = ("an artefact", "a shard", "a segment", "a checkpoint", "tombstones")  # garbage like any other


ODD_PATHS = (  # a body is the same on S3; see also the last test
    "an artefact of no stage", "an artefact of two stages", "a name that is no run's", "a run of no project",
    "a release of no project", "a checkpoint of an odd name",
)  # fmt: skip


@pytest.mark.parametrize(
    ("make_store", "name"), [*(("folder", name) for name in ODD), *(("s3", name) for name in ODD_PATHS)],
    indirect=["make_store"],
)  # fmt: skip
def test_an_odd_object_stops_no_collection_and_no_forgetting(name: str, store: Store) -> None:
    old = run(store, 0)
    gone = {*rows(store, old).values()}
    forget(store, "p")
    kept = run(store, 1, forgettings=1)
    path, data = ODD[name]
    put(store, path, data)
    found = sweep(store)
    assert not there(store, old)
    assert not gone & {entry.path for entry in store.list("blobs/")}
    assert all(store.stat(path) for path in rows(store, kept).values())
    assert model(store, kept) == b"model 1 64"
    if not name.startswith(UNNEEDED):
        assert list(found.unreadable) == [path]
        assert re.search("delete it|restore it|quarantines it|newer version", found.unreadable[path])
        assert store.read(path) == data
    with suppress(UserError):  # one line, of a pin or a newer version
        show_overview(overview(store), NOW)


def spoil(store: Store, path: str, data: bytes = b"{}") -> str:
    put(store, path, data)
    return path


def test_an_unreadable_release_keeps_every_bundle_with_all_behind_it_but_forgotten_rows(store: Store) -> None:
    old = run(store, 0, age_s=90 * DAY)
    release(store, old, project="p")
    run(store, 1)
    path = spoil(store, release_path("p"))
    before = {*rows(store, old).values()}
    assert list(sweep(store).unreadable) == [path]
    assert before <= {entry.path for entry in store.list("blobs/")}
    forget(store, "p")
    run(store, 2, forgettings=1)
    sweep(store, NOW + 2 * DAY)
    assert not before & {entry.path for entry in store.list("blobs/")}
    assert model(store, old)


def test_an_unreadable_pin_keeps_what_its_stage_has_made(store: Store) -> None:
    graph = two_stages()
    pinned, other = (run(store, seed, age_s=90 * DAY) for seed in (0, 1))
    run(store, 2)
    spoil(store, pin_path("1" * 64))
    verdicts = plan(graph, {}, "q", store, {})
    record_run(store, "q", graph, [replace(v, lineage="1" * 64 if v.stage == "clip" else None) for v in verdicts])
    AGES[store.url, run_entries(store, "q")[-1].path] = 0.0
    sweep(store)
    assert there(store, pinned, "clip")
    assert there(store, other, "clip")
    assert not there(store, other)


def test_of_an_unreadable_journal_the_rows_to_be_tried_again_stay(store: Store) -> None:
    old = run(store, 0)
    gone = {*rows(store, old).values()}
    blob = put_blob(store, b"rows")
    change_journal(store, "p", lambda _: ListJournal(retries=(blob,), forgettings=1))
    run(store, 1, forgettings=1)
    spoil(store, journal_path("p"), store.read(journal_path("p"))[:40])
    sweep(store)
    assert read_blob(store, blob) == b"rows"
    assert not gone & {entry.path for entry in store.list("blobs/")}


def test_what_an_unreadable_run_asked_for_stays(store: Store) -> None:
    """Its artefacts and checkpoints, which no other run names, and what it shares with others of its project."""
    shared, own = run(store, 0, age_s=90 * DAY), run(store, 1)
    run(store, 2)
    checkpoints = {entry.path for entry in store.list("checkpoints/")}
    path = run_entries(store, "p")[1].path
    spoil(store, path)
    found = sweep(store)
    assert list(found.unreadable) == [path]
    for keys in (shared, own):
        assert there(store, keys)
        assert model(store, keys)
    assert checkpoints == {entry.path for entry in store.list("checkpoints/")}
    store.delete([path])
    sweep(store, NOW + 2 * DAY)
    assert not there(store, own)


def test_behind_an_unreadable_released_bundle_stays_what_its_run_says(store: Store) -> None:
    graph = dict(two_stages())
    graph["bundle"] = Stage("bundle", 1, graph["clip"].recipe, ("clip",), never, "bundle")
    verdicts = plan(graph, {}, "p", store, {})
    keys = {verdict.stage: verdict.key for verdict in verdicts}
    record_run(store, "p", graph, verdicts)
    AGES[store.url, run_entries(store, "p")[-1].path] = 90 * DAY
    table = put_blob(store, b"weights")
    publish_artifact(store, Artifact("pairs", keys["pairs"], {}, {}, Ledger()), 1.0)
    inputs = {"pairs": keys["pairs"]}
    publish_artifact(store, Artifact("clip", keys["clip"], inputs, {}, Ledger(), {"model": table}), 1.0)
    run(store, 3)
    move_release(store, "p", read_releases(store, "p"), Move("promote", keys["bundle"], "e", 0.0))
    path = spoil(store, artifact_path("bundle", keys["bundle"]))
    assert list(sweep(store).unreadable) == [path]
    assert read_blob(store, table) == b"weights"
    assert there(store, keys)


def test_an_unreadable_artefact_that_a_run_needs_stays_until_it_is_made_again(store: Store) -> None:
    keys = run(store, 0)
    clip: Any = load_artifact(store, "clip", keys["clip"])
    path = spoil(store, artifact_path("clip", keys["clip"]))
    found = sweep(store)
    assert list(found.unreadable) == [path]
    assert found.unreadable[path].endswith("quarantines it, and unclip run makes it again where it is needed")
    assert read_blob(store, clip.blobs["model"])
    repair_store(store, "p", 30 * DAY)
    publish_clip(store, 0, keys, 64)
    assert not sweep(store, NOW + 2 * DAY).unreadable


# --- any JSON at all --------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([BLOB, "k", "p", "clip", "promote", "rollback", "../x", "x" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
LEASE = {
    "nonce": "n", "stage": "clip", "lease_s": 60, "user": "ana", "host": "h", "boot": "", "pid": 1, "started": "1",
    "since": 0.0, "at": 0.0, "beat": "", "progress": "", "released": False,
}  # fmt: skip
SOUND: dict[str, Any] = {
    artifact_path("bundle", "k"): ARTIFACT,
    shard_path("pairs", "k"): SHARD,
    "shards/source/segment-x.json": SEGMENT,
    "checkpoints/t/000000000008-0001.json": CHECKPOINT,
    "runs/p/00000001-00000000.json": RUN,
    release_path("p"): RELEASE,
    lease_path("k"): LEASE,
    pin_path("1" * 64): {"key": "k"},
    journal_path("p"): {"retries": [BLOB], "forgotten": ["m"], "forgettings": 1},
}
PLAIN = ("leases/", "locks/")


@st.composite
def bodies(draw: st.DrawFn, sound: Any) -> Any:
    """JSON of any kind, or the sound body with some of its values, at any depth, replaced or taken out."""
    if draw(st.booleans()):
        return draw(JSON)
    body = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(0, 3))):
        inner = body
        while isinstance(inner, dict | list) and inner:
            key = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
            if draw(st.booleans()) or not isinstance(inner[key], dict | list) or not inner[key]:
                if isinstance(inner, dict) and draw(st.booleans()):
                    del inner[key]
                else:
                    inner[key] = draw(JSON)
                break
            inner = inner[key]
    return body


STORES = st.fixed_dictionaries({path: st.none() | bodies(sound) for path, sound in SOUND.items()})


def check_any(store: Store, objects: dict[str, Any]) -> None:
    """Every reader ends with a value or a clear error, and a collection never with an error."""
    for path, body in objects.items():
        if body is not None:
            data = json.dumps(body).encode() if path.startswith(PLAIN) else sealed(body)
            put(store, path, data)
    found = sweep(store)
    for path in found.unreadable:
        assert store.stat(path)
    readers: list[Callable[[], object]] = [
        lambda: last_run(store, "p"),
        lambda: read_pin(store, pin_path("1" * 64)),
        lambda: read_releases(store, "p").current,
        lambda: protected_objects(store),
        lambda: verify_store(store, "p", 30 * DAY),
        lambda: verify_store(store, "p", 30 * DAY, [path for path in objects if is_blob_or_record(path)]),
        lambda: show_overview(overview(store), NOW),
        lambda: load_artifact(store, "bundle", "k"),
    ]
    for read in readers:
        with suppress(UserError, CorruptObject):
            read()
    store.delete([entry.path for entry in store.list("")])


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(STORES)
@example(dict(SOUND))
def test_any_json_ends_no_collection_in_a_folder(tmp_path_factory: Any, objects: dict[str, Any]) -> None:
    check_any(open_store(str(tmp_path_factory.mktemp("store"))), objects)


@pytest.mark.usefixtures("s3")
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(STORES)
@example(dict(SOUND))
def test_any_json_ends_no_collection_on_s3(s3: Any, tmp_path_factory: Any, objects: dict[str, Any]) -> None:
    check_any(open_store(f"{s3.url}/{tmp_path_factory.mktemp('odd').name}"), objects)
