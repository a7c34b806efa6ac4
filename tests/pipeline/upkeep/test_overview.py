"""What ``unclip show`` reads, of a store in a folder and on S3."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from jobs.show import _defaults
from pipeline.build import build
from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, artifact_path, publish_artifact, shard_path
from pipeline.graph.keys import differences, flatten
from pipeline.graph.leases import lead_or_wait, lease_path
from pipeline.graph.plan import pin_path, plan
from pipeline.graph.runs import record_run
from pipeline.graph.stages import transitive_reduction
from pipeline.ledger import Ledger
from pipeline.release.pointer import Move, Releases, move_release, release_path
from pipeline.store import Store, open_store
from pipeline.upkeep.overview import find_artifact, lineage, overview
from tests.counted import Counted

CONFIG = load_config("configs/nano.yaml")
GRAPH = build(CONFIG)


def ask(store: Store, project: str = "p", source: str = "s") -> dict[str, str]:
    """Record a run; the keys that it asks for."""
    verdicts = plan(GRAPH, {"source": source, "captions": "c"}, project, store, {})
    record_run(store, project, GRAPH, verdicts)
    return {verdict.stage: verdict.key for verdict in verdicts}


def make(store: Store, keys: Mapping[str, str], *stages: str) -> None:
    """Publish what a run has asked for."""
    for name in stages or keys:
        stage = GRAPH[name]
        inputs = {i: keys[i] for i in stage.inputs}
        recipe = flatten(stage.recipe)
        publish_artifact(store, Artifact(name, keys[name], inputs, recipe, Ledger(7), version=stage.version), 90.0)


def test_it_finds_runs_artefacts_pins_and_the_release(store: Store) -> None:
    first, keys = ask(store, source="before"), ask(store)
    make(store, keys, "source", "captions", "pairs", "clip")
    store.swap(pin_path("1" * 64), None, json.dumps({"key": keys["clip"]}).encode())
    store.swap("locks/list-p.json", None, b"no pin")
    ask(store, "other")
    move_release(store, "p", Releases(), Move("promote", keys["bundle"], "e", 5.0))
    found = overview(store, "p")
    assert [run.stages["source"].key for run in found.runs] == [keys["source"], first["source"]]
    assert found.all_runs == 2
    assert all(run.by["host"] and run.by["command"] and time.time() - run.at < 600 for run in found.runs)
    assert found.made == {(stage, keys[stage]) for stage in ("source", "captions", "pairs", "clip")}
    assert found.pinned == {keys["clip"]}
    assert {project: of.bundle for project, of in found.releases.items() if isinstance(of, Move)} == {
        "p": keys["bundle"]
    }
    assert sorted(run.project for run in overview(store).runs) == ["other", "p", "p"]


def test_only_what_is_not_made_and_not_released_runs(store: Store) -> None:
    keys = ask(store)
    make(store, keys, "source")
    leases = {}
    for stage in ("source", "captions", "pairs", "clip"):
        leases[stage] = lead_or_wait(store, keys[stage], 60.0, lambda: False, lambda: "", stage=stage)
        assert leases[stage] is not None
    with leases["pairs"]:  # and released at the end
        pass
    dead = json.loads(store.read(lease_path(keys["clip"]))) | {"started": "0"}
    (entry,) = store.list(lease_path(keys["clip"]))
    store.swap(entry.path, entry.version, json.dumps(dead).encode())
    store.swap(lease_path("odd"), None, b"{")
    found = overview(store, "p").leases
    assert found.keys() == {keys["captions"]}
    assert found[keys["captions"]].stage == "captions"


def test_more_data_cost_no_more_requests(make_store: Callable[[], Store]) -> None:
    store = make_store()
    keys = ask(store)
    make(store, keys)

    def requests() -> dict[str, int]:
        looking: Any = Counted(open_store(store.url))
        overview(looking, "p")
        lineage(looking, find_artifact(looking, keys["bundle"][:12]))
        return dict(looking.calls)

    for _ in range(5):
        ask(store)
    before = requests()
    for i in range(40):
        store.create(shard_path("pairs", f"{i:064x}"), b"1")
        make(store, keys | {"decoder": f"d{i:063x}"}, "decoder")
        store.swap(lease_path(f"d{i:063x}"), None, b'{"released": true}')
    assert requests() == before
    assert before.keys() <= {"list", "stat", "read"}
    assert before["list"] <= 12


def test_an_artefact_with_all_that_it_was_made_from_and_into(store: Store) -> None:
    keys = ask(store)
    make(store, keys)
    store.delete([artifact_path("source", keys["source"])])
    store.swap(pin_path("1" * 64), None, json.dumps({"key": keys["clip"]}).encode())
    found = lineage(store, find_artifact(store, keys["clip"][:12]))
    assert found.artifact.stage == "clip"
    assert found.artifact.version == GRAPH["clip"].version
    assert found.behind.keys() == {(stage, keys[stage]) for stage in ("source", "captions", "pairs", "filter")}
    assert found.behind["source", keys["source"]] is None
    assert {stage for stage, _ in found.users} == {name for name, stage in GRAPH.items() if "clip" in stage.inputs}
    assert found.pinned
    assert not found.released
    move_release(store, "p", Releases(), Move("promote", keys["bundle"], "e", 5.0))
    store.swap(release_path("q"), None, b"damaged")
    assert lineage(store, ("bundle", keys["bundle"])).released == ["p"]


def test_a_key_that_is_none(store: Store) -> None:
    keys = ask(store)
    make(store, keys)
    with pytest.raises(UserError, match=r"no artefact in .* has a key that begins with it; unclip show without a key"):
        find_artifact(store, "nothing")
    make(store, {stage: f"same{i}" for i, stage in enumerate(keys)})
    with pytest.raises(UserError, match=f"{len(keys)} artefacts in .* have a key that begins with it: "):
        find_artifact(store, "same")
    lead_or_wait(store, "begun", 60.0, lambda: False, lambda: "")
    with pytest.raises(UserError, match="it was begun and is not made yet"):
        find_artifact(store, "beg")


def test_damaged_records_are_left_alone_and_passed_over(store: Store) -> None:
    ask(store)
    store.create("runs/p/00000002-00000000.json", b"damaged")
    store.create(artifact_path("clip", "broken"), b"damaged")
    found = overview(store, "p")
    assert (found.all_runs, len(found.runs)) == (2, 1)
    with pytest.raises(UserError, match="is damaged or gone"):
        lineage(store, find_artifact(store, "broken"))
    assert store.read(artifact_path("clip", "broken")) == b"damaged"


def test_defaults_are_those_that_keys_leave_out() -> None:
    for stage in GRAPH.values():
        known, flat = _defaults(stage.name), flatten(stage.recipe)
        differing = {name for name, value in flat.items() if name not in known or known[name] != value}
        assert known.keys() <= flat.keys()
        assert {name.partition(".")[0] for name in differing} == differences(stage.recipe).keys()


def test_only_the_nearest_inputs_are_direct() -> None:
    assert transitive_reduction({1: [], 2: [1], 3: [1, 2], 4: [1, 3]}) == {1: [], 2: [1], 3: [2], 4: [3]}
