"""Load with hostile clients, killed processes, clients that go, a release that changes: on real processes."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import torch
import yaml

from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.ledger import Ledger
from pipeline.release.pointer import Move, move_release, read_releases
from pipeline.store import Store
from pipeline.store.records import put_blob
from tests.faults import Running, start
from tests.models.small_models import make
from tests.pipeline.sampling.bundles import publish_bundle
from tests.serve.conftest import address
from tests.serve.load import figure, load, memory, processes_below, until

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("UNCLIP_LOAD_SECONDS", 60))
CLIENTS, HOSTILE = 45, 5
REPLICA = "ray::ReplicaProcess"


@dataclass(frozen=True)
class Server:
    url: str
    process: Running
    store: Store

    def promote(self, key: str) -> None:
        move = Move("promote", key, "e" * 64, time.time())
        move_release(self.store, "served", read_releases(self.store, "served"), move)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a release."""
    folder = tmp_path_factory.mktemp("faults")
    store, first = publish_bundle(folder)
    config = {"project": "served", "preset": "nano", "store": store.url, "source": {"paths": [str(folder / "a.csv")]}}
    (folder / "a.csv").write_text("url,caption\n")
    (folder / "served.yaml").write_text(yaml.safe_dump(config))
    standing = Server("", None, store)
    standing.promote(first.key)
    words = ("port=0", "replicas=2", "idle_replicas=2", "follow_s=1", "queue=200", "results_mb=8", "batch=8")
    process = start("serve", f"release:{folder / 'served.yaml'}", *words)
    assert process.stderr
    # It writes a line a request, and a pipe that is full would stop it.
    threading.Thread(target=process.stderr.read, daemon=True).start()
    try:
        yield replace(standing, url=address(process), process=process)
    finally:
        process.terminate()
        process.wait(120)


def second_bundle(store: Store, folder: Path) -> str:
    torch.manual_seed(1)
    replace(make(), ar_prior=None, codec=None).save(folder / "second")
    files = [path for path in (folder / "second").rglob("*") if path.is_file()]
    blobs = {str(path.relative_to(folder / "second")): put_blob(store, path) for path in files}
    return publish_artifact(store, Artifact("bundle", "c" * 64, {}, {}, Ledger(), blobs), 0.0).key


def later(seconds: float, do: object, *arguments: object) -> None:
    threading.Timer(seconds, do, arguments).start()


def kill_replicas(server: Server) -> None:
    for pid, command in processes_below(server.process.pid).items():
        if REPLICA in command:
            os.kill(pid, signal.SIGKILL)


def test_a_client_that_goes_stops_its_drawing(server: Server) -> None:
    asked = {"prompt": "a tree", "steps": 1000, "stream": True, "progress": True}
    with httpx.stream("POST", f"{server.url}/v1/images/generations", json=asked, timeout=60) as answer:
        for line in answer.iter_lines():
            if "image_generation.step" in line:
                break
    quick = {"prompt": "a tree", "steps": 2, "size": "64x64", "seed": 1}
    assert httpx.post(f"{server.url}/v1/images/generations", json=quick, timeout=120).status_code == 200
    until(lambda: figure(server.url, 'images_total{kind="draw"}') == 1)  # counted after the answer
    assert figure(server.url, "num_running_reqs") == 0


def test_a_release_changes_under_load_between_whole_requests(server: Server, tmp_path: Path) -> None:
    key = second_bundle(server.store, tmp_path)
    later(3, server.promote, key)
    seen = load(server.url, 20, 4, 0)
    assert not seen.wrong
    assert set(seen.statuses) == {200}
    assert set(seen.bundles) == {"b" * 64, key}
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["unclip"]["bundle"] == key


@pytest.mark.timeout(300 + 2 * SECONDS)
def test_load_with_hostile_clients_and_killed_replicas_ends_in_no_error_and_no_leak(server: Server) -> None:
    load(server.url, SECONDS / 4, CLIENTS, HOSTILE, seed=1)  # what is kept and what is cached fill up
    first = held(server)
    later(SECONDS / 4, kill_replicas, server)
    seen = load(server.url, SECONDS, CLIENTS, HOSTILE)
    print(seen.statuses, seen.hostile, f"slowest {seen.slowest:.1f} s")
    assert not seen.wrong
    assert {200} <= set(seen.statuses) <= {200, 429, 503}
    assert not [status for status in seen.hostile if status.partition(":")[2].startswith("5") and "503" not in status]
    assert figure(server.url, "retries_total") > 0
    until(lambda: figure(server.url, "num_replicas") == 2, 120)
    grown = {name: after / first[name] for name, after in held(server).items()}
    print(grown)
    assert max(grown.values()) < 1.1, grown


def held(server: Server) -> dict[str, int]:
    """The resident bytes of the gateway and of the replicas."""
    below = processes_below(server.process.pid)
    return {"gateway": memory({server.process.pid: "gateway"}, "gateway"), "replicas": memory(below, REPLICA)}
