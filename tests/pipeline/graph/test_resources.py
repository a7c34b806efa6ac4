"""What stages take, and what nodes can hold: counted, lowered and refused without any Ray."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config, make_config
from pipeline.doctor.readiness import on_ray
from pipeline.graph.resources import Node, Settings, Share, Team, has_labels, lacking, room, team_of
from pipeline.settings import EmbeddingsSettings, ShardSettings, TrainingSettings

ROOT = Path(__file__).parents[3]
LEAST: dict[str, Any] = {"project": "p", "store": "s", "source": {"paths": ["a.csv"]}}
CPU, SMALL = Node("cpu", 8, 0, 16 << 30, {"pool": "cpu"}), Node("small", 2, 0, 4 << 30)
GPU = Node("gpu", 4, 2, 64 << 30, {"pool": "gpu"})


@pytest.mark.parametrize(
    ("value", "fits"),
    [("cpu", True), ("gpu", False), ("!gpu", True), ("!cpu", False), ("in(gpu, cpu)", True), ("in(gpu,tpu)", False),
     ("!in(gpu,tpu)", True), ("!in(gpu,cpu)", False)],
)  # fmt: skip
def test_labels_are_matched_as_ray_does(value: str, fits: bool) -> None:
    assert has_labels(CPU, {"pool": value}) is fits
    assert has_labels(SMALL, {"pool": value}) is value.startswith("!")  # it has no such label


def test_a_worker_takes_a_core_or_its_gpu_unless_it_is_told() -> None:
    assert team_of(ShardSettings(3), [], True) == Team(3, 1, Share(1))
    settings = EmbeddingsSettings(workers=2, gpus=0.5, decoders=3, decoder_nodes={"pool": "cpu"}, memory_mb=100)
    assert team_of(settings, [], True) == Team(2, 1, Share(0, 0.5, 100 << 20), 3, Share(labels={"pool": "cpu"}))
    assert team_of(replace(settings, cpus=4), [], True).worker == Share(4, 0.5, 100 << 20)
    assert team_of(TrainingSettings(workers=2, nodes={"a": "b"}), [], False) == Team(2, 2, Share(1, labels={"a": "b"}))


@pytest.mark.parametrize(
    ("changes", "least", "on_one_machine"),
    [({}, 4, 1), ({"min_workers": 2}, 2, 2), ({"sharded": True}, 4, 4)],
)
def test_how_few_workers_a_training_makes_do_with(changes: Any, least: int, on_one_machine: int) -> None:
    settings = TrainingSettings(workers=4, **changes)
    assert team_of(settings, [CPU], local=False).least == least
    assert team_of(settings, [CPU], local=True).least == on_one_machine


@pytest.mark.parametrize(
    ("device", "workers", "nodes", "gpus"),
    [("auto", 2, [GPU], 1), ("auto", 3, [GPU], 0), ("auto", 2, [CPU], 0), ("cpu", 2, [GPU], 0), ("cuda", 3, [CPU], 1)],
)
def test_a_training_takes_gpus_that_are_there_or_that_it_must_have(
    device: str, workers: int, nodes: list[Node], gpus: int
) -> None:
    share = team_of(TrainingSettings(workers=workers, device=device), nodes, local=False).worker
    assert (share.gpus, share.cpus) == (gpus, 0 if gpus else 1)


@pytest.mark.parametrize(
    ("team", "holds"),
    [
        (Team(20, 1, Share(1)), 14),
        (Team(5, 1, Share(1)), 5),
        (Team(20, 1, Share(3)), 2 + 1),
        (Team(99, 1, Share(0.3)), 26 + 13 + 6),
        (Team(9, 1, Share(0, 0.5)), 4),
        (Team(99, 1, Share(1, memory=3 << 30)), 5 + 4 + 1),
        (Team(99, 1, Share(1, labels={"pool": "cpu"})), 8),
        (Team(9, 1, Share(9)), 0),
        (Team(9, 1, Share(1), 1), 7),
        (Team(9, 1, Share(1), 6), 2),
        (Team(9, 1, Share(0, 1), 6, Share(labels={"pool": "cpu"})), 1),
        (Team(9, 1, Share(4), 4, Share(labels={"pool": "cpu"})), 1),
        (Team(9, 1, Share(4), 8, Share(labels={"pool": "cpu"})), 1),  # the worker has to go to the other node
        (Team(9, 1, Share(1), 15), 0),
    ],
)
def test_room(team: Team, holds: int) -> None:
    assert room(team, [CPU, GPU, SMALL]) == holds
    assert room(team, [SMALL, GPU, CPU]) == holds


@pytest.mark.parametrize(
    ("team", "said"),
    [
        (Team(2, 1, Share(0, 1)), "2 workers with 1 GPU each, no node has a GPU"),
        (Team(1, 1, Share(2, 4)), "1 worker with 4 GPUs and 2 cores, no node has a GPU"),
        (Team(2, 1, Share(9)), "2 workers with 9 cores each, no node has more than 8 cores"),
        (Team(2, 1, Share(1, 0, 32 << 30)),
         "2 workers with 1 core and 32,768 MiB each, no node has more than 16,384 MiB for Ray's workers"),
        (Team(2, 1, Share(1, labels={"pool": "gpu"})), "2 workers with 1 core each, no node has the label pool=gpu"),
        (Team(2, 1, Share(9, labels={"pool": "cpu"})),
         "2 workers with 9 cores each, no node with pool=cpu has more than 8 cores"),
        (Team(12, 12, Share(1)), "12 workers with 1 core each, there is room for 10 at once"),
        (Team(14, 12, Share(1)), "at least 12 workers with 1 core each, there is room for 10 at once"),
        (Team(2, 1, Share(1), 10),
         "2 workers with 1 core and 10 decoders of 1 core each, there is room for none"),
        (Team(2, 1, Share(1), 1, Share(labels={"pool": "x"})),
         "2 workers with 1 core and 1 decoder of 1 core each, no node for decoders has the label pool=x"),
        (Team(10, 10, Share(1)), ""),
        (Team(99, 1, Share(8)), ""),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(team: Team, said: str) -> None:
    assert lacking("clip", team, [CPU, SMALL]) == (f"clip: {said}" if said else "")


def test_no_node_has_all_of_it() -> None:
    team = Team(1, 1, Share(8, 1))
    assert lacking("clip", team, [CPU, GPU]) == "clip: 1 worker with 1 GPU and 8 cores, no node has all of that"


@pytest.mark.parametrize("path", [None, *sorted((ROOT / "configs").glob("*.yaml"))], ids=str)
@pytest.mark.parametrize("cores", [1, 2])
def test_on_two_cores_and_on_one_every_stage_has_room(path: Path | None, cores: int) -> None:
    """The defaults, and every configuration that comes with it."""
    config = load_config(path) if path else make_config(LEAST)
    wanted: dict[str, Settings] = on_ray(config, vars(config))
    assert {"pairs", "embeddings"} <= wanted.keys()
    here = Node("here", cores, 0, 1 << 30)
    for stage, settings in wanted.items():
        assert lacking(stage, team_of(settings, [here], local=True), [here]) == ""


def test_stages_that_work_without_ray_are_not_looked_at() -> None:
    run = {"pairs": {"workers": 0}, "clip": {"workers": 2}, "decoder": {"workers": 2}}
    stages = ("source", "captions", "pairs", "clip", "embeddings", "decoder", "samples")
    assert on_ray(make_config(LEAST | {"run": run}), stages).keys() == {"clip", "embeddings", "decoder"}
    bought = make_config(LEAST | {"run": run, "clip": {"weights": "open_clip:ViT-B-32:openai"}})
    assert on_ray(bought, stages).keys() == {"embeddings", "decoder"}
    assert on_ray(bought, []) == {}


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="labels and min_workers exclude each other"):
        TrainingSettings(workers=2, min_workers=1, nodes={"pool": "gpu"})


def test_a_share_of_a_gpu_lies_on_one() -> None:
    places = [Share(0.0, gpus).places(Node("a", 8, 4)) for gpus in (0.1, 0.4, 0.5, 0.6, 1.0, 2.0, 3.0, 5.0)]
    assert places == [40, 8, 8, 4, 4, 2, 1, 0]
