"""What workers of a run know of sites: by themselves, and from each other."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler
from itertools import pairwise

import pytest

from pipeline.data.fetch.board import NOTE_BYTES, Board, Note
from pipeline.data.fetch.fetcher import Fetcher
from pipeline.data.fetch.opener import Refused
from pipeline.data.fetch.sites import SILENT, Sites
from pipeline.settings import PairsSettings
from tests.pipeline.data.bench import Page, Pages, fetch_all, listening, serving

SITE = "http://a.test"


def note(found: bytes | str, failed: bool = False, hold_s: float = 100.0) -> Note:
    return Note(found, failed, time.time(), time.time() + hold_s)


def reason(sites: Sites) -> str | None:
    """Why nothing is asked of the site; "rules" where it is one of its own."""
    try:
        return None if sites.forbidden_since(SITE, f"{SITE}/x") is None else "rules"
    except Refused as refusal:
        return str(refusal)


def test_what_a_worker_finds_is_known_to_the_others_for_as_long_as_it_holds() -> None:
    board = Board()
    rules, gone, old = note(b"User-agent: *"), note("http_4xx"), note(b"", hold_s=-1.0)
    assert board.exchange("a", {"1": rules, "2": gone, "3": old}, ["1"]) == {"1": rules}
    assert board.exchange("b", {}, ["1", "2", "3", "4"]) == {"1": rules, "2": gone}


def test_a_site_that_one_machine_cannot_reach_is_not_dead_for_the_others() -> None:
    """Its network may be down; a second witness is believed, and an answer ends it."""
    board, dead, alive = Board(), note("timeout", failed=True), note(b"")
    board.exchange("a", {SITE: dead}, [])
    board.exchange("a", {SITE: dead}, [])
    assert board.exchange("a", {}, [SITE]) == {SITE: dead}  # another worker there
    assert board.exchange("b", {}, [SITE]) == {}
    board.exchange("b", {SITE: dead}, [])
    assert board.exchange("c", {}, [SITE]) == {SITE: dead}
    board.exchange("c", {SITE: alive}, [])
    assert board.exchange("a", {}, [SITE]) == {SITE: alive}
    board.exchange("a", {SITE: dead}, [])
    assert board.exchange("b", {}, [SITE]) == {}


def test_memory_is_bounded_and_what_is_asked_for_stays() -> None:
    board = Board(most_bytes=10 * (NOTE_BYTES + 100))
    for i in range(50):
        board.exchange("a", {f"{i}": note(bytes(100))}, ["0"])
        board.exchange("a", {f"{i}": note(bytes(100))}, [])  # in place of itself
    assert set(board.exchange("b", {}, [f"{i}" for i in range(50)])) == {"0", *(f"{i}" for i in range(41, 50))}


def test_what_others_tell_is_not_asked_for_and_not_told_on() -> None:
    told, asked, said = {SITE: note(b"User-agent: *\nDisallow: /x")}, [], []

    def exchange(news: Mapping[str, Note], origins: Sequence[str]) -> Mapping[str, Note]:
        said.append((dict(news), list(origins)))
        return told if SITE in origins else {}

    sites = Sites(lambda url: asked.append(url) or b"", exchange)
    sites.expect([SITE, "http://b.test"])
    assert reason(sites) == "rules"
    sites.forbidden_since("http://b.test", "http://b.test/")
    sites.expect([SITE, "http://b.test", "http://c.test"])
    assert asked == ["http://b.test/robots.txt"]
    assert [(list(news), origins) for news, origins in said] == [
        ([], [SITE, "http://b.test"]),
        (["http://b.test"], ["http://c.test"]),
    ]


def test_a_site_that_fails_again_is_left_alone_for_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    sites = Sites(lambda url: asked.append(clock[0]) or ("timeout" if clock[0] < 5000 else b""))
    for clock[0] in range(1, 6000, 10):
        reason(sites)
    assert [later - earlier for earlier, later in pairwise(asked)] == [300, 600, 1200, 2400]


def test_a_site_that_answers_nothing_any_more_is_left_alone() -> None:
    """Although its robots.txt was read; an answer in between begins the count anew."""
    said = []
    sites = Sites(lambda url: b"", lambda news, origins: said.append(dict(news)) or {})
    assert reason(sites) is None
    for answers in [[None]] * 3 + [["timeout"] * (SILENT - 1) + [None]] * 2 + [["timeout"] * (SILENT - 1)]:
        for answer in answers:
            sites.heard(SITE, answer)
    assert reason(sites) is None
    sites.heard(SITE, "unreachable")
    assert reason(sites) == "unreachable"
    sites.expect([])
    assert said[0][SITE].failed
    sites.heard("http://never-asked.test", "timeout")


def test_workers_share_robots_txt_and_dead_hosts() -> None:
    """Requests on the wire: one for the rules, and none to a host that two machines could not reach."""
    pages = Pages({"/robots.txt": Page(b"User-agent: *\nDisallow: /no"), "/yes": Page(b"x")})
    board = Board()
    with serving(pages) as address:
        hosts = {"a.test": address, "dead.test": "127.0.0.1:9"}
        settings = PairsSettings(hosts=hosts, retries=0, timeout_s=5.0, threads=1)
        for machine in ("one", "two", "three", "four"):
            fetcher = Fetcher(settings, 1000, exchange=partial(board.exchange, machine))
            urls = ["http://dead.test/1", "http://a.test/no", "http://a.test/yes"]
            assert [each.reason for each in fetch_all(fetcher, urls)] == ["unreachable", "opted_out", None]
            fetcher._expect([])  # as the next shard does
    assert pages.asked.count("/robots.txt") == 1
    known = board.exchange("five", {}, ["http://dead.test", "http://a.test"])
    assert known["http://dead.test"].failed
    assert not known["http://a.test"].failed


@pytest.mark.parametrize("threads", [4, 40])  # 36 of 40 wait for their turn while four find out
@pytest.mark.parametrize("drips", [False, True])
def test_a_host_that_is_silent_or_never_done_costs_few_rows_their_time(threads: int, drips: bool) -> None:
    """And all of its rows end, with that reason."""
    asked = []

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/robots.txt":
                self.send_response(404)
                self.end_headers()
                return
            asked.append(self.path)
            if drips:
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
            time.sleep(1.0)

    with listening(Silent) as address:
        settings = PairsSettings(hosts={"a.test": address}, retries=0, timeout_s=0.6, threads=threads)
        found = fetch_all(Fetcher(settings, 1000), [f"http://a.test/{i}" for i in range(40)])
    assert {each.reason for each in found} == {"timeout"}
    assert SILENT <= len(asked) <= SILENT + 4
