"""What artefacts record of their time, and lines through it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.sampling_config import MODELS
from pipeline.build import build
from pipeline.config import load_config
from pipeline.cost.observed import Observation, observe, pace, paces, read_profile, shape
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.keys import flatten
from pipeline.graph.plan import plan
from pipeline.graph.runs import record_run
from pipeline.graph.stages import Recipes
from pipeline.ledger import Ledger
from pipeline.store import Store, open_store

NANO = Path(__file__).parents[3] / "configs/nano.yaml"
CONFIG = load_config(NANO)
GRAPH = build(CONFIG)
POSITIVE = st.floats(1e-3, 1e4)
SOURCE = {"source": "s", "captions": "c"}


def recipes(*overrides: str) -> Recipes:
    return {name: flatten(stage.recipe) for name, stage in build(load_config(NANO, overrides)).items()}


def seen(amount: float, seconds: float, work: float, workers: int = 1) -> tuple[float, Observation]:
    return amount, Observation(amount, seconds, work, workers, {})


@given(start=POSITIVE, rate=POSITIVE, workers=st.integers(1, 64), more=st.integers(1, 64))
def test_a_pace_knows_other_amounts_and_other_workers(start: float, rate: float, workers: int, more: int) -> None:
    points = [seen(n, start + n / rate / workers, n / rate, workers) for n in (100.0, 700.0)]
    for known in (points, points[:1]):
        startup, seconds = pace(known, 10_000.0, more)
        assert startup == pytest.approx(start, rel=1e-3, abs=1e-6 * seconds)
        assert seconds == pytest.approx(start + 10_000 / rate / more, rel=1e-3)


@given(st.lists(st.tuples(*[st.integers(0, 10**6)] * 3), min_size=1, max_size=2))
def test_nothing_is_below_zero(points: list[tuple[int, int, int]]) -> None:
    startup, seconds = pace([seen(*one) for one in sorted(points)], 50.0, 2)
    assert 0 <= startup <= seconds


def test_a_second_run_that_says_nothing_of_growth_is_a_rate() -> None:
    assert pace([seen(10, 6, 6), seen(20, 5, 5)], 40, 1)[1] == pytest.approx(11.75)  # 0.25 a row, and 1.75 on average
    assert pace([seen(10, 1, 1), seen(20, 3, 3)], 40, 1)[1] == pytest.approx(6)  # the line would begin below 0
    assert pace([seen(10, 5, 5), seen(10, 5, 5)], 40, 1)[1] == pytest.approx(20)


@given(
    st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=3),
    st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=3),
)
def test_repeated_measurements_are_as_many_lines_as_pairs(
    small: list[tuple[float, float]], large: list[tuple[float, float]]
) -> None:
    """In whatever order they come; the amounts of a run differ a little where rows are lost."""
    few = [seen(100 + i, *times) for i, times in enumerate(small)]
    many = [seen(300 - i, *times) for i, times in enumerate(large)]
    found = paces([*many, *few], 10_000.0, 2)
    assert found == sorted((pace([a, b], 10_000.0, 2) for a in few for b in many), key=lambda line: line[1])


def test_repeated_measurements_of_one_amount_are_a_line_each() -> None:
    points = [seen(100, seconds, seconds) for seconds in (12.0, 10.0, 11.0)]
    assert [whole for _, whole in paces(points, 1000.0, 1)] == pytest.approx([100, 110, 120])


# --- from artefacts ---------------------------------------------------------------------------------------------------


def publish(store: Store, stage: str, times: dict[str, float], **fields: object) -> None:
    key = next(v.key for v in plan(GRAPH, SOURCE, "nano", store, {}) if v.stage == stage)
    artifact = Artifact(stage, key, {}, flatten(GRAPH[stage].recipe), Ledger(kept=100), times=times)
    publish_artifact(store, replace(artifact, **fields), times.get("seconds", 10.0))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path / "store"))
    record_run(store, "nano", GRAPH, plan(GRAPH, SOURCE, "nano", store, {}))
    return store


def test_a_data_stage_tells_what_its_workers_did(store: Store) -> None:
    times = {"busy_seconds": 12.0, "made_rows": 100, "workers": 2, "whole_seconds": 11.0, "written_bytes": 900.0}
    publish(store, "pairs", times)
    publish(store, "embeddings", {"busy_seconds": 3.0, "made_rows": 25, "workers": 1})  # a quarter was made
    publish(store, "curation", {"made_rows": 0, "workers": 1, "gpus": 0})  # and nothing of this
    found = observe(store, "nano", GRAPH, 0.1)
    assert found["embeddings"][0].amount == 25
    assert "curation" not in found
    (one,) = found["pairs"]
    assert (one.amount, one.seconds, one.work, one.workers, one.disk) == (100, 11.0, 12.0, 2, 900)
    assert pace([(one.amount, one)], 300, 4) == (pytest.approx(5.0), pytest.approx(5.0 + 36 / 4))


def test_a_training_tells_of_its_steps_and_of_the_rest(store: Store) -> None:
    times = {"seconds": 20.0, "share_pause": 0.25, "samples_per_second": 5.0, "whole_seconds": 26.0}
    publish(store, "decoder", times, metrics={"samples_seen": 100}, environment={"device": "cuda:1", "workers": "2"})
    (one,) = observe(store, "nano", GRAPH, 0.1)["decoder"]
    assert (one.amount, one.seconds, one.work, one.workers, one.device) == (100, 26.0, 30.0, 2, "cuda")


def test_an_evaluation_tells_of_the_rows_that_there_were(store: Store) -> None:
    publish(store, "pairs", {})
    publish(store, "evaluation", {})
    (one,) = observe(store, "nano", GRAPH, 0.1)["evaluation"]
    assert one.passes["upsampler_1024"] == 10 * 4 * 4  # rows, samples, steps
    assert "evaluation" not in observe(store, "nano", GRAPH, 0.07)  # of 7 rows there are no figures


@pytest.mark.parametrize("left_out", ["upsampler_1024", "diffusion_prior"])
def test_a_model_that_is_left_out_now_was_part_of_what_was_measured(store: Store, left_out: str) -> None:
    models = [name for name in MODELS if name != left_out]
    sampling = "bundle.sampling={size: 256, prior: ar, decoder_steps: 16, prior_steps: 16}"
    graph = build(load_config(NANO, [f"bundle.models={models}", sampling]))
    for stage in ("pairs", "samples", "evaluation"):
        publish(store, stage, {})
    found = observe(store, "nano", graph, 0.1)
    assert left_out in found["evaluation"][0].passes


def test_passes_of_a_caption() -> None:
    prior = 1 + 16 * 3 / 36  # a caption once, and three of 36 positions a step
    upsamplers = {"upsampler_256": 16 * 8, "upsampler_1024": 16 * 4}
    assert GRAPH["samples"].passes_of(recipes(), 0) == {"diffusion_prior": 2 * prior, "decoder": 2 * 16, **upsamplers}
    small = recipes("bundle.sampling.size=64", "bundle.sampling.prior=ar")
    assert GRAPH["samples"].passes_of(small, 0) == {"ar_prior": 2, "decoder": 32}


def test_another_model_is_another_stage_and_dropout_is_not() -> None:
    def shaped(stage: str, *overrides: str) -> dict[str, object]:
        return shape(stage, GRAPH, recipes(*overrides))

    assert shaped("decoder") == shaped("decoder", "decoder.model.dropout=0.1", "decoder.batch=32")
    assert shaped("decoder") != shaped("decoder", "decoder.model.channels=64") != {}
    assert shaped("evaluation") != shaped("evaluation", "decoder.model.channels=64")
    assert shaped("embeddings") == shaped("embeddings", "decoder.model.channels=64")
    assert shaped("embeddings") != shaped("embeddings", "clip.model.width=128")
    assert shaped("pairs") != shaped("pairs", "pairs.encode_format=png", "pairs.encode_quality=6")


# --- from a check of a GPU --------------------------------------------------------------------------------------------


def profile(folder: Path, **stages: object) -> Path:
    path = folder / "gpu-check.json"
    path.write_text(json.dumps({"kind": "cuda", "preset": "nano", "profile": stages}))
    return path


def test_a_profile_tells_of_trainings_with_the_models_that_it_measured(tmp_path: Path) -> None:
    wider = build(load_config(NANO, ["decoder.model.channels=64"]))
    rate = {"rows_per_second": 50.0, "utilisation": 0.4}
    path = profile(tmp_path, **{name: {"recipe": recipes()[name], **rate} for name in ("decoder", "ar_prior")})
    found = read_profile(path, GRAPH)
    assert found.keys() == {"decoder", "ar_prior"}
    (one,) = found["decoder"]
    assert (one.device, one.utilisation, one.shape) == ("cuda", 0.4, shape("decoder", GRAPH, recipes()))
    assert pace([(one.amount, one)], 1000.0, 2) == (0.0, pytest.approx(10.0))
    assert read_profile(path, wider).keys() == {"ar_prior"}
    with pytest.raises(UserError, match="models of preset nano, none of which is trained here"):
        read_profile(profile(tmp_path, decoder={"recipe": recipes()["decoder"], **rate}), wider)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": 1, "preset": 1, "profile": {"decoder": {"recipe": []}}}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not a result of make gpu-check"):
        read_profile(path, GRAPH)
    with pytest.raises(UserError, match="not a result of make gpu-check"):
        read_profile(tmp_path / "none.json", GRAPH)
