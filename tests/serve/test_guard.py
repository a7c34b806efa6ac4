"""Who may ask, how much, and what a body may weigh: without Ray, for a request that is refused reaches no further."""

import asyncio
import hashlib
import json
import subprocess
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

import serve.api
from cluster.package import Package
from jobs.cli import main
from pipeline.errors import UserError
from pipeline.parse import parse
from serve import guard
from serve.api import make_api
from serve.bundle import ServedBundle
from serve.guard import Guard, Traffic, read_tokens
from serve.settings import ServeSettings

TOKEN = "a-token-of-twenty-four-c"
URL, PATH = "http://127.0.0.1:8000", "/v1/images/generations"
PlanInput = Callable[..., httpx.Response]


def guard_of(app: FastAPI, **given: Any) -> FastAPI:
    """The application, guarded."""
    plain = {"settings": ServeSettings(), "tokens": {}, "traffic": Traffic(), "observe": lambda *_, **__: None}
    app.add_middleware(Guard, **plain | given)
    return app


def asking(settings: ServeSettings | None = None, **given: Any) -> PlanInput:
    """Asks a guarded application that says how many bytes reached it."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def size(request: Request) -> int:
        return len(await request.body())

    guarded = guard_of(app, settings=settings or ServeSettings(), **given)

    def ask(path: str = PATH, method: str = "POST", **more: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url=URL) as client:
                return await client.request(method, path, **more)

        return asyncio.run(send())

    return ask


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def tokens_in(folder: Path, text: str) -> ServeSettings:
    (folder / "tokens.txt").write_text(text)
    (folder / "tokens.txt").chmod(0o600)
    return ServeSettings(host="0.0.0.0", tokens=str(folder / "tokens.txt"), requests_per_minute=2)


def test_a_token_opens_the_api_and_each_has_limits_of_its_own(tmp_path: Path) -> None:
    settings = tokens_in(tmp_path, f"ana {TOKEN}\nben {TOKEN}2\n")
    ask = asking(settings, tokens=read_tokens(settings))
    for headers in ({}, bearer("wrong"), {"Authorization": f"Basic {TOKEN}"}):
        answer = ask(headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert ask("/metrics", "GET").status_code == 401
    for path in ("/", "/v1/models", "/v1/images/files/abc.png", "/health"):
        assert ask(path, "GET").status_code == 200
    codes = [ask(headers=bearer(TOKEN)).status_code for _ in range(3)]
    assert codes == [200, 200, 429]
    refused = ask(headers=bearer(TOKEN))
    assert 0 < int(refused.headers["Retry-After"]) <= 60
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert ask(headers=bearer(f"{TOKEN}2")).status_code == 200


@pytest.mark.parametrize("text", ["", "ana\n", "ana short\n", f"ana {TOKEN} more\n"])
def test_a_file_without_tokens_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="does not hold lines NAME TOKEN"):
        read_tokens(tokens_in(tmp_path, text))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_file_of_tokens_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    settings = tokens_in(tmp_path, f"ana {TOKEN}\n")
    Path(settings.tokens).chmod(mode)
    with pytest.raises(UserError) as refused:
        read_tokens(settings)
    command = f"chmod 600 {settings.tokens}"
    assert str(refused.value).endswith(f"type {command}")
    subprocess.run(command, shell=True, check=True)
    assert list(read_tokens(settings).values()) == ["ana"]


def test_others_are_let_in_with_tokens_only() -> None:
    with pytest.raises(UserError, match=r"host=0\.0\.0\.0 accepts other machines"):
        read_tokens(ServeSettings(host="0.0.0.0"))
    assert read_tokens(ServeSettings()) == {}


def test_pages_of_other_addresses_cannot_make_a_browser_draw() -> None:
    ask = asking(ServeSettings(origins=("https://example.org",)))
    for origin, status in ((URL, 200), ("https://example.org", 200), ("null", 403), ("http://evil.example", 403)):
        assert ask(headers={"Origin": origin}).status_code == status
    for host in ("evil.example", "[", "[::1", "a]b"):  # a name that its owner points to 127.0.0.1, and none
        assert ask(headers={"Host": host}).status_code == 403
    assert ask("/", "GET", headers={"Host": "evil.example:8000"}).status_code == 403


def api(settings: ServeSettings, tokens: Mapping[str, str]) -> TestClient:
    """The whole application before a gateway that draws nothing."""

    async def described() -> dict[str, Any]:
        known = {"sampling": {"decoder_steps": 8}, "timesteps": 1000, "context": 77}
        return {"bundle": "b" * 64, "sides": [64, 256, 1024], **known}

    observe = lambda *_, **__: None  # noqa: E731
    gateway: Any = SimpleNamespace(settings=settings, observe=observe, described=described, traffic=Traffic())
    return TestClient(make_api(gateway, tokens, lambda: b""), base_url=URL)


def test_a_page_of_another_address_that_may_call_may_draw() -> None:
    """A browser asks first, by a request without the token."""
    origin = "https://example.org"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    client = api(ServeSettings(origins=(origin,)), {"0" * 64: "ana"})
    answer = client.options(PATH, headers={"Origin": origin, **asked})
    assert answer.status_code == 200
    assert "POST" in answer.headers["access-control-allow-methods"]
    other = client.options(PATH, headers={"Origin": "http://evil.example", **asked})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("limit", "asked"),
    [
        (1.0, {"size": "512x512"}),  # one of 1024 px, made smaller
        (0.5, {"size": "256x256", "steps": 64}),  # steps beyond the bundle's own count: 8 times 0.07
        (0.5, {"size": "256x256", "quality": "max"}),
        (0.5, {"size": "256x256", "quality": "low", "n": 8}),
    ],
)
def test_megapixels_are_those_that_are_drawn(limit: float, asked: dict[str, Any]) -> None:
    answer = api(ServeSettings(megapixels_per_minute=limit), {}).post(PATH, json={"prompt": "a"} | asked)
    assert (answer.status_code, "megapixels" in answer.text) == (429, True)


def test_a_fault_of_the_servers_own_is_openais_error() -> None:
    figures: list[Any] = []
    observe = lambda name, *_, **labels: figures.append((name, labels.get("status")))  # noqa: E731
    gateway: Any = SimpleNamespace(settings=ServeSettings(), observe=observe, traffic=Traffic())  # which lacks the rest
    with TestClient(make_api(gateway, {}, lambda: b""), URL, raise_server_exceptions=False) as client:
        answer = client.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "server_error")
    assert ("requests_total", "500") in figures


def test_a_body_that_is_too_large_or_too_slow_ends_with_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = asking()
    assert ask(content=b"x" * guard.JSON_BYTES).json() == guard.JSON_BYTES
    assert ask(content=b"x" * (guard.JSON_BYTES + 1)).status_code == 413
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert ask(content=b"x" * (guard.JSON_BYTES + 1), headers=form).json() > guard.JSON_BYTES

    async def endless() -> AsyncGenerator[bytes]:
        while True:
            yield b"x" * 4096

    assert ask(content=endless()).status_code == 413
    monkeypatch.setattr(guard, "BODY_S", 0.05)

    async def slow() -> AsyncGenerator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    assert ask(content=slow()).status_code == 408


def test_bytes_count_against_a_limit() -> None:
    ask = asking(ServeSettings(megabytes_per_minute=0.01))
    assert ask(content=b"x" * 9000).status_code == 200
    answer = ask(content=b"x" * 9000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")


def test_the_page_may_load_nothing_from_elsewhere() -> None:
    headers = asking()("/", "GET").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def test_only_hashes_of_tokens_travel_to_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[Package] = []
    for asked in ("jobs.serve", "cluster.submission"):
        monkeypatch.setattr(f"{asked}.check_answers", print)
    monkeypatch.setattr("jobs.serve.Cluster", str)
    monkeypatch.setattr("jobs.serve.attach_or_submit", lambda *words: sent.append(words[3]))
    monkeypatch.setattr("jobs.serve.follow", lambda *_: 0)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/sampling.json").write_text("{}")
    settings = tokens_in(tmp_path, f"ana {TOKEN}\n")
    words = ("host=0.0.0.0", f"tokens={settings.tokens}", "image_head=head.safetensors")
    assert main(["serve", str(tmp_path / "tiny"), "--to", "http://127.0.0.1:8265", *words]) == 0
    [package] = sent
    written = package.files["served.json"]
    assert isinstance(written, bytes)
    assert TOKEN not in written.decode()
    values = json.loads(written)
    assert values["tokens"] == read_tokens(settings)
    assert parse(ServeSettings, values["settings"], "serve").host == "0.0.0.0"
    assert ServedBundle(**values["served"]).folder == str(tmp_path / "tiny")
    assert package.files.keys() >= {"serve/__main__.py", "serve/studio/index.html", "pipeline/errors.py"}
    assert package.notes == (
        f"{Path('head.safetensors').absolute()} is not copied: every machine of the cluster must have it there",
    )
    assert main(["serve", "--stop"]) == 2
    assert "--stop ends what --to http://HEAD:8265 began" in capsys.readouterr().err


async def test_a_body_counts_until_its_request_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only until it has arrived."""
    monkeypatch.setattr(guard, "ALL_BYTES", 9000)
    answering, gate = asyncio.Event(), asyncio.Event()
    app = FastAPI()

    @app.post(PATH)
    async def slow(request: Request) -> int:
        size = len(await request.body())
        answering.set()
        await gate.wait()
        return size

    guarded = guard_of(app)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url=URL) as client:
        first = asyncio.create_task(client.post(PATH, content=b"x" * 6000))
        await answering.wait()
        refused = await client.post(PATH, content=b"x" * 6000)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        gate.set()
        assert (await first).json() == 6000
        assert (await client.post(PATH, content=b"x" * 6000)).json() == 6000


def test_a_large_body_arrives_as_it_was_sent() -> None:
    """It lies on the disk meanwhile."""
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    for size in (0, guard.CHUNK, guard.IN_MEMORY + 1, 3 * guard.IN_MEMORY):
        assert asking()(content=b"x" * size, headers=form).json() == size


def test_a_server_that_ends_takes_nothing_new_and_hands_out_what_it_has() -> None:
    traffic = Traffic()
    ask = asking(traffic=traffic)
    assert ask().status_code == 200
    traffic.drain()
    answer = ask()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert answer.headers["Retry-After"] == "5"
    assert ask("/v1/images/files/a.png", "GET").status_code == 200
    assert traffic.open == 0


def test_others_that_are_let_in_have_limits_unless_they_are_set() -> None:
    assert set(ServeSettings().limits().values()) == {0}
    assert min(ServeSettings(host="0.0.0.0").limits().values()) > 0
    assert ServeSettings(host="0.0.0.0", requests_per_minute=0).limits()["requests"] == 0
    assert ServeSettings(megabytes_per_minute=5.0).limits()["megabytes"] == 5


def test_a_request_is_one_line_of_the_log_without_its_caption(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()

    @app.post(PATH)
    async def drawn(request: Request) -> int:
        request.scope["drawing"] = 2, 256
        return 0

    names = {hashlib.sha256(TOKEN.encode()).hexdigest(): "ana"}
    guarded = guard_of(app, tokens=names)
    caplog.set_level("INFO", "unclip.requests")
    with TestClient(guarded, URL) as client:
        answer = client.post(PATH, json={"prompt": "a secret"}, headers=bearer(TOKEN))
        client.post(PATH, headers=bearer("wrong"))
    taken, refused = (json.loads(record.message) for record in caplog.records)
    assert taken.pop("ms") >= 0
    assert taken.pop("time").endswith("Z")
    assert taken == {
        "id": answer.headers["x-request-id"], "token": "ana", "endpoint": PATH, "status": 200,
        "images": 2, "size": "256x256",
    }  # fmt: skip
    assert (refused["status"], refused["token"], refused["endpoint"]) == (401, "", PATH)


async def asgi(app: FastAPI, gone: asyncio.Event, body: bytes = b"{}", whole: bool = True) -> list[Any]:
    """Sends a request by ASGI itself, whose client goes at ``gone``, and returns the messages of the answer."""
    sent: list[Any] = []
    parts = [{"type": "http.request", "body": body, "more_body": not whole}]

    async def receive() -> Any:
        if parts:
            return parts.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": [(b"host", b"localhost")]}
    await app(scope, receive, send)
    return sent


class Endless:
    """An application whose only endpoint answers nothing until it is cancelled."""

    def __init__(self, **more: Any):
        self.app, self.begun, self.ended = FastAPI(), asyncio.Event(), 0
        self.app.post(PATH)(self.endpoint)
        guard_of(self.app, **more)

    async def endpoint(self, request: Request) -> None:
        await request.body()
        self.begun.set()
        try:
            await asyncio.sleep(1000)
        finally:
            self.ended += 1


async def test_a_client_that_goes_ends_its_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "unclip.requests")

    endless, gone = Endless(traffic=(traffic := Traffic())), asyncio.Event()
    request = asyncio.create_task(asgi(endless.app, gone))
    await endless.begun.wait()
    assert traffic.open == 1
    gone.set()
    assert await asyncio.wait_for(request, 10) == []
    assert (endless.ended, traffic.open) == (1, 0)
    await asgi(endless.app, gone, b'{"prompt": "a', whole=False)
    assert (endless.ended, traffic.open) == (1, 0)  # it has never begun
    assert [json.loads(record.message)["status"] for record in caplog.records] == [guard.NO_ANSWER] * 2


async def test_whatever_a_request_waits_for_it_is_answered_within_its_deadline() -> None:
    endless = Endless(settings=ServeSettings(deadline_s=0.05))
    start, body = await asyncio.wait_for(asgi(endless.app, asyncio.Event()), 10)
    assert (start["status"], json.loads(body["body"])["error"]["code"]) == (503, "deadline_exceeded")
    assert endless.ended == 1


async def test_a_request_that_a_drain_cuts_off_is_told_to_come_back() -> None:
    """uvicorn cancels it, and would answer with a bare 500."""

    endless = Endless(traffic=(traffic := Traffic()))
    request = asyncio.create_task(asgi(endless.app, asyncio.Event()))
    await endless.begun.wait()
    traffic.drain()
    request.cancel()
    start, body = await asyncio.wait_for(request, 10)
    assert (start["status"], json.loads(body["body"])["error"]["code"]) == (503, "unavailable")
    assert (b"retry-after", b"5") in start["headers"]


async def test_a_caption_from_an_upload_is_read_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """One word of thousands of letters takes most of a second."""
    threads: list[threading.Thread] = []
    monkeypatch.setattr(serve.api, "check_captions", lambda _: threads.append(threading.current_thread()))
    assert await serve.api._differs("a cat", "a dog")
    assert threads != [threading.current_thread()]
