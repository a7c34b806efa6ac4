"""How much is asked of a server, by what a real local server sees."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.fetch.fetcher import Fetched, Fetcher, backoff
from pipeline.data.fetch.opener import SMALL_BYTES
from pipeline.data.fetch.visit import LONGEST_HOLD_S, Hosts, Room, private_headers, retry_after
from pipeline.errors import UserError
from pipeline.parse import parse
from pipeline.settings import PairsSettings
from tests.pipeline.data.bench import Page, fetch_all, listening, serving

NOW = 1_700_000_000.0


class Log:
    """What a server has seen: (path, headers) in order, and the most requests that it answered at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.inside: dict[str, int] = defaultdict(int)
        self.most: dict[str, int] = defaultdict(int)


@contextmanager
def server(
    answers: dict[str, list[tuple[int, dict[str, str]]]], work_s: float = 0.0, together: int = 1
) -> Iterator[tuple[str, Log]]:
    """``answers``: by path, one a request, the last one for ever; 200 for any other. A body is its path.

    ``together``: each host answers pictures in groups of so many requests at once; a group that is not complete fails.
    """
    log = Log()
    groups: dict[str, threading.Barrier] = defaultdict(lambda: threading.Barrier(together, timeout=60))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers["Host"].partition(":")[0]
            with log.lock:
                log.seen.append((self.path, dict(self.headers)))
                log.inside[host] += 1
                log.most[host] = max(log.most[host], log.inside[host])
                queue = answers.get(self.path, [(200, {})])
                status, headers = queue.pop(0) if len(queue) > 1 else queue[0]
                group = groups[host]
            time.sleep(work_s)
            if self.path != "/robots.txt":
                group.wait()
            with log.lock:  # before the client can know that it has been answered
                log.inside[host] -= 1
            self.send_response(status)
            for name, value in {"Content-Length": str(len(self.path)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(self.path.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with listening(Handler) as address:
        yield address, log


def fetch(address: str, paths: list[str], names: str = "a.test", **changes: object) -> list[Fetched]:
    hosts = dict.fromkeys(names.split(), address)
    settings = PairsSettings(**{"threads": 8, "timeout_s": 5.0, "retries": 0, "hosts": hosts, **changes})
    return fetch_all(Fetcher(settings, 10_000), [path if ":" in path else f"http://a.test{path}" for path in paths])


def asked(log: Log) -> list[str]:
    return [path for path, _ in log.seen if path != "/robots.txt"]


@pytest.mark.parametrize("per_host", [1, 3])
def test_no_host_has_more_requests_at_once_than_allowed(per_host: int) -> None:
    with server({}, work_s=0.02, together=per_host) as (address, log):
        urls = [f"http://{'ab'[i % 2]}.test/{i}" for i in range(24)]
        # No group may stay incomplete because a machine stands still for a while.
        fetched = fetch(address, urls, "a.test b.test", per_host=per_host, timeout_s=30.0, threads=12)
    assert [f.data for f in fetched] == [f"/{i}".encode() for i in range(24)]
    assert log.most == {"a.test": per_host, "b.test": per_host}


def test_a_redirect_waits_for_its_turn_at_the_host_that_it_leads_to() -> None:
    answers = {f"/{i}": [(302, {"Location": f"http://b.test/to/{i}"})] for i in range(8)}
    answers |= {f"/back/{i}": [(302, {"Location": f"http://a.test/to/{i}"})] for i in range(8)}
    with server(answers, work_s=0.02) as (address, log):
        there = [f"http://a.test/{i}" for i in range(8)]
        back = [f"http://b.test/back/{i}" for i in range(8)]
        urls = [url for pair in zip(there, back, strict=True) for url in pair]
        fetched = fetch(address, urls, "a.test b.test", per_host=1)  # each waits for the other's host: no deadlock
    assert all(f.data is not None and f.data.startswith(b"/to/") for f in fetched)
    assert log.most == {"a.test": 1, "b.test": 1}


def test_waiting_for_a_turn_does_not_count_as_the_servers_time() -> None:
    """By a clock on which each wait for a turn takes a thousand seconds."""
    waited, turn = 0.0, Hosts.turn

    @contextmanager
    def wait(hosts: Hosts, host: str) -> Iterator[None]:
        nonlocal waited
        waited += 1000.0
        with turn(hosts, host):
            yield

    clock = SimpleNamespace(time=time.time, sleep=time.sleep, monotonic=lambda: time.monotonic() + waited)
    with (
        server({}) as (address, _),
        patch.object(Hosts, "turn", wait),
        patch("pipeline.data.fetch.visit.time", clock),
    ):
        fetched = fetch(address, [f"/{i}" for i in range(3)], threads=1, timeout_s=60.0)
    assert [f.reason for f in fetched] == [None] * 3
    assert waited >= 3000


def test_retry_after_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: pauses.append(s) or sleep(s))
    with server({"/a": [(503, {"Retry-After": "1"}), (200, {})]}) as (address, log):
        assert fetch(address, ["/a"], retries=1)[0].data == b"/a"
    assert asked(log) == ["/a", "/a"]
    assert sum(pauses) > 0.9  # back-off and the rest of the second


@pytest.mark.parametrize(("status", "reason"), [(429, "rate_limited"), (503, "http_5xx")])
def test_a_host_that_asks_for_an_hour_is_left_alone(status: int, reason: str) -> None:
    with server({"/0": [(status, {"Retry-After": "3600"})]}) as (address, log):
        fetched = fetch(address, [f"/{i}" for i in range(5)], threads=1, retries=0)
        assert [f.reason for f in fetched] == [reason] + 4 * ["rate_limited"]
        assert asked(log) == ["/0"]


@given(st.integers(0, 8), st.floats(0, 1))
def test_pauses_double_and_are_spread_over_half_of_them(attempt: int, drawn: float) -> None:
    pause = backoff(attempt, lambda: drawn)
    assert 0.25 * 2**attempt <= pause <= 0.5 * 2**attempt
    assert backoff(attempt + 1, lambda: drawn) == 2 * pause


@given(st.integers(0, 10**12))
def test_retry_after_in_seconds_and_as_a_date_agree(seconds: int) -> None:
    assert retry_after(f" {seconds} ") == min(seconds, LONGEST_HOLD_S)
    if seconds < 10**9:
        date = format_datetime(datetime.fromtimestamp(NOW + seconds, UTC), usegmt=True)
        with patch("time.time", return_value=NOW):
            assert retry_after(date) == min(seconds, LONGEST_HOLD_S)


@pytest.mark.parametrize(
    "value", [None, "", "soon", "-5", "1.5", "٣", "Mon, 99 Foo 2020", "Fri, 31 Dec 1999 23:59:59 GMT", "9" * 5000]
)
def test_a_retry_after_that_says_nothing_is_no_wait(value: str | None) -> None:
    assert retry_after(value) == 0


def test_memory_is_that_of_the_hosts_in_use() -> None:
    hosts = Hosts(2)
    for i in range(5000):
        with hosts.turn(f"h{i}"):
            hosts.hold(f"h{i}", 0.0 if i else 3600.0)
    assert not hosts._turns
    assert len(hosts._not_before) < 2100
    assert hosts.held("h0") > 3000


def test_a_large_body_waits_for_room_and_its_server_is_not_blamed() -> None:
    body = bytes(4 * SMALL_BYTES)
    pages = {f"/{i}": Page(body) for i in range(4)} | {"/small": Page(b"x")}
    with serving(pages) as address, patch("pipeline.data.fetch.fetcher.MOST_BYTES", 3 * SMALL_BYTES):
        settings = PairsSettings(threads=5, timeout_s=1.5, retries=0, per_host=8, hosts={"a.test": address})
        fetcher = Fetcher(settings, 2 * len(body))
        found: list[Any] = []
        for place, fetched in fetcher.fetch([f"http://a.test{path}" for path in pages]):
            if not found:
                time.sleep(1.6)  # in which the others wait, for longer than their server has
            assert fetcher._room._used <= len(body) + 1
            found.append((place, len(fetched.data or b"")))
    assert sorted(found) == [(i, len(body)) for i in range(4)] + [(4, 1)]
    assert fetcher._room._used == 0


def test_more_than_there_is_room_for_comes_when_nothing_else_is_there() -> None:
    room = Room(100)
    room.take(1000)
    assert not room.is_half_free()
    waiting = threading.Thread(target=room.take, args=(60,))
    waiting.start()
    room.take(-1000)
    waiting.join(10)
    assert room._used == 60


def test_private_headers_reach_their_origin_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICTURES", "Authorization: Bearer s3cret\nX-Team: birds\n")
    answers = {"/away": [(302, {"Location": "http://b.test/elsewhere"})], "/near": [(307, {"Location": "/here"})]}
    answers |= {"/other-port": [(302, {"Location": "http://a.test:81/here"})]}
    with server(answers) as (address, log):
        paths = ["/away", "/near", "/other-port", "http://b.test/first"]
        fetched = fetch(
            address, paths, "a.test b.test", headers={"http://A.test/": "PICTURES"}, contact="mailto:me@a.test"
        )
    assert [f.reason for f in fetched] == [None] * 4
    for path, headers in log.seen:
        ours = headers["Host"] == "a.test"
        assert (headers.get("Authorization"), headers.get("X-Team")) == (
            ("Bearer s3cret", "birds") if ours else (None, None)
        ), path
        assert headers["User-Agent"] == "unclip-ray (img2dataset; +mailto:me@a.test)"
    assert {headers["Host"] for _, headers in log.seen} == {"a.test", "b.test", "a.test:81"}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [("https://a.test", None, "is not set"), ("https://a.test", "s3cret", "must hold ASCII lines of the form"),
     ("https://a.test", "a b: s3cret", "must hold ASCII"), ("https://a.test", "A: s3crét", "must hold ASCII"),
     ("https://a.test", "A:", "must hold ASCII"), ("https://a.test", "A: b\ns3cret", "must hold ASCII"),
     ("https://a.test", "", "must hold ASCII"), ("a.test", "A: s3cret", "is not of the form https://host")],
)  # fmt: skip
def test_headers_that_cannot_be_read_are_one_line_without_the_secret(
    place: str, value: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        private_headers({place: "TOKEN"}, {} if value is None else {"TOKEN": value})
    assert "s3cret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_header_in_place_of_the_name_of_its_variable_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match=r"run\.pairs: headers: for https://a\.test give the name") as raised:
        parse(PairsSettings, {"headers": {"https://a.test": "Authorization: s3cret"}}, "run.pairs")
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("contact", ["two words", "a\nb", "(a)", "mé@a.test"])
def test_a_contact_that_would_break_the_user_agent_is_refused(contact: str) -> None:
    with pytest.raises(UserError, match=r"run\.pairs: contact: "):
        parse(PairsSettings, {"contact": contact}, "run.pairs")
