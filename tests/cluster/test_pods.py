"""Pods: the configuration's workers fit into them, and more are never asked for than there are workers."""

from typing import Any

import pytest

from cluster.pods import Group, demands, groups
from pipeline.config import Run, make_config
from pipeline.errors import UserError

SHAPE = {"cpus": 8, "gpus": 4, "gpu_cpus": 16, "gpu_memory_gb": 64}


def with_settings(**stages: Any) -> Run:
    run = {"kubernetes": SHAPE, **stages}
    return make_config({"project": "p", "store": "s3://b/p", "source": {"paths": ["a.csv"]}, "run": run}).run


def sizes(found: list[Group]) -> dict[str, tuple[int, dict[str, str]]]:
    return {group.name: (group.most, dict(group.labels)) for group in found}


APART = {"workers": 8, "gpus": 1, "decoders": 3, "nodes": {"pool": "gpu"}, "decoder_nodes": {"pool": "cpu"}}


@pytest.mark.parametrize(
    ("stages", "made", "found"),
    [
        # stages without workers, or that are made already, need no pods
        ({"pairs": {"workers": 0}, "codec": {"workers": 0}}, "source captions pairs codec decoder bundle", {}),
        ({"pairs": {"workers": 80}, "curation": {"workers": 9}}, "curation", {"cpu": (2, {})}),
        # as many workers as fit share a pod, by the scarcest of what they take
        ({"pairs": {"workers": 10, "cpus": 3}}, "pairs", {"cpu": (5, {})}),
        ({"pairs": {"workers": 10, "cpus": 0.1, "memory_mb": 10_000}}, "pairs", {"cpu": (4, {})}),
        ({"embeddings": {"workers": 9, "gpus": 0.1}}, "embeddings", {"gpu": (1, {})}),
        # branches may run side by side, so a group has room for all
        (
            {"pairs": {"workers": 33}, "curation": {"workers": 9}, "clip": {"workers": 5}, "decoder": {"workers": 8}},
            "pairs curation clip decoder",
            {"cpu": (7, {}), "gpu": (4, {})},
        ),
        # decoders and encoders of one stage run at once
        ({"embeddings": {"workers": 5, "decoders": 3}}, "embeddings", {"cpu": (3, {})}),
        ({"embeddings": APART}, "embeddings", {"gpu": (2, {"pool": "gpu"}), "cpu": (3, {"pool": "cpu"})}),
        # a training, which asks for no label, runs on the pods of the embeddings
        (
            {"embeddings": {"workers": 2, "gpus": 1, "nodes": {"pool": "gpu"}}, "decoder": {"workers": 8}},
            "embeddings decoder",
            {"gpu": (3, {"pool": "gpu"})},
        ),
        # labels that contradict make two groups
        (
            {"pairs": {"workers": 8, "nodes": {"pool": "near"}}, "curation": {"workers": 8, "nodes": {"pool": "far"}}},
            "pairs curation",
            {"cpu": (1, {"pool": "near"}), "cpu-2": (1, {"pool": "far"})},
        ),
    ],
)
def test_groups_of_the_stages(stages: dict[str, Any], made: str, found: dict[str, Any]) -> None:
    assert sizes(groups(with_settings(**stages), made.split())) == found


@pytest.mark.parametrize(
    ("selector", "labels"),
    [("gpu", {"pool": "gpu"}), ("in(a, b)", {"pool": "a"}), ("in(a)", {"pool": "a"}), ("!a", {}), ("!in(a,b)", {})],
)
def test_labels_satisfy_the_selector(selector: str, labels: dict[str, str]) -> None:
    run = with_settings(pairs={"workers": 1, "nodes": {"pool": selector}})
    assert sizes(groups(run, ["pairs"])) == {"cpu": (1, labels)}


@pytest.mark.parametrize(
    ("stage", "settings", "field", "most"),
    [
        ("embeddings", {"gpus": 5}, "gpus", 4),
        ("pairs", {"cpus": 9}, "cpus", 8),
        ("pairs", {"memory_mb": 31_131}, "memory_mb", 31_130),  # 0.95 of 32 GiB
        ("decoder", {"device": "cuda", "cpus": 17}, "cpus", 16),
        ("decoder", {"device": "cuda", "memory_mb": 62_261}, "memory_mb", 62_260),
    ],
)
def test_a_worker_larger_than_a_pod_is_refused(stage: str, settings: dict[str, Any], field: str, most: int) -> None:
    with pytest.raises(UserError, match=rf"run\.{stage}\.{field}: .* a worker are more than the {most} of a pod"):
        groups(with_settings(**{stage: {"workers": 1, **settings}}), [stage])
    smaller = {**settings, field: most}
    assert groups(with_settings(**{stage: {"workers": 1, **smaller}}), [stage])


def test_the_driver_trains_on_a_gpu_only_where_the_head_has_one() -> None:
    training = {"workers": 0, "device": "cuda"}
    with pytest.raises(UserError, match=r"run\.decoder\.workers: with 0 the driver trains"):
        list(demands(with_settings(decoder=training), ["decoder"]))
    run = with_settings(decoder=training, kubernetes=SHAPE | {"head_gpus": 1})
    assert list(demands(run, ["decoder"])) == []
