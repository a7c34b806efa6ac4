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
from typing import Any

import httpx
import pytest
import torch

from jobs.serve import read_settings
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.release.pointer import Move, move_release, read_releases
from pipeline.release.signing import files_of, public_line, read_private_key, signed
from pipeline.sampling.recipe import ImageRecipe, Row
from serve import bundle as bundles
from serve import model_runner, processes
from serve.address import listen, url_host
from serve.app import GatewayDeployment, Service
from serve.processes import fit_replicas
from serve.replica import Replica
from serve.settings import ServeSettings
from serve.work import Work
from tests.chain import ROOT, here, unclip
from tests.pipeline.release.keys import make_key
from tests.pipeline.sampling.bundles import publish_bundle
from tests.serve.conftest import named
from tests.serve.load import until


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_another_server_listens_at_is_refused(host: str) -> None:
    """Also one that would share it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((host, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at .*{port} .* port="):
            listen(ServeSettings(host=host, port=port))
    with listen(ServeSettings(host=host, port=0)) as bound:
        assert bound.getsockname()[1] not in (0, port)
        with pytest.raises(UserError, match="cannot listen at"):
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
    assert re.fullmatch("error: .* cannot listen at .*; name another port with port=\n", ended.stderr)


def test_a_setting_that_is_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="port=10: port is given twice"):
        read_settings(["port=9", "port=10"])


@pytest.mark.parametrize(("run", "replicas"), [(here, 1), pytest.param(unclip, 2, marks=pytest.mark.slow)])
def test_what_a_process_cannot_load_is_one_line(bundle: Path, run: Any, replicas: int) -> None:
    ended = run("serve", bundle, "port=0", f"replicas={replicas}", f"prompt_head={bundle / 'typo.safetensors'}")
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended
    assert re.search("^error: .*typo.safetensors.*$", ended.stderr, flags=re.MULTILINE)


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives torch its threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_release_is_followed_after_one_that_is_not_signed_not_there_or_cannot_be_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, first = publish_bundle(tmp_path)
    key = read_private_key(make_key(tmp_path))

    def promote(artifact: Artifact, sign: bool = True) -> None:
        seen = read_releases(store, "p")
        move = Move("promote", artifact.key, "e" * 64, 1.0, files=files_of(artifact))
        move_release(store, "p", seen, signed("p", seen, move, key) if sign else move)

    def serves(artifact: Artifact, warning: str = "") -> None:
        until(lambda: (replica.next or replica.runner).key == artifact.key and replica.warning.startswith(warning))
        until(lambda: bool(replica.warning) == bool(warning))

    promote(first)
    second = publish_artifact(store, replace(first, key="c" * 64), 0.0)
    served = bundles.ServedBundle("p", store=store.url, project="p", keys=(public_line(key),))
    replica = Replica(served, ServeSettings(cpus=1, follow_s=0.02))
    assert torch.get_num_threads() == 1  # its own cores
    with monkeypatch.context() as silent:
        silent.setattr(bundles, "read_releases", lambda *_: 1 / 0)
        serves(first, "the release could not be loaded, and the previous one stays in service: see the log")
    serves(first)
    promote(second, sign=False)
    serves(first, "the release is not signed by a trusted key")
    promote(replace(first, key="d" * 64))
    serves(first, "the release could not be loaded")
    promote(second)
    serves(second)
    with pytest.raises(UserError, match="the release moved while its bundle b"):
        replica.served.open(first.key, "cpu")


@pytest.mark.parametrize(
    ("cores", "asked", "processes", "share"),
    [
        ([2], {}, 1, 2),
        ([0, 8], {"replicas": 2}, 2, 4),  # a head without work
        ([4, 32], {"replicas": 2}, 2, 16),
        ([1, 2], {"replicas": 2}, 2, 1),
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
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it would start a replica again."""
    monkeypatch.setattr(processes, "fit_to_cluster", lambda settings: (replace(settings, replicas=1), None))
    api = GatewayDeployment(named(bundle), ServeSettings(), {}).__serve_build_asgi_app__()
    asked = {"prompt": "a tree", "size": "64x64", "steps": 2}

    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://127.0.0.1") as client:
        async with api.router.lifespan_context(api):
            assert (await client.post("/v1/images/generations", json=asked)).status_code == 200
        late = await client.post("/v1/images/generations", json=asked | {"seed": 1})
        assert (late.status_code, "Retry-After" in late.headers) == (503, True)


async def test_the_next_batch_is_drawn_while_images_of_the_one_before_are_encoded(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through queue, pool and replica."""
    service = Service(named(bundle), ServeSettings(replicas=1, batch=1), {}, None)
    await service.pool.open(1)
    encode, gate = model_runner.png_with_text, threading.Event()
    monkeypatch.setattr(model_runner, "png_with_text", lambda *words: gate.wait(60) and encode(*words))

    asked = ImageRecipe(options={"decoder_steps": 2, "size": 64}, side=64)

    async def draw(caption: str, seen: list[Any]) -> None:
        async for event in service.queue.run(Work(asked, (Row(caption, 0),))):
            seen.append(event[:2])

    first: list[Any] = []
    second: list[Any] = []
    tasks = [asyncio.create_task(draw("a", first)), asyncio.create_task(draw("b", second))]
    while ("step", "decoder") not in second:
        await asyncio.sleep(0.01)
    assert ("image", 0) not in first
    gate.set()
    await asyncio.gather(*tasks)
    assert first[-1] == second[-1] == ("image", 0)
    await service.pool.close()
