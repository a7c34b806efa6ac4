from dataclasses import replace
from pathlib import Path

import pytest

from models.presets import PRESETS
from pipeline.artifacts import Artifact, publish_artifact
from pipeline.build import build
from pipeline.config import load_config
from pipeline.cost import Cost, estimate, forward_flops
from pipeline.graph import flatten, plan
from pipeline.history import remember
from pipeline.ledger import Ledger
from pipeline.store import Store, open_store

ROOT = Path(__file__).parents[2]
CONFIG = load_config(ROOT / "configs/nano.yaml")
GRAPH = build(CONFIG)


@pytest.fixture
def measured(tmp_path: Path) -> Store:
    """A store in which every stage took 10 s for its samples, or for 100 rows."""
    store = open_store(str(tmp_path))
    verdicts = plan(GRAPH, {"source": "s", "captions": "c"}, "nano", store, {})
    remember(store, "nano", GRAPH, verdicts)
    for v in verdicts:
        recipe = flatten(GRAPH[v.stage].recipe)
        publish_artifact(store, Artifact(v.stage, v.key, {}, recipe, Ledger(kept=100)), 10.0)
    return store


def test_nothing_made_yet_is_a_guess(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for stage in GRAPH.values():
        cost = estimate(stage, 320, "nano", store)
        assert not cost.measured
        assert 0 <= cost.seconds < 3600
    assert (
        estimate(GRAPH["pairs"], 640, "nano", store).seconds == 2 * estimate(GRAPH["pairs"], 320, "nano", store).seconds
    )
    assert list(store.list("")) == []


def test_what_was_measured_scales_with_rows_and_samples(measured: Store) -> None:
    assert estimate(GRAPH["pairs"], 250, "nano", measured) == Cost(25.0, True)
    assert estimate(GRAPH["decoder"], 250, "nano", measured) == Cost(10.0, True)
    decoder = GRAPH["decoder"]
    twice = replace(decoder, recipe=replace(decoder.recipe, samples=2 * decoder.recipe.samples))
    assert estimate(twice, 250, "nano", measured) == Cost(20.0, True)
    assert estimate(GRAPH["evaluation"], 250, "nano", measured) == Cost(10.0, True)  # its rows are the recipe's


def test_another_model_or_project_is_a_guess_again(measured: Store) -> None:
    decoder = GRAPH["decoder"]
    wider = replace(decoder, recipe=replace(decoder.recipe, model=replace(decoder.recipe.model, channels=64)))
    assert not estimate(wider, 250, "nano", measured).measured
    assert not estimate(decoder, 250, "other", measured).measured


def test_a_larger_model_costs_more() -> None:
    sizes = [PRESETS[name] for name in ("nano", "tiny", "small", "paper")]
    for stage in ("ar_prior", "diffusion_prior", "decoder", "upsampler_256", "upsampler_1024"):
        costs = [forward_flops(size[stage]) for size in sizes]
        assert costs == sorted(costs), stage
        assert costs[0] > 0
    with pytest.raises(TypeError, match="no cost known for str"):
        forward_flops("decoder")


def test_weights_that_exist_are_not_trained(tmp_path: Path) -> None:
    paper = build(load_config(ROOT / "configs/paper.yaml"))
    store = open_store(str(tmp_path))
    assert estimate(paper["clip"], 10_000, "paper", store).seconds < 3600
    assert estimate(paper["decoder"], 10_000, "paper", store).seconds > 1e6
