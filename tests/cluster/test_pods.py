"""Pods: the configuration's workers fit into them, and more are never asked for than there are workers."""

from dataclasses import replace
from typing import Any

import pytest

from cluster.pods import Group, demands, groups, with_fixed_workers
from pipeline.config import Config, Run, make_config
from pipeline.errors import UserError

SHAPE = {"cpus": 8, "gpus": 4, "gpu_cpus": 16, "gpu_memory_gb": 64}


def configured(**stages: Any) -> Config:
    run = {"kubernetes": SHAPE, **stages}
    return make_config({"project": "p", "store": "s3://b/p", "source": {"paths": ["a.csv"]}, "run": run})


def with_settings(**stages: Any) -> Run:
    return configured(**stages).run


def sizes(found: list[Group]) -> dict[str, tuple[int, dict[str, str]]]:
    return {group.name: (group.most, dict(group.labels)) for group in found}


APART = {"workers": 8, "gpus": 1, "decoders": 3, "nodes": {"pool": "gpu"}, "decoder_nodes": {"pool": "cpu"}}


@pytest.mark.parametrize(
    ("stages", "made", "found"),
    [
        # stages without workers, or that are made already, need no pods
        ({name: {"workers": 0} for name in ("source", "pairs", "codec", "decoder")}, "source pairs codec decoder", {}),
        ({"pairs": {"workers": 80}, "curation": {"workers": 9}}, "curation", {"cpu": (2, {})}),
        # as many workers as fit share a pod, by the scarcest of what they take
        ({"pairs": {"workers": 10, "cpus": 3}}, "pairs", {"cpu": (5, {})}),
        ({"pairs": {"workers": 10, "cpus": 0.1, "memory_mb": 10_000}}, "pairs", {"cpu": (4, {})}),
        ({"embeddings": {"workers": 9, "gpus": 0.1, "decoders": 0}}, "embeddings", {"gpu": (1, {})}),
        # one on each of four
        ({"embeddings": {"workers": 9, "gpus": 0.6, "decoders": 0}}, "embeddings", {"gpu": (3, {})}),
        # branches may run side by side, so a group has room for all
        (
            {"pairs": {"workers": 33}, "curation": {"workers": 9}, "clip": {"workers": 5}, "decoder": {"workers": 8}},
            "pairs curation clip decoder",
            {"cpu": (7, {}), "gpu": (4, {})},
        ),
        # decoders and encoders of one stage run at once
        ({"embeddings": {"workers": 5, "decoders": 3, "gpus": 0}}, "embeddings", {"cpu": (3, {})}),
        ({"embeddings": APART}, "embeddings", {"gpu": (2, {"pool": "gpu"}), "cpu": (3, {"pool": "cpu"})}),
        # a training, which asks for no label, runs on the pods of the embeddings
        (
            {"embeddings": {"workers": 2, "gpus": 1, "nodes": {"pool": "gpu"}}, "decoder": {"workers": 8}},
            "embeddings decoder",
            {"gpu": (3, {"pool": "gpu"}), "cpu": (3, {})},
        ),
        # where nothing is said, one pod is filled, and an encoder has twelve decoders
        ({}, "pairs", {"cpu": (1, {})}),
        ({}, "embeddings decoder", {"gpu": (2, {}), "cpu": (6, {})}),
        ({"kubernetes": SHAPE | {"gpus": 0}}, "embeddings decoder", {"cpu": (1, {})}),
        # labels that contradict make two groups
        (
            {"pairs": {"workers": 8, "nodes": {"pool": "near"}}, "curation": {"workers": 8, "nodes": {"pool": "far"}}},
            "pairs curation",
            {"cpu": (1, {"pool": "near"}), "cpu-2": (1, {"pool": "far"})},
        ),
        (
            {
                "pairs": {"workers": 8, "nodes": {"pool": "a"}},
                "curation": {"workers": 8, "nodes": {"pool": "!in(a, b)"}},
            },
            "pairs curation",
            {"cpu": (1, {"pool": "a"}), "cpu-2": (1, {})},
        ),
        (
            {"pairs": {"workers": 8, "nodes": {"pool": "!a"}}, "curation": {"workers": 8, "nodes": {"pool": "a"}}},
            "pairs curation",
            {"cpu": (1, {}), "cpu-2": (1, {"pool": "a"})},
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


def test_a_job_takes_numbers_along_for_a_cluster_that_is_not_there_yet() -> None:
    run = with_fixed_workers(configured(clip={"workers": 2}), ["clip", "embeddings", "decoder", "curation"])
    assert (run.curation.workers, run.embeddings.workers, run.decoder.workers, run.clip.workers) == (8, 4, 4, 2)
    assert (run.pairs.workers, run.ray.autoscaler) == ("auto", True)  # which is made already
    none = with_fixed_workers(
        configured(kubernetes=SHAPE | {"gpus": 0}, clip={"workers": 2}), ["clip", "embeddings", "decoder"]
    )
    assert (none.embeddings.workers, none.embeddings.gpus, none.decoder.workers, none.clip.device) == (8, 0, 0, "cpu")
    head = with_fixed_workers(configured(kubernetes=SHAPE | {"gpus": 0, "head_gpus": 1}), ["decoder"])
    assert (head.decoder.workers, head.decoder.device) == (0, "auto")  # which the driver finds
    config = configured(clip={"workers": 4, "device": "cuda"})
    named = replace(config.clip, weights="open_clip:ViT-B-32:openai")
    config = replace(config, clip=named)  # type: ignore[call-arg]
    assert list(demands(with_fixed_workers(config, ["clip"]), ["clip"])) == []  # nothing trains
