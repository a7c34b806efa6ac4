"""Serving on clusters of several nodes, by real processes on this machine."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from cluster.local import end, locked
from cluster.local import start as start_cluster
from pipeline.settings import RaySettings
from tests.chain import done, unclip
from tests.chaos.strikes import cluster
from tests.faults import finish, start
from tests.serve.conftest import address, serving
from tests.serve.load import figure, load, processes_below, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ASKED = {"prompt": "a tree", "size": "64x64", "steps": 2, "seed": 1}


@pytest.fixture
def dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster of two nodes, which wants a token."""
    folder = tmp_path / "cluster"
    with locked(folder):
        cluster = start_cluster(folder, RaySettings(cpus=2))
    monkeypatch.setenv("RAY_AUTH_TOKEN", (folder / "token").read_text())
    yield cluster.address
    with locked(folder):
        end(folder)


def test_a_job_serves_on_a_cluster_without_its_submitter_until_it_is_stopped(bundle: Path, dashboard: str) -> None:
    words = ("serve", bundle, "--to", dashboard, "port=0")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = finish(start(*words[:-1], f"port={other.getsockname()[1]}"))
    assert taken.returncode == 1
    assert "cannot listen at" in taken.stderr + taken.stdout
    assert "name another port with port=" in taken.stderr + taken.stdout
    submitter = start(*words)
    url = address(submitter)
    submitter.kill()
    submitter.communicate()
    assert httpx.post(f"{url}/v1/images/generations", json=ASKED, timeout=120).status_code == 200
    again = start(*words)
    assert address(again) == url
    again.send_signal(signal.SIGINT)
    left = finish(again)
    assert (left.returncode, "unclip-serve-2 keeps running" in left.stderr) == (130, True), left.stderr
    assert httpx.get(f"{url}/health").status_code == 200
    assert "unclip-serve-2 was stopped" in done(unclip("serve", "--to", dashboard, "--stop"))
    until(lambda: not alive(url))
    assert "no unclip serve runs" in done(unclip("serve", "--to", dashboard, "--stop"))


def test_a_killed_node_loses_no_request(bundle: Path) -> None:
    with cluster(2, cpus=1) as (environment, nodes):
        server = start("serve", bundle, "port=0", "replicas=2", "idle_replicas=2", "batch=2", env=environment)
        try:
            url = address(server)
            second = finish(start("serve", bundle, f"port={url.rpartition(':')[2]}", env=environment))
            assert (second.returncode, "cannot listen at" in second.stderr) == (2, True)
            [raylet] = nodes[0].all_processes["raylet"]
            threading.Timer(4, os.kill, (raylet.process.pid, signal.SIGKILL)).start()
            seen = load(url, 20, 8, 0, steps=30)
            assert not seen.wrong
            assert set(seen.statuses) == {200}
            assert figure(url, "retries_total") > 0
        finally:
            server.terminate()
            finish(server)


def test_replicas_go_when_nobody_draws_and_come_back_for_a_request(bundle: Path) -> None:
    with closing(serving(bundle, "idle_replicas=0", "idle_s=1", "replicas=2", "cpus=1")) as server:
        url = next(server)
        until(lambda: not replicas() and figure(url, "num_replicas") == 0, 120)
        assert httpx.get(f"{url}/ready").status_code == 200
        again = httpx.post(f"{url}/v1/images/generations", json={**ASKED, "seed": 2}, timeout=120)
        assert again.status_code == 200, again.text
        assert replicas() == 1


def replicas() -> int:
    return sum("ray::ReplicaProcess" in command for command in processes_below(os.getpid()).values())


def alive(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
