"""Pods: the configuration's workers fit into them, and no more are asked for than a stage can use."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.pods import Group, demands, groups
from pipeline.config import Run, make_config
from pipeline.errors import UserError

SHAPE = {"cpus": 8, "gpus": 4, "gpu_cpus": 16, "gpu_memory_gb": 64}


def with_settings(**stages: Any) -> Run:
    run = {"kubernetes": SHAPE, **stages}
    return make_config({"project": "p", "store": "s3://b/p", "source": {"paths": ["a.csv"]}, "run": run}).run


def sizes(found: list[Group]) -> dict[str, tuple[int, dict[str, str]]]:
    return {group.name: (group.pods, dict(group.labels)) for group in found}


def test_stages_without_workers_need_no_pods() -> None:
    run = with_settings(pairs={"workers": 0}, codec={"workers": 0})
    assert groups(run, ["source", "captions", "pairs", "codec", "decoder", "bundle", "evaluation"]) == []


def test_stages_that_are_not_made_count_for_nothing() -> None:
    run = with_settings(pairs={"workers": 80}, curation={"workers": 9}, decoder={"workers": 64})
    assert sizes(groups(run, ["curation"])) == {"cpu": (2, {})}


def test_a_group_has_what_the_largest_stage_asks_for() -> None:
    run = with_settings(pairs={"workers": 33}, curation={"workers": 9}, clip={"workers": 5}, decoder={"workers": 8})
    assert sizes(groups(run, ["pairs", "curation", "clip", "decoder"])) == {"cpu": (5, {}), "gpu": (2, {})}


def test_decoders_and_encoders_of_one_stage_run_at_once() -> None:
    on_cores = {"workers": 5, "decoders": 3}  # 20 cores
    assert sizes(groups(with_settings(embeddings=on_cores), ["embeddings"])) == {"cpu": (3, {})}
    apart = {"workers": 8, "gpus": 1, "decoders": 3, "nodes": {"pool": "gpu"}, "decoder_nodes": {"pool": "cpu"}}
    found = sizes(groups(with_settings(embeddings=apart), ["embeddings"]))
    assert found == {"gpu": (2, {"pool": "gpu"}), "cpu": (3, {"pool": "cpu"})}


def test_a_training_finds_room_on_the_pods_of_the_embeddings() -> None:
    run = with_settings(embeddings={"workers": 2, "gpus": 1, "nodes": {"pool": "gpu"}}, decoder={"workers": 8})
    assert sizes(groups(run, ["embeddings", "decoder"])) == {"gpu": (2, {"pool": "gpu"})}


def test_labels_that_contradict_make_two_groups() -> None:
    run = with_settings(
        pairs={"workers": 8, "nodes": {"pool": "near"}}, curation={"workers": 8, "nodes": {"pool": "far"}}
    )
    found = sizes(groups(run, ["pairs", "curation"]))
    assert found == {"cpu": (1, {"pool": "near"}), "cpu-2": (1, {"pool": "far"})}


@pytest.mark.parametrize(
    ("selector", "labels"),
    [("gpu", {"pool": "gpu"}), ("in(a, b)", {"pool": "a"}), ("in(a)", {"pool": "a"}), ("!a", {}), ("!in(a,b)", {})],
)
def test_labels_satisfy_the_selector(selector: str, labels: dict[str, str]) -> None:
    run = with_settings(pairs={"workers": 1, "nodes": {"pool": selector}})
    assert sizes(groups(run, ["pairs"])) == {"cpu": (1, labels)}


@settings(deadline=None)
@given(st.integers(1, 100), st.sampled_from([0.1, 0.25, 0.4, 0.5, 0.6, 1.0, 2.0, 3.0, 4.0]))
def test_workers_with_gpus_fit_and_with_one_pod_less_they_would_not(workers: int, share: float) -> None:
    (group,) = groups(with_settings(embeddings={"workers": workers, "gpus": share}), ["embeddings"])
    each = math.floor(1 / share) if share < 1 else 1  # workers on the GPUs that one worker or more take
    taken = max(1, int(share))
    room = [pods * (group.gpus // taken) * each for pods in (group.pods - 1, group.pods)]
    assert room[0] < workers <= room[1]


def test_a_worker_larger_than_a_pod_is_refused() -> None:
    with pytest.raises(UserError, match=r"run\.embeddings\.gpus: 5 a worker are more than the 4 of a pod"):
        groups(with_settings(embeddings={"workers": 1, "gpus": 5}), ["embeddings"])


def test_cores_and_memory_that_a_worker_sets_aside_are_in_its_pod() -> None:
    run = with_settings(pairs={"workers": 9, "cpus": 3}, codec={"workers": 3, "memory_mb": 11_000})
    assert sizes(groups(run, ["pairs"])) == {"cpu": (5, {})}  # two in a pod of 8 cores
    assert sizes(groups(run, ["codec"])) == {"cpu": (2, {})}  # two in 0.7 of 32 GiB
    training = {"workers": 8, "device": "cuda", "cpus": 8, "nodes": {"pool": "gpu"}}
    assert sizes(groups(with_settings(decoder=training), ["decoder"])) == {"gpu": (4, {"pool": "gpu"})}
    for field, most in (("cpus", 8), ("memory_mb", 22_937)):
        with pytest.raises(UserError, match=rf"run\.pairs\.{field}: .* a worker are more than the {most} of a pod"):
            groups(with_settings(pairs={"workers": 1, field: most + 1}), ["pairs"])


def test_the_driver_trains_on_a_gpu_only_where_the_head_has_one() -> None:
    training = {"workers": 0, "device": "cuda"}
    with pytest.raises(UserError, match=r"run\.decoder\.workers: with 0 the driver trains"):
        list(demands(with_settings(decoder=training), ["decoder"]))
    run = with_settings(decoder=training, kubernetes=SHAPE | {"head_gpus": 1})
    assert list(demands(run, ["decoder"])) == []
