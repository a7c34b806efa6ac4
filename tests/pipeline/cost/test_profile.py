"""Lines through what was observed, and what artefacts say of themselves."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.build import build
from pipeline.config import load_config
from pipeline.cost.estimate import Ask
from pipeline.cost.profile import Line, Observation, Profile, fit, load_profile, observe, pace, passes_of, shape
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.keys import flatten
from pipeline.graph.plan import plan
from pipeline.graph.runs import remember
from pipeline.ledger import Ledger
from pipeline.store import Store, open_store
from pipeline.store.records import put_blob

ROOT = Path(__file__).parents[3]
CONFIG = load_config(ROOT / "configs/nano.yaml")
GRAPH = build(CONFIG)
POSITIVE = st.floats(1e-3, 1e4)


@given(start=POSITIVE, slope=POSITIVE, amounts=st.lists(st.integers(1, 10**6), min_size=2, max_size=5, unique=True))
def test_start_and_slope_are_found_again(start: float, slope: float, amounts: list[int]) -> None:
    line = fit([(x, start + slope * x) for x in amounts])
    assert all(line.at(x) == pytest.approx(start + slope * x, rel=1e-6) for x in amounts)
    assert line.slope == pytest.approx(slope, rel=1e-3)


@given(start=POSITIVE, rate=POSITIVE, workers=st.integers(1, 64), more=st.integers(1, 64))
def test_a_pace_knows_other_amounts_and_other_workers(start: float, rate: float, workers: int, more: int) -> None:
    def seen(amount: float) -> tuple[float, Observation]:
        return amount, Observation(amount, start + amount / rate / workers, amount / rate, workers, {})

    found = pace([seen(100.0), seen(700.0)])
    assert found.seconds(10_000.0, more) == pytest.approx(start + 10_000 / rate / more, rel=1e-3)
    assert pace([seen(100.0)]).seconds(10_000.0, more) == pytest.approx(start + 10_000 / rate / more, rel=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=6))
def test_nothing_is_below_zero(points: list[tuple[float, float]]) -> None:
    line = fit(points)
    assert line.start >= 0
    assert line.slope >= 0


def test_lines_at_the_edges() -> None:
    assert fit([(4.0, 8.0)]) == Line(0.0, 2.0)  # one point: through the origin
    assert fit([(10.0, 5.0), (20.0, 5.0)]).at(1000.0) == pytest.approx(5.0)
    assert fit([(10.0, 6.0), (20.0, 5.0)]).slope == 0.0
    assert fit([(10.0, 1.0), (20.0, 3.0)]).start == 0.0
    with pytest.raises(ValueError, match="no point"):
        fit([])


def test_a_small_run_counts_as_much_as_a_large_one() -> None:
    """Errors are relative: a second that a short run took more is not lost beside an hour."""
    line = fit([(10.0, 11.0), (3600.0, 3601.0)])
    assert line == Line(pytest.approx(1.0), pytest.approx(1.0))


# --- from artefacts ---------------------------------------------------------------------------------------------------


def publish(store: Store, stage: str, times: dict[str, float], **fields: object) -> None:
    key = next(v.key for v in plan(GRAPH, {"source": "s", "captions": "c"}, "nano", store, {}) if v.stage == stage)
    artifact = Artifact(stage, key, {}, flatten(GRAPH[stage].recipe), Ledger(kept=100), times=times)
    publish_artifact(store, replace(artifact, **fields), times.get("seconds", 10.0))  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path / "store"))
    remember(store, "nano", GRAPH, plan(GRAPH, {"source": "s", "captions": "c"}, "nano", store, {}))
    return store


def test_a_data_stage_tells_what_its_workers_did(store: Store) -> None:
    publish(store, "pairs", {"busy_seconds": 12.0, "made_rows": 100, "workers": 2, "whole_seconds": 11.0})
    (one,) = observe(store, "nano").stages["pairs"]
    assert (one.amount, one.seconds, one.work, one.workers) == (100, 11.0, 12.0, 2)
    found = pace([(one.amount, one)])
    assert found.startup(2) == pytest.approx(5.0)
    assert found.seconds(300, 4) == pytest.approx(5.0 + 36 / 4)


def test_a_stage_that_was_made_in_part_tells_of_that_part(store: Store) -> None:
    publish(store, "pairs", {"busy_seconds": 3.0, "made_rows": 25, "workers": 1})
    (one,) = observe(store, "nano").stages["pairs"]
    assert one.amount == 25
    publish(store, "curation", {"busy_seconds": 0.0, "made_rows": 0, "workers": 1})
    assert "curation" not in observe(store, "nano").stages


def test_a_training_tells_of_its_steps_and_of_the_rest(store: Store) -> None:
    times = {"seconds": 20.0, "share_pause": 0.25, "samples_per_second": 5.0, "whole_seconds": 26.0}
    publish(store, "decoder", times, metrics={"samples_seen": 100}, environment={"device": "cuda:1", "workers": "2"})
    (one,) = observe(store, "nano").stages["decoder"]
    assert (one.amount, one.seconds, one.work, one.workers, one.device) == (100, 26.0, 30.0, 2, "cuda")


def test_an_evaluation_tells_of_the_rows_that_there_were(store: Store) -> None:
    publish(store, "pairs", {})
    parts = {"priors": 10, "decoder": 64, "upsampler_256": 9, "upsampler_1024": 0}
    rows = {part: {"keys": ["k"] * count} for part, count in parts.items()}
    blob = put_blob(store, str({"rows": rows, "few": {"upsampler_1024": 1}}).replace("'", '"').encode())
    publish(store, "evaluation", {}, blobs={"evaluation.json": blob})
    (one,) = observe(store, "nano").stages["evaluation"]
    assert one.short == {"priors": 0.1, "upsampler_256": 0.09, "upsampler_1024": 0.01}
    assert one.passes["upsampler_1024"] == 0
    assert one.passes["upsampler_256"] == 9 * 8 * 8  # rows, samples, steps


def test_an_evaluation_of_too_few_rows_tells_nothing_of_one_that_measures(store: Store) -> None:
    publish(store, "pairs", {})
    rows = {part: {"keys": []} for part in ("priors", "decoder", "upsampler_256", "upsampler_1024")}
    few = {"priors": 7, "decoder": 7, "upsampler_256": 3, "upsampler_1024": 0}
    blob = put_blob(store, str({"rows": rows, "few": few}).replace("'", '"').encode())
    publish(store, "evaluation", {}, blobs={"evaluation.json": blob})
    assert "evaluation" not in observe(store, "nano").stages


def test_passes_of_a_caption() -> None:
    passes = passes_of("samples", Ask(CONFIG, 320).recipes)
    prior = 1 + 16 * 3 / 36  # a caption once, and three of 36 positions a step
    assert passes == {
        "diffusion_prior": 2 * prior,
        "decoder": 2 * 16,
        "upsampler_256": 16 * 8,
        "upsampler_1024": 16 * 4,
    }
    small = load_config(ROOT / "configs/nano.yaml", ["bundle.sampling.size=64", "bundle.sampling.prior=ar"])
    assert passes_of("samples", Ask(small, 320).recipes) == {"ar_prior": 2, "decoder": 32}


def test_another_model_is_another_stage_and_dropout_is_not() -> None:
    recipes = Ask(CONFIG, 320).recipes
    same = Ask(load_config(ROOT / "configs/nano.yaml", ["decoder.model.dropout=0.1", "decoder.batch=32"]), 1).recipes
    wide = Ask(load_config(ROOT / "configs/nano.yaml", ["decoder.model.channels=64"]), 1).recipes
    assert shape("decoder", same) == shape("decoder", recipes) != shape("decoder", wide)
    assert shape("evaluation", wide) != shape("evaluation", recipes)
    assert shape("embeddings", wide) == shape("embeddings", recipes)
    other = Ask(load_config(ROOT / "configs/nano.yaml", ["clip.model.width=128"]), 1).recipes
    assert shape("embeddings", other) != shape("embeddings", recipes)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    one = Observation(10.0, 3.0, 2.0, 2, {"model.layers": [1, 2]}, {"decoder": 4.0}, device="cuda", utilisation=0.4)
    profile = Profile({"clip": [one]}) + Profile({"clip": [replace(one, amount=20.0)], "pairs": [one]})
    profile.save(tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile
    assert [seen.amount for seen in profile.of("clip", {"model.layers": [1, 2]})] == [10.0, 20.0]
    assert profile.of("clip", {}) == []


def test_what_is_no_profile_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_profile(tmp_path / "none.json")
    for text in ("", "[]", "{}", '{"format": 1, "stages": {"clip": [{"amount": 1}]}}'):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(UserError, match="not a profile; --save-profile writes one"):
            load_profile(tmp_path / "p.json")
    (tmp_path / "p.json").write_text('{"format": 2, "stages": {}}')
    with pytest.raises(UserError, match="newer"):
        load_profile(tmp_path / "p.json")
    with pytest.raises(UserError, match="cannot be written"):
        Profile().save(tmp_path / "no/such/folder.json")
