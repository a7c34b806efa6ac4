import json
from dataclasses import dataclass, field, replace

from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.source.recipe import SourceRecipe
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.keys import differences, flatten
from pipeline.graph.plan import Verdict, pin_path, plan
from pipeline.graph.records import PlannedStage
from pipeline.graph.stages import Kind, Stage, stage_key
from pipeline.ledger import Ledger
from pipeline.store import Store


@dataclass(frozen=True)
class Model:
    width: int = 8
    dropout: float = 0.0


@dataclass(frozen=True)
class Recipe:
    samples: int = 100
    name: str = "x"
    sizes: tuple[int, ...] = (1, 2)
    model: Model = field(default_factory=Model)


def _never(_: object) -> Artifact:
    raise AssertionError("a plan runs nothing")


def _graph(test: float = 0.02, **recipes: Recipe) -> dict[str, Stage]:
    inputs: dict[str, tuple[str, ...]] = {"source": (), "captions": (), "pairs": ("source",)}
    inputs |= {"clip": ("pairs", "captions"), "embeddings": ("pairs", "captions", "clip"), "codec": ("embeddings",)}
    inputs |= {"decoder": ("pairs", "embeddings"), "ar_prior": ("embeddings", "codec")}
    kinds: dict[str, Kind] = {"source": "source", "captions": "source", "decoder": "training"}
    lists = dict.fromkeys(("source", "captions"), SourceRecipe(("a.csv",), test=test))
    return {
        n: Stage(n, 1, {**lists, **recipes}.get(n, Recipe()), i, _never, kinds.get(n, "data"), n in ("clip", "codec"))
        for n, i in inputs.items()
    }


SOURCE = {"source": "s1", "captions": "c1"}


def _make(store: Store, verdicts: list[Verdict]) -> None:
    """Pretend to have run: records for what is stale, and the pins of what is pinned."""
    for v in verdicts:
        if v.state == "stale":
            publish_artifact(store, Artifact(v.stage, v.key, {}, {}, Ledger()), 0.0)
        if v.lineage:
            store.swap(pin_path(v.lineage), None, json.dumps({"key": v.key}).encode())


def _states(verdicts: list[Verdict]) -> dict[str, str]:
    return {v.stage: v.state for v in verdicts}


def _stale(verdicts: list[Verdict]) -> set[str]:
    return {v.stage for v in verdicts if v.state == "stale"}


def test_defaults_do_not_count_and_changes_do() -> None:
    assert differences(Recipe()) == {}
    changed = Recipe(sizes=(3,), model=Model(dropout=0.1))
    assert differences(changed) == {"sizes": [3], "model": {"dropout": 0.1}}
    assert flatten(changed) == {"samples": 100, "name": "x", "sizes": [3], "model.width": 8, "model.dropout": 0.1}


@given(st.integers(), st.text(), st.lists(st.integers()), st.floats(allow_nan=False))
def test_equal_recipes_have_equal_keys_and_others_differ(
    samples: int, name: str, sizes: list[int], dropout: float
) -> None:
    recipe = Recipe(samples, name, tuple(sizes), Model(dropout=dropout))
    stage = Stage("decoder", 1, recipe, (), _never)
    assert stage_key(stage, {}) == stage_key(replace(stage, recipe=replace(recipe)), {})
    assert stage_key(stage, {}) != stage_key(replace(stage, recipe=replace(recipe, samples=samples + 1)), {})
    assert stage_key(stage, {}) != stage_key(replace(stage, version=2), {})
    assert stage_key(stage, {}) != stage_key(replace(stage, name="other"), {})


def test_a_fresh_project_is_all_stale_then_all_fresh(store: Store) -> None:
    verdicts = plan(_graph(), SOURCE, "p", store, {})
    assert set(_states(verdicts).values()) == {"stale"}
    assert {v.because for v in verdicts} == {"not made yet"}
    _make(store, verdicts)
    assert set(_states(plan(_graph(), SOURCE, "p", store, {})).values()) == {"fresh"}


def test_a_changed_value_makes_its_stage_and_what_follows_stale(store: Store) -> None:
    first = plan(_graph(), SOURCE, "p", store, {})
    _make(store, first)
    graph = _graph(decoder=Recipe(model=Model(dropout=0.1)))
    keys = {v.stage: v.key for v in first}
    inputs = {name: {n: keys[n] for n in stage.inputs} for name, stage in graph.items()}
    previous = {v.stage: PlannedStage(v.key, 1, flatten(Recipe()), inputs[v.stage]) for v in first}
    verdicts = plan(graph, SOURCE, "p", store, previous)
    assert _stale(verdicts) == {"decoder"}
    assert next(v.because for v in verdicts if v.stage == "decoder") == "model.dropout 0.0 -> 0.1"
    verdicts = plan(_graph(embeddings=Recipe(name="y")), SOURCE, "p", store, previous)
    assert _stale(verdicts) == {"embeddings", "decoder", "codec", "ar_prior"}
    assert next(v.because for v in verdicts if v.stage == "decoder") == "embeddings changed"


def test_new_data_keeps_the_pinned_clip_and_codec(store: Store) -> None:
    first = plan(_graph(), SOURCE, "p", store, {})
    _make(store, first)
    more = plan(_graph(), {"source": "s2", "captions": "c2"}, "p", store, {})
    assert _states(more)["clip"] == _states(more)["codec"] == "pinned"
    keys, old = ({v.stage: v.key for v in verdicts} for verdicts in (more, first))
    assert keys["clip"] == old["clip"]
    assert keys["codec"] == old["codec"]
    assert _stale(more) == {"source", "captions", "pairs", "embeddings", "decoder", "ar_prior"}


def test_what_learned_from_rows_that_are_held_out_now_stays_pinned_no_longer(store: Store) -> None:
    _make(store, plan(_graph(test=0.02), SOURCE, "p", store, {}))
    more = {"source": "s2", "captions": "c2"}
    assert _states(plan(_graph(test=0.02), more, "p", store, {}))["clip"] == "pinned"
    assert {"clip", "codec"} <= _stale(plan(_graph(test=0.2), more, "p", store, {}))


def test_a_changed_clip_is_stale_in_spite_of_its_pin_and_takes_the_codec_along(store: Store) -> None:
    _make(store, plan(_graph(), SOURCE, "p", store, {}))
    verdicts = plan(_graph(clip=Recipe(samples=200)), SOURCE, "p", store, {})
    assert _stale(verdicts) == {"clip", "embeddings", "codec", "decoder", "ar_prior"}


def test_two_projects_share_no_pin(store: Store) -> None:
    _make(store, plan(_graph(), SOURCE, "p", store, {}))
    other = plan(_graph(), {"source": "s2", "captions": "c2"}, "q", store, {})
    assert _states(other)["clip"] == "stale"


def test_a_plan_may_suppose_another_pin_or_none(store: Store) -> None:
    first = plan(_graph(), SOURCE, "p", store, {})
    _make(store, first)
    clip = next(v for v in first if v.stage == "clip")
    publish_artifact(store, Artifact("clip", "other", {}, {}, Ledger()), 0.0)
    supposed = {str(clip.lineage): "other"}
    moved = plan(_graph(), SOURCE, "p", store, {}, supposed)
    assert next(v for v in moved if v.stage == "clip").key == "other"
    assert _states(moved)["clip"] == "pinned"
    assert _stale(moved) == {"embeddings", "codec", "decoder", "ar_prior"}
    more = {"source": "s2", "captions": "c2"}
    assert "clip" in _stale(plan(_graph(), more, "p", store, {}, {str(clip.lineage): None}))
    assert "clip" not in _stale(plan(_graph(), more, "p", store, {}))
    assert plan(_graph(), SOURCE, "p", store, {}) == plan(
        _graph(), SOURCE, "p", store, {}, {"another lineage": "other"}
    )
