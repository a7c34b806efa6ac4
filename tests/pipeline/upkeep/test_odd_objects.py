"""An object that is well sealed but of another shape, cut off or hostile, ends nobody's collection."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pipeline.data.source.journal import ListJournal, change_journal, journal_path
from pipeline.errors import UserError
from pipeline.graph.artifacts import SEGMENTS, Artifact, artifact_path, load_artifact, publish_artifact, shard_path
from pipeline.graph.leases import lease_path
from pipeline.graph.plan import pin_path, plan
from pipeline.graph.runs import record_run, run_entries
from pipeline.graph.stages import Stage
from pipeline.ledger import Ledger
from pipeline.release.pointer import Move, move_release, read_releases, release_path
from pipeline.store import Store
from pipeline.store.records import FORMAT, canonical, digest, put_blob, read_blob
from pipeline.upkeep.check import repair_store
from pipeline.upkeep.collect import TOMBSTONES
from pipeline.upkeep.overview import overview
from pipeline.upkeep.show import show_overview
from tests.pipeline.store.objects import ARTIFACT, BLOB, CHECKPOINT, RELEASE, RUN, SHARD
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


def run_path(project: str) -> str:
    return f"runs/{project}/00000001-00000000.json"


def put(store: Store, path: str, data: bytes) -> None:
    store.delete([path])
    assert store.create(path, data)


ROLLBACK = {"action": "rollback", "bundle": "b", "evaluation": "e", "at": 0, "failed": []}
ODD: dict[str, Callable[[str], tuple[str, Any]]] = {  # of a name of its own: path and body, or bytes
    "an artefact without ledger": lambda p: (artifact_path("bundle", p), {**without(ARTIFACT, "ledger"), "key": p}),
    "an artefact at another's path": lambda p: (artifact_path("bundle", p), ARTIFACT),
    "an artefact of NaN times": lambda p: (
        artifact_path("bundle", p),
        {**ARTIFACT, "key": p, "times": {"finished": float("nan"), "seconds": 1.0}},
    ),
    "an artefact that is deep": lambda p: (artifact_path("bundle", p), DEEP),
    "an artefact of no stage": lambda p: (f"artifacts/{p}.json", ARTIFACT),
    "an artefact of two stages": lambda p: (f"artifacts/bundle/{p}/k.json", ARTIFACT),
    "a run without forgettings": lambda p: (run_path(p), {**without(RUN, "forgettings"), "project": p}),
    "a run that is a list": lambda p: (run_path(p), b"[]"),
    "a run whose stages are a list": lambda p: (run_path(p), {**RUN, "project": p, "stages": ["clip"]}),
    "a run of another project": lambda p: (run_path(p), RUN),
    "a run that wants what it has not": lambda p: (run_path(p), {**RUN, "project": p, "wanted": ["decoder"]}),
    "a name that is no run's": lambda p: (f"runs/{p}/x.json", {**RUN, "project": p}),
    "a run of no project": lambda p: (f"runs/{p}.json", RUN),
    "a run of a newer version": lambda p: (run_path(p), canonical({**RUN, "format": FORMAT + 1, "checksum": "0"})),
    "a lease that is a list": lambda p: (lease_path(p), b"[]"),
    "a lease of NaN": lambda p: (lease_path(p), b'{"since": NaN}'),
    "a release that begins with a rollback": lambda p: (release_path(p), {"project": p, "moves": [ROLLBACK]}),
    "a release of another project": lambda p: (release_path(p), RELEASE),
    "a release whose moves are numbers": lambda p: (release_path(p), {"project": p, "moves": [1]}),
    "a release of no project": lambda p: (f"releases/{p}/b.json", RELEASE),
    "a release that is deep": lambda p: (release_path(p), DEEP),
    "a pin that is deep": lambda p: (pin_path(digest(p)), DEEP),
    "a pin that is a list": lambda p: (pin_path(digest(p)), b"[]"),
    "a journal that is deep": lambda p: (journal_path(p), DEEP),
    "a journal of numbers": lambda p: (journal_path(p), b'{"retries": [1], "forgotten": 2, "forgettings": "3"}'),
    "a journal below 0": lambda p: (journal_path(p), b'{"retries": [], "forgotten": [], "forgettings": -1}'),
    "a segment without tables": lambda p: (f"{SEGMENTS}{p}.json", {"shards": [{}], "hashes": []}),
    "a segment of lists": lambda p: (f"{SEGMENTS}{p}.json", {"shards": [[]], "hashes": {}}),
    "a shard of negative counts": lambda p: (shard_path(p, "k"), {**SHARD, "counts": {"rows": -1}}),
    "a checkpoint of a list": lambda p: (f"checkpoints/{p}/000000000008-0001.json", {**CHECKPOINT, "blobs": [BLOB]}),
    "a checkpoint of an odd name": lambda p: (f"checkpoints/{p}/9.json", CHECKPOINT),
    "tombstones that are deep": lambda p: (TOMBSTONES, DEEP),
}
UNNEEDED = ("an artefact", "a shard", "a segment", "a checkpoint", "tombstones")  # garbage like any other


def test_no_odd_object_stops_a_collection_or_a_forgetting(make_store: Callable[[], Store]) -> None:
    store = make_store()
    odd = {name: at(f"odd{number}") for number, (name, at) in enumerate(ODD.items())}
    odd = {name: (path, body if isinstance(body, bytes) else sealed(body)) for name, (path, body) in odd.items()}
    old = run(store, 0)
    gone = {*rows(store, old).values()}
    forget(store, "p")
    kept = run(store, 1, forgettings=1)
    for path, data in odd.values():
        put(store, path, data)
    found = sweep(store)
    assert not there(store, old)
    assert not gone & {entry.path for entry in store.list("blobs/")}
    assert all(store.stat(path) for path in rows(store, kept).values())
    assert model(store, kept) == b"model 1 64"
    stay = {name: of for name, of in odd.items() if not name.startswith(UNNEEDED)}
    assert {path for path, _ in stay.values()} <= found.unreadable.keys()
    for path, data in stay.values():
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
