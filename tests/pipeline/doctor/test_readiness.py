"""A run on a cluster looks at all nodes before it writes anything. Real nodes, on loopback, and the real S3 server."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import make_config
from pipeline.doctor import readiness
from pipeline.doctor.machine import check_shared_memory
from pipeline.doctor.nodes import Answer, check_nodes, versions
from pipeline.errors import UserError
from pipeline.graph.ray import ClusterNode, ask_every_node, start_ray
from pipeline.settings import RaySettings, TrainingSettings
from pipeline.store import open_store
from tests.chain import ROOT, Finished, here
from tests.pipeline.data.bench import picture, write_listed
from tests.seaweed import Server

MEMORY = 100 << 20
UNKNOWN = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}


# --- what is made of the answers --------------------------------------------------------------------------------------


def test_faults_are_one_line_that_names_some_of_the_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other, blind = Answer(versions() | {"ray": "2.1.0"}), Answer(versions(), "no AWS credentials")
    answers = [(ClusterNode(f"n{i}", 1, 0), other) for i in range(5)] + [(ClusterNode("n5", 1, 0), blind)]
    monkeypatch.setattr(readiness, "start_ray", lambda _: None)
    monkeypatch.setattr(readiness, "uses_ray", lambda own, _: own.workers != 0)
    monkeypatch.setattr(readiness, "check_room", lambda *_: None)
    monkeypatch.setattr(readiness, "ask_nodes", lambda *_: answers)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    config = make_config({"project": "p", "store": str(tmp_path), "source": {"paths": ["a.csv"]}})
    with pytest.raises(UserError) as refused:
        readiness.check_ready(config, open_store("s3://bucket/a"), ["pairs"])
    has = f"has ray 2.1.0 (here {versions()['ray']})"
    assert str(refused.value) == (
        f"n0 {has}, n1 {has}, n2 {has}, and 2 more of that kind; install the same on every node; "
        "n5 cannot reach the store s3://bucket/a (no AWS credentials); give every node the same AWS settings"
    )
    monkeypatch.setattr(readiness, "ask_nodes", lambda *_: [(ClusterNode("n0", 1, 0), Answer(versions()))])
    readiness.check_ready(config, open_store("s3://bucket/a"), ["pairs"])
    monkeypatch.delattr(readiness, "start_ray")  # nothing on Ray: it is not asked
    here = replace(config, run=replace(config.run, decoder=TrainingSettings(workers=0)))  # type: ignore[call-arg]
    readiness.check_ready(here, open_store("s3://bucket/a"), ["source", "decoder", "samples"])


def test_a_caption_that_cannot_be_drawn_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    values = {"project": "p", "store": str(tmp_path), "source": {"paths": ["a.csv"]}}
    config = make_config({**values, "samples": {"captions": ["a cat", "cat " * 80]}})
    with pytest.raises(UserError, match=r"samples\.captions: caption 2 has 80 tokens and CLIP reads 75: shorten it"):
        readiness.check_ready(config, open_store(str(tmp_path)), ["source", "samples"])


# --- a cluster of two nodes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(s3: Server) -> Iterator[Any]:
    """A head without cores, and a node with one. Their workers find our packages on PYTHONPATH."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            made.add_node(num_cpus=1, object_store_memory=MEMORY)
            yield made
        finally:
            made.shutdown()


def run(cluster: Any, folder: Path, store: object, *words: str) -> Finished:
    """A run of the first stages, as a user starts it who is not in this project's folder."""
    values = {
        "project": "mine",
        "preset": "nano",
        "store": str(store),
        "source": {"paths": [write_listed(folder, [picture(i) for i in range(4)])]},
        "run": {"output": str(folder / "out"), "pairs": {"workers": 1}},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    return here("run", "mine.yaml", "--until", "pairs", *words, env={"RAY_ADDRESS": cluster.address}, cwd=folder)


def refused(process: Finished) -> str:
    """The line that a run ends with that must not have begun."""
    assert process.returncode == 2, process.stdout + process.stderr
    [line] = process.stderr.splitlines()
    assert line.startswith("error: ")
    assert "done" not in process.stdout
    return line


def empty(store: str) -> bool:
    return not list(open_store(store).list(""))


def test_a_healthy_cluster_is_left_as_it_was(cluster: Any, s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/jobs/test_chain.py goes on from here, through a job. What a question raises on a node comes back."""
    import ray

    def fails() -> None:
        raise FileNotFoundError("no such thing")

    store = f"{s3.url}/healthy-{os.getpid()}"
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    config = make_config({"project": "p", "store": store, "source": {"paths": ["a.csv"]}})
    try:
        readiness.check_ready(config, open_store(store), ["source", "pairs", "embeddings"])
        assert ray.is_initialized()
        answers = ask_every_node(start_ray(RaySettings()), fails, 60)
        assert [str(answer) for _, answer in answers] == ["no such thing"] * 2
    finally:
        ray.shutdown()
    assert empty(store)


def test_the_doctor_asks_every_node(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves nothing."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    assert list(check_shared_memory(RaySettings())) == []  # that of this machine is not asked for
    first, second = map(str, check_nodes(RaySettings(), open_store(str(tmp_path / "store"))))
    assert first.startswith("ok       ray       2 nodes, 1 CPUs, 0 GPUs")
    assert second.startswith("ok       nodes")
    assert second.endswith("see the store")
    assert not ray.is_initialized()
    assert not (tmp_path / "store").exists()


def test_nodes_without_credentials_and_with_other_code(cluster: Any, s3: Server, tmp_path: Path) -> None:
    store = f"{s3.url}/unseen-{os.getpid()}"
    other = {"PYTHONPATH": str(other_code(tmp_path / "code"))}
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY, env_vars=each) for each in (UNKNOWN, other)]
    try:
        line = refused(run(cluster, tmp_path, store))
    finally:
        for node in nodes:
            cluster.remove_node(node)
    assert f"cannot reach the store {store} (store {store}: no AWS credentials" in line
    assert f" (here {versions()['code']}); install the same on every node" in line
    assert line.count("cannot reach the store") == line.count(" has code ") == 1
    assert empty(store)


def other_code(folder: Path) -> Path:
    """Our packages with a file more, in a folder."""
    for package in ("models", "pipeline"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pipeline/more.py").write_text("")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_folder_that_other_processes_do_not_see(cluster: Any, tmp_path: Path) -> None:
    """As on machines of their own: /proc/self/cwd is another folder in every process."""
    line = refused(run(cluster, tmp_path, "/proc/self/cwd/store"))
    assert line.count("cannot reach the store /proc/self/cwd/store (it is not there)") == 2
    assert "use s3://BUCKET/PREFIX, or a folder that every machine mounts at the same place" in line
    assert not (tmp_path / "store").exists()


def test_what_no_node_has(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.graph.ray.PLACING_S", 1.0)
    words = ("run.pairs.cpus=2", "run.pairs.memory_mb=1", "run.embeddings.gpus=1")
    line = refused(run(cluster, tmp_path, tmp_path / "store", *words))
    assert "pairs: Ray has no room for 1 worker with 2 cores and 1 MiB; it has 1 core and 0 GPUs, " in line
    assert not (tmp_path / "store").exists()


SHIPPED = """
import os, ray
from pipeline.doctor.nodes import ask_nodes, versions
ray.init(runtime_env={"working_dir": os.getcwd()}, log_to_driver=False)
assert [answer.versions for _, answer in ask_nodes(ray, None)] == [versions()] * 2
print(versions()["code"])
"""


@pytest.mark.slow  # tests/jobs/test_chain.py submits a job to nodes with this code
def test_shipped_code_is_what_counts(cluster: Any, tmp_path: Path) -> None:
    """As ray job submit --working-dir ships it, to nodes that have another version of ours."""
    other_code(tmp_path)
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "PYTHONPATH": ""}
    command = [sys.executable, "-c", SHIPPED]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() != versions()["code"]
