"""A cluster that is not there, is another one, or does not know us: one line each, before anything is sent."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.client import Cluster
from pipeline.errors import UserError
from tests.pipeline.data.bench import listening


@contextmanager
def _head(answer: Callable[[str], tuple[int, bytes]]) -> Iterator[str]:
    """A server that answers every request by its Authorization header; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self.headers.get("Authorization", ""))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with listening(Handler) as address:
        yield f"http://{address}"


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY"):  # which a Cluster changes
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", str(tmp_path))


def _refusal(address: str, token: str | None = None) -> str:
    with pytest.raises(UserError) as refused:
        Cluster(address, token)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_nobody_or_somebody_else_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    said = _refusal(f"http://127.0.0.1:{port}")
    assert f"no Ray cluster answers at http://127.0.0.1:{port} (" in said
    assert "8265" in said
    assert "no-such-host.invalid:8265 (" in _refusal("no-such-host.invalid")
    for answer, says in (((404, b""), "(HTTP 404)"), ((200, b"<html>"), "no Ray cluster answers")):
        with _head(lambda _, answer=answer: answer) as address:
            assert says in _refusal(address)


@pytest.mark.parametrize("address", ["ray://host:10001", "auto://", "ftp://host", "http://a:999999", "http://["])
def test_an_address_of_another_kind(address: str) -> None:
    assert "write http://HOST:8265" in _refusal(address)


def test_another_version_of_ray() -> None:
    with _head(lambda _: (200, json.dumps({"ray_version": "2.9.3"}).encode())) as address:
        said = _refusal(address)
    assert said.startswith(f"{address} runs Ray 2.9.3, and this machine has Ray {version('ray')}: ")


def test_a_token_is_sent_when_it_is_asked_for_and_otherwise_not(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    def wants(authorization: str) -> tuple[int, bytes]:
        heard.append(authorization)
        known = authorization == "Bearer right"
        return (200, b'{"ray_version": "1.0.0"}') if known else (403 if authorization else 401, b"")

    with _head(wants) as address:
        assert "requires a token: set RAY_AUTH_TOKEN" in _refusal(address)
        assert "requires another token" in _refusal(address, "wrong")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        assert "runs Ray 1.0.0" in _refusal(address)
    assert heard == ["", "Bearer wrong", "", "Bearer right"]
    heard.clear()
    with _head(lambda authorization: (heard.append(authorization) or 200, b'{"ray_version": "1.0.0"}')) as address:
        assert "runs Ray 1.0.0" in _refusal(address)
    assert heard == [""]


def test_a_cluster_on_this_machine_is_behind_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would have the token, too."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "example.org")
    ours = json.dumps({"ray_version": version("ray")}).encode()
    with _head(lambda _: (200, ours)) as address:
        Cluster(address, "a token")
    assert os.environ["no_proxy"] == "example.org,127.0.0.1"


# --- following --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Returns a cluster whose job says two words; its first connection breaks off between them."""
    monkeypatch.setattr("cluster.client.POLL_S", 0.0)
    tries: list[str] = []

    async def tail_job_logs(submission_id: str) -> AsyncIterator[str]:
        tries.append(submission_id)
        yield "one "
        if len(tries) == 1:
            raise OSError("it broke off")
        yield "two"

    status = SimpleNamespace(value="SUCCEEDED")
    info = SimpleNamespace(submission_id="job", status=status, message="", driver_exit_code=0, metadata={})
    found = object.__new__(Cluster)
    found.address = "http://head:8265"
    found._client = SimpleNamespace(tail_job_logs=tail_job_logs, get_job_info=lambda _: info)
    return found


def test_what_was_written_before_a_connection_broke_off_is_not_written_again(cluster: Cluster) -> None:
    written: list[str] = []
    assert cluster.follow("job", written.append).exit_code == 0
    assert "".join(written) == "one two"


def test_a_reader_that_has_gone_ends_it(cluster: Cluster) -> None:
    def write(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        cluster.follow("job", write)


def test_a_cluster_that_is_lost_is_given_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.client.LOST_S", -1.0)
    with pytest.raises(UserError, match=r"it broke off.*run the same command again to attach"):
        cluster.follow("job", lambda _: None)


def test_a_connection_that_breaks_off_after_hours_is_made_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("cluster.client.time", SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda _: None))

    def write(text: str) -> None:  # the first word comes hours after the job began
        clock[0] += 1.0

    tail = cluster._tail

    def late(submission_id: str) -> Iterator[str]:
        clock[0] += 9_999.0
        yield from tail(submission_id)

    monkeypatch.setattr(cluster, "_tail", late)
    assert cluster.follow("job", write).exit_code == 0


def test_ctrl_c_while_the_event_loop_is_built_leaves_no_traceback(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    build = asyncio.SelectorEventLoop.__init__

    def interrupted(self: asyncio.SelectorEventLoop, *words: object) -> None:
        signal.raise_signal(signal.SIGINT)
        build(self, *words)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cluster.follow("job", lambda _: None)
    assert capfd.readouterr().err == ""
