"""What a server does until it listens, and how a process that draws follows a release."""

import asyncio
import re
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import serve

from pipeline.errors import UserError
from pipeline.graph.ray import start_ray
from pipeline.settings import RaySettings
from serve import app, bundle
from serve.app import Replica, named, sized
from serve.settings import ServeSettings
from serve.work import Row, Work
from tests.faults import start
from tests.pipeline.sampling.test_generation import publish_bundle


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_another_server_listens_at_is_refused(host: str) -> None:
    """Also one that would share it, as Ray Serve does."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((host, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"{port} cannot be listened at .* port="):
            app._with_port(ServeSettings(host=host, port=port))
        assert app._with_port(ServeSettings(host=host, port=0)).port not in (0, port)


def test_a_free_port_that_another_process_takes_meanwhile_is_not_the_last_one_tried(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By a Ray Serve of its own."""
    ray = start_ray(RaySettings(cpus=1, object_store_mb=100))
    free, tried = app._with_port, []

    def late(settings: ServeSettings) -> ServeSettings:
        tried.append(taken if not tried else free(settings).port)
        return replace(settings, port=tried[-1])

    monkeypatch.setattr(app, "_with_port", late)
    try:
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = other.getsockname()[1]
            with pytest.raises(
                UserError, match=f"Failed to bind to address '127.0.0.1:{taken}'; name another by port="
            ):
                app._start_serve(ServeSettings(port=taken))
            started = app._start_serve(ServeSettings(port=0))
        assert (tried[0], tried[-1]) == (taken, started.port)
        with socket.create_connection((started.host, started.port), timeout=10):
            pass
    finally:
        serve.shutdown()
        ray.shutdown()


def test_a_proxy_that_starts_slowly_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slowly for the time that Ray Serve gives it, which is made short here."""
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "0.0001")
    ray = start_ray(RaySettings(cpus=1, object_store_mb=100))
    try:
        app._start_serve(ServeSettings(port=0))
        deadline = time.monotonic() + 60
        while (proxies := list(serve.status().proxies.values())) != ["HEALTHY"]:
            assert time.monotonic() < deadline, proxies
            time.sleep(0.1)
        serve.shutdown()
        monkeypatch.setattr("ray.serve._private.api.HTTP_PROXY_TIMEOUT", 0.01)
        with pytest.raises(UserError, match=r"did not listen within a minute; is the machine.*\)$"):
            app._start_serve(ServeSettings(port=0))
    finally:
        serve.shutdown()
        ray.shutdown()


def test_what_a_process_cannot_load_is_one_line(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    head = f"prompt_head={tmp_path / 'typo.safetensors'}"
    process = start("serve", tmp_path / "bundle", "port=0", "replicas=1", head)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 2, said + errors
    assert "Traceback" not in said + errors
    assert re.search("^error: .*typo.safetensors.*$", errors, flags=re.MULTILINE)


class Releases:
    """A store whose release, and whether it can be looked up and opened, are as they are set."""

    key = ""

    def __init__(self) -> None:
        self.release, self.silent, self.broken = "a", False, False

    def current(self) -> str:
        if self.silent:
            raise OSError("the bucket does not answer")
        return self.release


def test_a_release_is_followed_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    releases: Any = Releases()

    def opened(_: Replica, key: str) -> Any:
        if releases.broken:
            raise OSError("connection reset")
        return SimpleNamespace(key=key, describe=lambda: {"bundle": key})

    def until(wanted: Any) -> None:
        deadline = time.monotonic() + 30
        while (found := (drawer.next or drawer.painter).key, bool(drawer.warning)) != wanted:
            assert time.monotonic() < deadline, found
            time.sleep(0.01)

    monkeypatch.setattr(Replica, "_open", opened)
    drawer = Replica(releases, ServeSettings(follow_s=0.02))
    releases.silent = True
    until(("a", True))
    releases.silent = False
    until(("a", False))
    releases.broken, releases.release = True, "b"
    until(("a", True))
    releases.broken = False
    until(("b", False))


@pytest.mark.parametrize(
    ("cores", "asked", "processes", "share"),
    [
        ([2], {}, 2, 1),
        ([8], {}, 2, 4),
        ([0, 8], {}, 2, 4),  # a head without work
        ([4, 32], {}, 2, 16),
        ([1, 2], {}, 2, 1),
        ([8, 8], {}, 2, 8),
        ([8], {"cpus": 8}, 1, 8),
        ([2], {"replicas": 4}, 4, 1),  # which a cluster adds
        ([1], {"idle_replicas": 2}, 2, 1),
    ],
)
def test_processes_have_room_beside_each_other(cores: list[int], asked: Any, processes: int, share: int) -> None:
    found = sized(ServeSettings(**asked), cores, gpus=None)
    assert (found.replicas, found.cpus) == (processes, share)


@pytest.mark.parametrize(("gpus", "processes"), [(0, 1), (1, 1), (4, 4)])
def test_there_is_one_process_a_gpu_and_one_where_a_cluster_has_to_add_it(gpus: int, processes: int) -> None:
    assert sized(ServeSettings(device="cuda"), [8, 8], gpus).replicas == processes


@pytest.mark.parametrize(
    ("host", "told"), [("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("::", "[::1]"), ("gpu-7", "gpu-7")]
)
def test_an_address_is_told_as_a_url_has_it(host: str, told: str) -> None:
    assert named(host) == told


def test_a_process_draws_on_its_own_cores(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    before = torch.get_num_threads()
    try:
        Replica(bundle.Served("b", key="b", folder=str(tmp_path / "bundle")), ServeSettings(cpus=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), "does not fit into memory"),
        (ValueError("steps must be positive"), "steps must be positive"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def draw(*_: Any) -> None:
        raise error

    async def events() -> list[Any]:
        drawer = Replica(releases, ServeSettings())
        return [event async for event in drawer.draw(Work("generation", {}, 64, (Row("a cat", 0),)))]

    releases: Any = Releases()
    releases.key = "a"
    monkeypatch.setattr(Replica, "_open", lambda *_: SimpleNamespace(key="a", describe=dict, draw=draw))
    _, (kind, why) = asyncio.run(events())
    assert kind == "refused"
    assert said in why
