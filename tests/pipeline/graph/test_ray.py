"""Joining a cluster, and whether what stages ask for is there: refused, lowered or waited for."""

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.graph import ray as launch
from pipeline.graph.ray import find_room, may_grow, start_ray
from pipeline.graph.resources import Node
from pipeline.settings import EmbeddingsSettings, RaySettings, ShardSettings, TrainingSettings


def ray_of(*nodes: Node) -> Any:
    """What is asked of Ray, with these nodes and a dead one."""
    listed = [
        {
            "NodeID": f"{i:056x}",
            "Alive": node.host != "dead",
            "NodeManagerHostname": node.host,
            "NodeManagerAddress": "10.0.0.1",
            "Resources": {"CPU": node.cpus, "GPU": node.gpus, "memory": node.memory},
            "Labels": dict(node.labels),
        }
        for i, node in enumerate([*nodes, Node("dead", 99, 99, 1 << 40, {"pool": "gpu"})])
    ]
    return SimpleNamespace(nodes=lambda: listed)


HEAD, CPU = Node("head", 0, 0), Node("cpu", 4, 0, 8 << 30, {"pool": "cpu"})
ASKED = {
    "pairs": ShardSettings(2),
    "embeddings": EmbeddingsSettings(2, gpus=1),
    "decoder": TrainingSettings(workers=6),
    "codec": ShardSettings(2, {"pool": "gpu"}),
}
MISSING = (
    "embeddings: 2 workers with 1 GPU each, no node has a GPU; "
    "decoder: 6 workers with 1 core each, there is room for 4 at once; "
    "codec: 2 workers with 1 core each, no node has the label pool=gpu"
)


@pytest.fixture
def on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")


def says(monkeypatch: pytest.MonkeyPatch, grows: bool) -> None:
    monkeypatch.setattr(launch, "may_grow", lambda _: grows)


@pytest.mark.usefixtures("on_a_cluster")
def test_a_cluster_that_cannot_grow_is_told_all_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    says(monkeypatch, grows=False)
    with pytest.raises(UserError) as refused:
        find_room(ray_of(HEAD, CPU), ASKED, refuse=True)
    assert str(refused.value) == (
        f"what the cluster can never run: {MISSING}; add such nodes, or ask for less under run, and start again"
    )
    with caplog.at_level(logging.WARNING, "unclip"):
        teams = find_room(ray_of(HEAD, CPU), ASKED)  # a stage has come to its turn: a node that was lost may come back
    assert {stage: team.count for stage, team in teams.items()} == {s: own.workers for s, own in ASKED.items()}
    assert caplog.messages == [f"{MISSING}; waiting for nodes that have it"]


@pytest.mark.usefixtures("on_a_cluster")
def test_a_cluster_that_may_grow_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    says(monkeypatch, grows=True)
    with caplog.at_level(logging.WARNING, "unclip"):
        assert find_room(ray_of(HEAD), ASKED, refuse=True)["pairs"].count == 2
    assert len(caplog.messages) == 1
    assert "pairs: 2 workers with 1 core each, no node has a core; embeddings: " in caplog.messages[0]
    caplog.clear()
    find_room(ray_of(CPU), {"pairs": ShardSettings(40)}, refuse=True)
    assert not caplog.messages


def test_on_this_machine_workers_are_lowered_and_what_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here = ray_of(Node("here", 2, 1))
    with caplog.at_level(logging.INFO, "unclip"):
        for _ in range(2):
            teams = find_room(here, {"pairs": ShardSettings(5), "clip": TrainingSettings(workers=2, device="cuda")})
            assert {stage: team.count for stage, team in teams.items()} == {"pairs": 2, "clip": 1}
    assert caplog.messages == [
        f"run.{stage}.workers: {asked} are asked for, and there is room for {room}; going on with {room}"
        for stage, asked, room in (("pairs", 5, 2), ("clip", 2, 1))
    ]
    with pytest.raises(UserError, match=r"this machine: codec: .* no node has the label pool=gpu; lower it under run"):
        find_room(here, {"pairs": ShardSettings(2), "codec": ASKED["codec"]})


@pytest.mark.usefixtures("on_a_cluster")
def test_workers_that_would_take_the_cores_of_their_helpers_are_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"embeddings": EmbeddingsSettings(4, decoders=1), "pairs": ShardSettings(9)}
    for grows, workers in ((False, 2), (True, 4)):
        says(monkeypatch, grows)
        teams = find_room(ray_of(CPU), wanted)
        assert {stage: team.count for stage, team in teams.items()} == {"embeddings": workers, "pairs": 9}


@pytest.mark.parametrize(
    ("report", "grows"),
    [
        ({"node_type_mapping": {f"{i}": f"node_{i:056x}" for i in (0, 1)}}, False),
        ({"node_type_mapping": {"10.0.0.1": "ray.head.default"}}, True),
        ({"node_type_mapping": {"0": f"node_{0:056x}", "10.0.0.2": "node_gpu"}}, True),
        ({"node_type_mapping": {}}, True),  # it does not say
        ({"node_type_mapping": None}, True),
        (None, True),
    ],
)
def test_what_the_monitor_says_of_an_autoscaler(report: Any, grows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.experimental import internal_kv

    status = json.dumps({"time": 1.0} | ({"autoscaler_report": report} if report else {})).encode()
    monkeypatch.setattr(internal_kv, "_internal_kv_get", {launch.AUTOSCALING_STATUS: status}.get)
    monkeypatch.setattr(launch, "AUTOSCALER_S", 0.0)
    assert may_grow(ray_of(HEAD, CPU)) is grows


def test_clusters_of_raylets_have_no_autoscaler_and_other_versions_do_not_join(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.cluster_utils import Cluster

    memory = 100 << 20
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": memory, "include_dashboard": False}
    )
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        with monkeypatch.context() as other:
            other.setattr(ray, "__version__", "2.59.0")
            with pytest.raises(UserError, match=r"is another version; install the same here: .* Ray: 2\.59\.0"):
                start_ray(RaySettings())
        assert not ray.is_initialized()
        with pytest.raises(UserError, match=r"^what the cluster can never run: embeddings: 2 workers with 1 GPU each"):
            find_room(start_ray(RaySettings()), {"embeddings": ASKED["embeddings"]}, refuse=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
