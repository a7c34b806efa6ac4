"""Replicas that hang, a server that is told to end or is killed, and how much memory it takes."""

import asyncio
import io
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from serve import pool, replica
from serve.address import listen
from serve.app import run_server
from serve.model_runner import ModelRunner
from serve.settings import ServeSettings
from tests.chain import ROOT
from tests.faults import Running, start
from tests.pipeline.data.bench import picture
from tests.serve.conftest import address, named
from tests.serve.load import figure, processes_below, until

REPLICA = "ray::ReplicaProcess"


@contextmanager
def server(bundle: Path, *words: object) -> Iterator[tuple[str, Running]]:
    process = start("serve", bundle, "--port", "0", *words)
    try:
        yield address(process), process
    finally:
        for pid in (*processes_below(process.pid), process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def ask(url: str, seed: int, steps: int) -> httpx.Response | str:
    """One request with a batch of its own; a closed connection is its error's name."""
    # One more step for each: what is alike would be drawn together.
    asked = {"prompt": "a tree", "size": "64x64", "steps": steps + seed, "seed": seed}
    try:
        return httpx.post(f"{url}/v1/images/generations", json=asked, timeout=300)
    except httpx.TransportError as e:
        return type(e).__name__


def replicas(process: Running) -> list[int]:
    return [pid for pid, command in processes_below(process.pid).items() if REPLICA in command]


def assert_an_error_of_openais(answer: Any) -> None:
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "server_error"
    assert int(answer.headers["retry-after"]) >= 1


# --- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture
def go_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Drawing of 50 steps or more hangs until this is set, as behind a driver that does not come back."""
    draw, gate = ModelRunner.draw, threading.Event()

    def stuck(self: ModelRunner, work: Any, *words: Any) -> None:
        if work.recipe.options["decoder_steps"] >= 50:
            gate.wait()
        draw(self, work, *words)

    monkeypatch.setattr(ModelRunner, "draw", stuck)
    monkeypatch.setattr(pool, "PING_S", 0.5)  # four of them: a busy machine makes a step in that time
    monkeypatch.setattr(replica, "CLOSING_S", 0.1)
    yield gate
    gate.set()


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes with which a server has ended this process, which goes on."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def serve(bundle: Path, client: Callable[[str], None], **settings: Any) -> None:
    """Runs a server in this process until its client, in a thread, has come to its end."""
    asked = ServeSettings(port=0, batch=1, **settings)
    with listen(asked) as listening, ThreadPoolExecutor(1) as clients:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def run() -> None:
            try:
                client(url)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        ready: list[Any] = []
        tell = lambda line: ready.append(clients.submit(run)) if line.startswith("the studio") else None  # noqa: E731
        before = signal.signal(signal.SIGTERM, lambda *_: None)  # for one that comes when the server has ended
        try:
            run_server(named(bundle), asked, {}, listening, tell)
        finally:
            signal.signal(signal.SIGTERM, before)
        ready[0].result()


def test_a_drawing_that_hangs_is_said_and_may_go_on(
    bundle: Path, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "STILL_S", 3.0)

    def client(url: str) -> None:
        with ThreadPoolExecutor(6) as clients:
            asked = [clients.submit(ask, url, seed, 50) for seed in (0, 1, 2, 2, 2, 2)]
            for answer in asked:
                assert_an_error_of_openais(answer.result())
        assert httpx.get(f"{url}/ready").status_code == 503
        assert_an_error_of_openais(ask(url, 9, 2))
        assert httpx.get(f"{url}/health").status_code == 200
        go_on.set()
        until(lambda: httpx.get(f"{url}/ready").status_code == 200)
        assert ask(url, 9, 50).status_code == 200

    serve(bundle, client)


def test_a_process_whose_drawing_hangs_tells_its_clients_and_ends(
    bundle: Path, go_on: threading.Event, exits: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    def client(url: str) -> None:
        with ThreadPoolExecutor(3) as clients:
            for answer in [clients.submit(ask, url, seed, 50) for seed in range(3)]:
                assert_an_error_of_openais(answer.result())
        until(lambda: exits)
        go_on.set()

    serve(bundle, client, watchdog_s=0.1)
    assert exits == [1]
    assert "serve: drawing hangs, and this process ends; start it again" in caplog.messages


def test_what_was_accepted_is_answered_before_the_end_and_new_requests_are_told_to_come_back(
    bundle: Path, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "STILL_S", 1e9)  # it does not count as hung

    def client(url: str) -> None:
        with ThreadPoolExecutor(4) as clients:
            asked = [clients.submit(ask, url, seed, 50) for seed in range(4)]
            until(lambda: figure(url, "num_queue_reqs") + figure(url, "num_running_reqs") == 4)
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: httpx.get(f"{url}/ready").status_code == 503)
            assert_an_error_of_openais(ask(url, 9, 2))
            assert httpx.get(f"{url}/health").status_code == 200
            go_on.set()
            assert [answer.result().status_code for answer in asked] == [200] * 4

    serve(bundle, client, drain_s=300.0)


def test_what_is_not_answered_in_time_is_told_to_come_back(
    bundle: Path, go_on: threading.Event, exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what waits outside the queue, for an equal request, and where drawing hangs, which is left behind."""
    monkeypatch.setattr(pool, "STILL_S", 1e9)

    def client(url: str) -> None:
        with ThreadPoolExecutor(6) as clients:
            asked = [clients.submit(ask, url, seed, 50) for seed in (0, 1, 2, 2, 2, 2)]
            until(lambda: figure(url, "num_queue_reqs") + figure(url, "num_running_reqs") == 3)
            os.kill(os.getpid(), signal.SIGINT)
            for answer in asked:
                assert_an_error_of_openais(answer.result())

    serve(bundle, client, drain_s=0.3)
    assert exits == [0]


# --- in processes of their own ----------------------------------------------------------------------------------------


def test_it_is_one_process_in_which_the_commands_of_the_page_run_as_they_stand(bundle: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/serve.md").read_text()
    (script,) = re.findall(r"^```sh\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    mask = Image.new("RGBA", (64, 64), "black")
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    with server(bundle) as (url, process):
        assert processes_below(process.pid) == {}  # without Ray
        assert _peak(process) < 0.8e9
        script = "set -euo pipefail\n" + script.replace("http://127.0.0.1:8000", url)
        ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
        process.terminate()
        _, errors = process.communicate(timeout=300)
        assert (process.returncode, "Traceback" in errors) == (0, False), errors
    made = {file.name: Image.open(file).size for file in tmp_path.glob("*.png") if file.name != "mask.png"}
    assert made == dict.fromkeys(("monster.png", "other.png", "edited.png", "turned.png"), (64, 64))
    assert ended.stdout.count("event: image_generation.partial_image") == 1
    assert ended.stdout.count("event: image_generation.completed") == 1


def _peak(process: Running) -> int:
    """The most memory that a process has had, in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    [kilobytes] = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) * 1024


@pytest.fixture
def two(bundle: Path) -> Iterator[tuple[str, Running]]:
    """A server of two replicas, each a process of Ray, that are both ready."""
    with server(bundle, "replicas=2", "idle_replicas=2", "batch=1", "drain_s=300") as (url, process):
        until(lambda: figure(url, "num_replicas") == 2)
        yield url, process


@pytest.mark.slow
def test_replicas_that_hang_are_killed_and_only_where_all_do_requests_are_lost(two: tuple[str, Running]) -> None:
    url, process = two
    same, image = {"prompt": "a cat", "before": "a  cat", "size": "64x64"}, {"image": picture(0)}
    refused = httpx.post(f"{url}/v1/images/edits", data=same, files=image, timeout=300)
    assert (refused.status_code, "both captions have the same embedding" in refused.text) == (400, True)
    with ThreadPoolExecutor(6) as clients:
        asked = [clients.submit(ask, url, seed, 60) for seed in range(6)]
        until(lambda: figure(url, "num_running_reqs") == 2)
        hung = replicas(process)[0]
        os.kill(hung, signal.SIGSTOP)
        until(lambda: hung not in replicas(process))  # SIGTERM would not end it
        assert {answer.result().status_code for answer in asked} == {200}
        assert figure(url, "retries_total") >= 1
        until(lambda: figure(url, "num_replicas") == 2)

        asked = [clients.submit(ask, url, seed, 300) for seed in range(6)]
        until(lambda: figure(url, "num_running_reqs") == 2)
        both = replicas(process)
        for pid in both:
            os.kill(pid, signal.SIGSTOP)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert httpx.get(f"{url}/health").status_code == 200
        for answer in asked:
            assert_an_error_of_openais(answer.result())
        until(lambda: not {*both} & {*replicas(process)})
        until(lambda: httpx.get(f"{url}/ready").status_code == 200)
        assert ask(url, 9, 2).status_code == 200
        asked = [clients.submit(ask, url, seed, 200) for seed in range(4)]
        until(lambda: figure(url, "num_queue_reqs") + figure(url, "num_running_reqs") == 4)
        process.terminate()
        assert {answer.result().status_code for answer in asked} == {200}


@pytest.mark.slow
def test_a_gateway_that_is_killed_closes_its_connections_and_leaves_nothing(two: tuple[str, Running]) -> None:
    url, process = two
    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(ask, url, seed, 900) for seed in range(4)]
        until(lambda: figure(url, "num_running_reqs") >= 1)
        left = processes_below(process.pid)
        process.kill()
        assert {answer.result() for answer in asked} <= {"RemoteProtocolError", "ReadError"}
    with socket.create_server((urlsplit(url).hostname, urlsplit(url).port)):  # the next one can listen there
        pass
    # Two agents of Ray's wait a minute for an answer of the head, which has ended, and hold nothing of ours.
    until(lambda: not [c for pid, c in left.items() if alive(pid) and not re.search("ray::.*Agent", c)], 20)
    until(lambda: not [*filter(alive, left)], 120)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may still be listed until its parent looks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_uploads_lie_on_the_disk_until_they_are_opened(bundle: Path) -> None:
    """24 of 31 MiB at once, of which one at a time is in memory."""
    image = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (3200, 3200, 3), np.uint8)
    Image.fromarray(noise).save(image, "PNG", compress_level=0)
    upload = image.getvalue()
    assert 29 << 20 < len(upload) < 32 << 20

    async def send(url: str) -> list[int]:
        async with httpx.AsyncClient(timeout=300) as client:

            async def one(seed: int) -> int:
                fields = {"size": "64x64", "steps": "2", "seed": str(seed), "eta": "0.5"}
                answer = await client.post(f"{url}/v1/images/variations", files={"image": upload}, data=fields)
                return answer.status_code

            return await asyncio.gather(*(one(seed) for seed in range(24)))

    with server(bundle) as (url, process):
        most, watching = [resident(process.pid)], threading.Event()

        def watch() -> None:
            while not watching.wait(0.02):
                most.append(resident(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        statuses = asyncio.run(send(url))
        watching.set()
        watcher.join()
        print(f"{most[0] >> 20} MiB before, {max(most) >> 20} MiB at most")
        assert {*statuses} <= {200, 503}
        assert statuses.count(200) >= 12
        assert max(most) - most[0] < 400 << 20


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
