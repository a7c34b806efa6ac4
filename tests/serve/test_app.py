"""What a server does until it listens, and how a process that draws follows a release."""

import asyncio
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from jobs.serve import read_settings
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.release.pointer import Move, move_release, read_releases
from pipeline.release.signing import files_of, public_line, read_private_key, signed
from serve import bundle, model_runner, processes
from serve.address import listen, url_host
from serve.app import GatewayDeployment
from serve.processes import fit_replicas
from serve.replica import Replica
from serve.settings import ServeSettings
from serve.work import Row, Work
from tests.chain import ROOT
from tests.faults import start
from tests.pipeline.release.test_signing import make_key
from tests.pipeline.sampling.test_generation import publish_bundle
from tests.serve.load import until


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_another_server_listens_at_is_refused(host: str) -> None:
    """Also one that would share it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((host, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"{port} cannot be listened at .* port="):
            listen(ServeSettings(host=host, port=port))
    with listen(ServeSettings(host=host, port=0)) as bound:
        assert bound.getsockname()[1] not in (0, port)
        with pytest.raises(UserError, match="cannot be listened at"):
            listen(ServeSettings(host=host, port=bound.getsockname()[1]))


def test_a_port_in_use_is_said_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "sampling.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as other:
        script = (
            "import sys; from jobs.cli import main; "
            f"code = main(['serve', {str(tmp_path)!r}, '--port', '{other.getsockname()[1]}']); "
            "print(code, sorted({'torch', 'ray', 'fastapi'} & sys.modules.keys()))"
        )
        ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "2 []\n", ended.stderr
    assert re.fullmatch("error: .* cannot be listened at .*; name another by port=\n", ended.stderr)


def test_a_setting_that_is_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="port=10: port is given twice"):
        read_settings(["port=9", "port=10"])


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_a_process_cannot_load_is_one_line(tmp_path: Path, replicas: int) -> None:
    publish_bundle(tmp_path)
    head = f"prompt_head={tmp_path / 'typo.safetensors'}"
    process = start("serve", tmp_path / "bundle", "--port", "0", f"replicas={replicas}", head)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 2, said + errors
    assert "Traceback" not in said + errors
    assert re.search("^error: .*typo.safetensors.*$", errors, flags=re.MULTILINE)


def serves(replica: Replica) -> str:
    """The bundle that the next request is drawn with."""
    return (replica.next or replica.runner).key


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives torch its threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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

    monkeypatch.setattr(Replica, "_open", opened)
    replica = Replica(releases, ServeSettings(follow_s=0.02))
    releases.silent = True
    until(lambda: replica.warning and serves(replica) == "a")
    releases.silent = False
    until(lambda: not replica.warning and serves(replica) == "a")
    releases.broken, releases.release = True, "b"
    until(lambda: replica.warning and serves(replica) == "a")
    releases.broken = False
    until(lambda: not replica.warning and serves(replica) == "b")


@pytest.mark.usefixtures("threads")
def test_a_new_release_that_is_not_signed_leaves_the_old_one_and_is_said(tmp_path: Path) -> None:
    store, first = publish_bundle(tmp_path)
    key = read_private_key(make_key(tmp_path))

    def promote(artifact: Artifact, sign: bool) -> None:
        seen = read_releases(store, "p")
        move = Move("promote", artifact.key, "e" * 64, 1.0, files=files_of(artifact))
        move_release(store, "p", seen, signed("p", seen, move, key) if sign else move)

    promote(first, True)
    second = publish_artifact(store, replace(first, key="c" * 64), 0.0)
    served = bundle.ServedBundle("p", store=store.url, project="p", keys=(public_line(key),))
    replica = Replica(served, ServeSettings(cpus=1, follow_s=0.02))
    until(lambda: (serves(replica), replica.warning) == (first.key, ""))
    promote(second, False)
    said = "the release is not signed by a trusted key, and the one before goes on: see the log"
    until(lambda: (serves(replica), replica.warning) == (first.key, said))
    promote(second, True)
    until(lambda: (serves(replica), replica.warning) == (second.key, ""))
    with pytest.raises(UserError, match="was moved on from bundle b"):
        replica.served.open(first.key, "cpu")


@pytest.mark.parametrize(
    ("cores", "asked", "processes", "share"),
    [
        ([2], {}, 1, 2),
        ([8], {"replicas": 2}, 2, 4),
        ([0, 8], {"replicas": 2}, 2, 4),  # a head without work
        ([4, 32], {"replicas": 2}, 2, 16),
        ([1, 2], {"replicas": 2}, 2, 1),
        ([8, 8], {"replicas": 2}, 2, 8),
        ([8], {"cpus": 8}, 1, 8),
        ([2], {"replicas": 4}, 4, 1),  # which a cluster adds
        ([1], {"idle_replicas": 2}, 2, 1),
    ],
)
def test_processes_have_room_beside_each_other(cores: list[int], asked: Any, processes: int, share: int) -> None:
    found = fit_replicas(ServeSettings(**asked), cores, gpus=None)
    assert (found.replicas, found.cpus) == (processes, share)


@pytest.mark.parametrize(("gpus", "processes"), [(0, 1), (1, 1), (4, 4)])
def test_there_is_one_process_a_gpu_and_one_where_a_cluster_has_to_add_it(gpus: int, processes: int) -> None:
    assert fit_replicas(ServeSettings(device="cuda"), [8, 8], gpus).replicas == processes


@pytest.mark.parametrize(
    ("host", "told"), [("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("::", "[::1]"), ("gpu-7", "gpu-7")]
)
def test_an_address_is_told_as_a_url_has_it(host: str, told: str) -> None:
    assert url_host(host) == told


async def test_a_gateway_behind_rays_proxy_refuses_what_comes_after_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it would start a replica again."""
    publish_bundle(tmp_path)
    monkeypatch.setattr(processes, "fit_to_cluster", lambda settings: (replace(settings, replicas=1), None))
    served = bundle.ServedBundle("b", key="b", folder=str(tmp_path / "bundle"))
    api = GatewayDeployment(served, ServeSettings(), {}).__serve_build_asgi_app__()
    asked = {"prompt": "a tree", "size": "64x64", "steps": 2}

    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://127.0.0.1") as client:
        async with api.router.lifespan_context(api):
            assert (await client.post("/v1/images/generations", json=asked)).status_code == 200
        late = await client.post("/v1/images/generations", json=asked | {"seed": 1})
        assert (late.status_code, "Retry-After" in late.headers) == (503, True)


@pytest.mark.usefixtures("threads")
def test_a_process_draws_on_its_own_cores(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    Replica(bundle.ServedBundle("b", key="b", folder=str(tmp_path / "bundle")), ServeSettings(cpus=1))
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), "does not fit into memory"),
        (ValueError("steps must be positive"), "steps must be positive"),
    ],
)
async def test_what_cannot_be_drawn_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def draw(*_: Any) -> None:
        raise error

    releases: Any = Releases()
    releases.key = "a"
    monkeypatch.setattr(Replica, "_open", lambda *_: SimpleNamespace(key="a", describe=dict, draw=draw, slowest=0.0))
    work = Work("generation", {}, 64, (Row("a cat", 0),))
    _, (kind, why) = [event async for event in Replica(releases, ServeSettings()).draw(work)]
    assert kind == "refused"
    assert said in why


async def test_the_next_batch_is_drawn_while_images_are_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_bundle(tmp_path)
    replica = Replica(bundle.ServedBundle("b", key="b", folder=str(tmp_path / "bundle")), ServeSettings())
    encode, gate = model_runner.png_with_text, threading.Event()

    def slowly(*words: Any) -> bytes:
        assert gate.wait(60)
        return encode(*words)

    monkeypatch.setattr(model_runner, "png_with_text", slowly)

    async def kinds(caption: str, seen: list[str]) -> None:
        async for event in replica.draw(Work("generation", {"decoder_steps": 2}, 64, (Row(caption, 0),))):
            seen.append(event[0])

    first: list[str] = []
    second: list[str] = []
    tasks = [asyncio.create_task(kinds("a", first)), asyncio.create_task(kinds("b", second))]
    while "drawn" not in second:
        await asyncio.sleep(0.01)
    assert "image" not in first
    gate.set()
    await asyncio.gather(*tasks)
    assert first[-1] == second[-1] == "image"
