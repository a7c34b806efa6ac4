"""robots.txt and X-Robots-Tag: the example of RFC 9309, which group is ours, and what a real server is asked."""

import gc
import gzip
import textwrap
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import unclip
from pipeline.data.fetch import fetcher
from pipeline.data.fetch.fetcher import Fetcher
from pipeline.data.fetch.opener import Refused, normal_url
from pipeline.data.fetch.references import shown
from pipeline.data.fetch.rules import MAX_RULES, ROBOTS_BYTES, allows, opting_out, parse_robots
from pipeline.data.fetch.sites import Sites
from pipeline.data.pairs.row_index import read_opt_outs
from pipeline.graph.artifacts import read_shards
from pipeline.settings import PairsSettings
from tests.chain import ROOT
from tests.pipeline.data.bench import Bench, Page, Pages, fetch_all, picture, serving, write_list

RFC_5_1 = b"""\
User-Agent: *
Disallow: *.gif$
Disallow: /example/
Allow: /publications/

User-Agent: foobot
Disallow:/
Allow:/example/page.html
Allow:/example/allowed.gif

User-Agent: barbot
User-Agent: bazbot
Disallow: /example/page.html

User-Agent: quxbot
"""


def allowed(robots: str | bytes, path: str) -> bool:
    body = robots.encode() if isinstance(robots, str) else robots
    return allows(parse_robots(body), f"http://example.com{path}")


@pytest.mark.parametrize(
    ("ours", "path", "expected"),
    [
        (b"nobody", "/a.gif", False), (b"nobody", "/a.gif?x", True), (b"nobody", "/example/", False),
        (b"nobody", "/publications/a.gif", True), (b"nobody", "/robots.txt", True),
        (b"foobot", "/", False), (b"foobot", "/example/page.html", True), (b"foobot", "/example/other.html", False),
        (b"foobot", "/example/allowed.gif", True), (b"foobot", "/robots.txt", True),
        (b"barbot", "/example/page.html", False), (b"barbot", "/a.gif", True),
        (b"bazbot", "/example/page.html", False), (b"bazbot", "/example/", True),
        (b"quxbot", "/example/page.html", True), (b"quxbot", "/a.gif", True),
    ],
)  # fmt: skip
def test_the_simple_example_of_the_rfc(ours: bytes, path: str, expected: bool) -> None:
    assert allowed(RFC_5_1.replace(ours, b"unclip-ray"), path) == expected


@pytest.mark.parametrize(
    ("rules", "path", "expected"),
    [
        ("Disallow: /p\nAllow: /p", "/p", True), ("Disallow: /\nAllow: /*.png$", "/a.png?x", False),
        ("Disallow:", "/a", True), ("disALLOW : /a # why", "/a", False), ("Disallow: /a$b", "/a$b", False),
        ("Disallow: /foo/bar?baz=http://foo.bar", "/foo/bar?baz=http://foo.bar", False),  # RFC 9309, 2.2.2
        ("Disallow: /foo/bar/\u30c4", "/foo/bar/%E3%83%84", False), ("Disallow: /a%2fb", "/a/b", True),
        ("Crawl-delay: 3\nDisallow: /a", "/a", False), ("Sitemap: http://x\nDisallow: /a", "/a", False),
    ],
)  # fmt: skip
def test_what_a_rule_means(rules: str, path: str, expected: bool) -> None:
    """Which protego knows, and what is left out for it changes nothing."""
    for ending in ("\n", "\r\n", "\r"):
        assert allowed("User-agent: *\n".replace("\n", ending) + rules.replace("\n", ending), path) == expected


@pytest.mark.parametrize(
    ("robots", "expected"),
    [
        ("User-agent: UNCLIP-Ray/1.0\nDisallow: /a", False),
        ("User-agent: img2dataset\nDisallow: /a", False),  # in our user agent, too
        ("User-agent: *\nDisallow: /a\nUser-agent: unclip-ray\nDisallow: /b", True),  # our own group stands alone
        ("User-agent: unclip-ray\nDisallow: /b\nUser-agent: x\nAllow: /\nUser-agent: unclip-ray\nDisallow: /a", False),
        ("User-agent: unclip-ray\nUser-agent: x\n\n# a remark\n\nDisallow: /a", False),
        ("User-agent: x\nSitemap: http://x\nUser-agent: unclip-ray\nDisallow: /a", False),  # no rule between: one group
        ("User-agent: unclip-rayon\nDisallow: /a", True),
        ("User-agent: unclip\nDisallow: /a", True),
        ("User-agent: unclip-ray\nDisallow: /b\nUser-agent: img2dataset\nDisallow: /a", False),  # both count
        ("User-agent: img2dataset\nDisallow: /b\nUser-agent: unclip-ray\nDisallow: /a", False),
        ("Disallow: /a", True),  # before any group
        ("\ufeffUser-agent: *\nDisallow: /a", False),
        ("<!doctype html><title>not found</title>", True),
        ("", True),
    ],
)
def test_which_group_counts(robots: str, expected: bool) -> None:
    assert allowed(robots, "/a") == expected


def test_only_the_first_500_kib_are_read() -> None:
    inside = b"User-agent: *\n" + b"#" * (ROBOTS_BYTES - 100) + b"\nDisallow: /a\n"
    outside = b"User-agent: *\n" + b"#" * ROBOTS_BYTES + b"\nDisallow: /a\n"
    assert not allowed(inside, "/a")
    assert allowed(outside, "/a")


@given(st.binary(max_size=300))
def test_any_bytes_are_read(body: bytes) -> None:
    allowed(body, "/x")
    allowed(b"User-agent: *\nDisallow: " + body, "/x")


def test_a_pattern_of_many_stars_takes_no_time() -> None:  # a backtracking matcher would never end
    assert allowed("User-agent: *\nDisallow: /" + "*a" * 2000 + "b\n", "/" + "a" * 5000)


@pytest.mark.parametrize(
    ("tags", "out"),
    [
        (["noai"], True), (["index, NoImageAI"], True), (["all", "noindex"], True), (["none"], True),
        (["noimageindex"], True),
        (["nofollow, noarchive"], False), ([], False), ([""], False), (["noaim"], False), (["max-snippet: 20"], False),
        (["unclip-ray: noai"], True), (["Unclip-Ray: nofollow, noai"], True), (["img2dataset: noindex"], True),
        (["*: noai"], True), (["googlebot: noai"], False), (["googlebot: nofollow, noai"], False),
        (["googlebot: noai, unclip-ray: noai"], True), (["unclip-ray: nofollow, googlebot: noai"], False),
        (["googlebot: noai", "noai"], True), (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], True),
        (["unavailable_after: Wed, 25 Jun 2030 15:00:00 GMT"], False), (["max-image-preview:large,noai"], True),
    ],
)  # fmt: skip
def test_forms_of_the_header(tags: list[str], out: bool) -> None:
    assert (opting_out(tags) is not None) == out


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "reason"), [(b"", None), ("http_4xx", None), ("rate_limited", "rate_limited")])
def test_what_the_lack_of_a_robots_txt_means(answer: bytes | str, reason: str | None) -> None:
    asked: list[str] = []
    robots = Sites(lambda url: asked.append(url) or answer)
    for _ in range(3):
        with pytest.raises(Refused, match=f"^{reason}$") if reason else nullcontext():
            assert robots.forbidden_since("http://a.test", "http://a.test/x") is None
    assert asked == ["http://a.test/robots.txt"]


def test_it_is_asked_for_anew_after_a_day_and_after_a_failure_in_five_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, answers, asked = [0.0], ["http_5xx", b"User-agent: *\nDisallow: /", b""], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    robots = Sites(lambda url: asked.append(url) or answers[len(asked) - 1])  # type: ignore[return-value]
    found = []
    for clock[0] in (1.0, 300.0, 302.0, 86_000.0, 86_703.0):
        try:
            found.append(robots.forbidden_since("http://a.test", "http://a.test/x") is not None)
        except Refused:
            found.append(None)
    assert (found, len(asked)) == ([None, None, True, True, False], 3)


def test_threads_share_one_request_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(url: str) -> bytes:
        asked.append(url)
        time.sleep(0.02)
        return b"User-agent: *\nDisallow: /x"

    robots = Sites(fetch)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: robots.forbidden_since("http://a.test", "http://a.test/x"), range(8)))
    assert asked == ["http://a.test/robots.txt"]

    monkeypatch.setattr(Sites, "MAX_BYTES", 50_000)
    large = Sites(lambda url: b"user-agent:*\nallow:/a\n")
    for i in range(50):
        large.forbidden_since(f"http://{i}.test", f"http://{i}.test/")
        assert large._size == sum(site.size for site in large._sites.values()) <= 50_000
    assert 5 < len(large._sites) < 50
    monkeypatch.setattr(Sites, "MAX_SITES", 7)
    large.forbidden_since("http://a.test", "http://a.test/")
    many = Sites(lambda url: b"")
    for i in range(50):
        many.forbidden_since(f"http://{i}.test", f"http://{i}.test/")
    assert list(many._sites) == [f"http://{i}.test" for i in range(43, 50)]


@pytest.mark.parametrize("rule", ["allow:/{}", "disallow:/*{}*{}$"])
def test_rules_count_as_the_memory_they_take(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A robots.txt of short lines takes eighty times its bytes once it is parsed."""
    monkeypatch.setattr(Sites, "MAX_BYTES", 7 << 19)
    rules = "\n".join(rule.format(i, i) for i in range(MAX_RULES // 2))
    largest = f"user-agent:*\nuser-agent:unclip-ray\nuser-agent:x\n{rules}".encode()
    robots = Sites(lambda url: largest)
    tracemalloc.start()
    for i in range(5):
        robots.forbidden_since(f"http://{i}.test", f"http://{i}.test/")
    gc.collect()  # protego's rules are cycles, so what was dropped is freed by the collector
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert robots._size <= 7 << 19
    assert held < 7.5 * (1 << 19)
    assert len(robots._sites) >= 1


def test_names_times_rules_take_no_memory() -> None:
    """Protego keeps a copy of a group's rules for each of its names, however the names are spelled."""
    for spelled in ("user-agent:{}", "User-Agent {}", "useragent: {}", "user  agent {}", "user agent:{}*"):
        names = "\n".join(spelled.format(f"a{i}") for i in range(300))
        tracemalloc.start()
        parse_robots((names + "\nallow:/" * 300).encode())
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 1 << 20


def test_a_site_of_too_many_rules_for_us_is_left_alone() -> None:
    crowd = "User-Agent: *\n" + "Allow: /x\n" * MAX_RULES
    assert allowed(crowd, "/a.png")
    assert not allowed(crowd + "Disallow: /x\n", "/a.png")
    # Rules for others cost nothing.
    assert allowed("User-Agent: someone\nUser-Agent: else\n" + "Disallow: /\n" * 20_000 + crowd, "/a.png")
    assert not allowed("User-Agent: someone\nUser-Agent: *\n" + "Disallow: /x\n" * 20_000, "/a.png")


def test_comparing_a_url_with_the_rules_of_a_site_takes_no_time() -> None:
    """A rule of wildcards, compared with a megabyte, took the interpreter for seconds, outside of every deadline."""
    rules = parse_robots(b"User-agent: *\n" + b"Disallow: /*a*b*c*d*e$\n" * MAX_RULES)
    with pytest.raises(Refused, match="unsupported_reference"):
        allows(rules, normal_url("http://a.test/" + "ab" * 500_000))
    assert allows(rules, normal_url("http://a.test/" + "ab" * 4_000))


# --- against a server -------------------------------------------------------------------------------------------------


def reasons(pages: Pages, *urls: str, **changes: object) -> list[str | None]:
    with serving(pages) as address:
        hosts = {"a.test": address, "b.test": address}
        settings = PairsSettings(**{"hosts": hosts, "retries": 0, "timeout_s": 5.0, **changes})
        return [fetched.reason for fetched in fetch_all(Fetcher(settings, 10_000), urls)]


def test_what_a_site_forbids_is_asked_for_never_or_once() -> None:
    pages = Pages({"/robots.txt": Page(b"User-agent: *\nDisallow: /no"), "/no": Page(b"x"), "/yes": Page(b"x")})
    pages["/tag"] = Page(b"x", headers={"X-Robots-Tag": "googlebot: all, unclip-ray: noai"})
    pages["/to"] = Page(status=302, headers={"Location": "http://b.test/no"})
    pages["/to-yes"] = Page(status=302, headers={"Location": "/yes", "X-Robots-Tag": "noai"})
    urls = [f"http://a.test/{path}" for path in ("yes", "no", "%6Eo", "tag", "to", "to-yes")]
    assert reasons(pages, *urls, retries=3) == [None] + ["opted_out"] * 5
    assert sorted(pages.asked) == ["/robots.txt", "/robots.txt", "/tag", "/to", "/to-yes", "/yes"]


@pytest.mark.parametrize(("cut", "expected"), [(None, "opted_out"), (20, "unreachable")])
def test_a_robots_txt_that_a_server_compressed_unasked_counts(cut: int | None, expected: str) -> None:
    packed = gzip.compress(b"User-agent: *\nDisallow: /no" + b"\n# and more of it" * 100)[:cut]
    pages = Pages({"/robots.txt": Page(packed, headers={"Content-Encoding": "gzip"}), "/no": Page(b"x")})
    assert reasons(pages, "http://a.test/no") == [expected]
    assert pages.asked == ["/robots.txt"]


def test_robots_txt_is_followed_over_five_redirects_and_to_no_forbidden_address() -> None:
    hops = {f"/r{i}": Page(status=301, headers={"Location": f"http://b.test/r{i + 1}"}) for i in range(1, 5)}
    hops |= {"/r5": Page(b"User-agent: *\nDisallow: /no"), "/no": Page(b"x")}
    start = {"/robots.txt": Page(status=302, headers={"Location": "http://b.test/r1"})}
    assert reasons(Pages(hops | start), "http://a.test/no") == ["opted_out"]
    longer = {path: Page(status=302, headers={"Location": to}) for path, to in (("/robots.txt", "/r0"), ("/r0", "/r1"))}
    assert reasons(Pages(hops | longer), "http://a.test/no") == ["unreachable"]
    inside = {"/robots.txt": Page(status=302, headers={"Location": "http://127.0.0.1:9/"})}
    assert reasons(Pages(hops | inside), "http://a.test/no") == ["forbidden_address"]


@pytest.mark.parametrize(
    ("page", "reason"),
    [(Page(status=404), None), (Page(status=403), None), (Page(status=500), "http_5xx"), (Page(status=503), "http_5xx"),
     (Page(b"User-agent: *\n", headers={"Content-Length": "40"}), "unreachable"), (Page(b"\xff\xfe\0" * 50), None),
     (Page(b"User-agent: *\nDisallow: /", headers={"Content-Type": "text/html"}), "opted_out"),
     (Page(b"User-agent: *\nDisallow: /\n" + b"#" * (1 << 20)), "opted_out")],
)  # fmt: skip
def test_what_answers_to_robots_txt_mean(page: Page, reason: str | None) -> None:
    pages = Pages({"/robots.txt": page, "/x": Page(b"x")})
    assert reasons(pages, "http://a.test/x") == [reason]
    assert ("/x" in pages.asked) == (reason is None)


def test_a_site_whose_robots_txt_cannot_be_had_costs_no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(fetcher, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pauses.append))
    pages = Pages({"/robots.txt": Page(status=500)})
    urls = [f"http://a.test/{i}" for i in range(20)]
    assert reasons(pages, *urls, retries=2) == ["http_5xx"] * 20
    assert pages.asked == ["/robots.txt"] * 3
    assert len([pause for pause in pauses if pause]) == 2
    pages = Pages({"/robots.txt": [Page(status=502), Page(b"User-agent: *\nDisallow: /no")], "/x": Page(b"x")})
    assert reasons(pages, "http://a.test/x", "http://a.test/no", retries=1) == [None, "opted_out"]


def test_evidence_says_what_kept_us_out_and_when_and_the_result_is_the_same_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And can be printed by whoever reads it: what a site says may hold anything, and a reference may be signed."""
    pages = {
        "/robots.txt": Page(b"# hello\nUser-agent: *\nDisallow: /no*.png  # please \x1b]0;PWNED\x07\n"),
        "/tag.png?sig=5ecret": Page(picture(2), headers={"X-Robots-Tag": "noai, \x9b2J"}),
        "/no/1.png": Page(picture(1)),
        "/tag.png": Page(picture(2), headers={"X-Robots-Tag": "noindex, noai"}),
        "/yes.png": Page(picture(3)),
        "/to.png": Page(status=302, headers={"Location": "/tag.png"}),
    }
    began = time.time()
    benches = []
    with serving(pages) as address:
        urls = [f"http://a.test/{name}.png" for name in ("no/1", "tag", "yes", "to", "gone")]
        urls += ["http://a.test/no.png?X-Amz-Signature=5ecret", "http://a.test/tag.png?sig=5ecret"]
        source = write_list(tmp_path / "list.csv", [(url, "a picture") for url in urls])
        for name in ("first", "again"):
            run = {"pairs": {"hosts": {"a.test": address}, "retries": 0}}
            benches.append(Bench(tmp_path / name, [source], run=run))
            benches[-1].make("source", "pairs")
    first, again = benches
    out = "opted_out"
    assert [row["reason"] for row in first.rows("pairs")] == [out, out, None, out, "http_4xx", out, out]
    assert first.blobs("pairs") == again.blobs("pairs")
    assert first.made["pairs"].shard_table == again.made["pairs"].shard_table
    found = list(read_opt_outs(first.store, read_shards(first.store, first.made["pairs"])))
    assert [(int(row["key"]), row["url"], row["evidence"]) for row in found] == [
        (0, urls[0], f"http://a.test/robots.txt disallows {urls[0]}"),
        (1, urls[1], "X-Robots-Tag: noindex, noai at http://a.test/tag.png"),
        (3, urls[3], "X-Robots-Tag: noindex, noai at http://a.test/tag.png"),
        (5, shown(urls[5]), "http://a.test/robots.txt disallows http://a.test/no.png?X-Amz-Signature=***"),
        (6, shown(urls[6]), r"X-Robots-Tag: noai, \x9b2J at http://a.test/tag.png?sig=***"),
    ]
    assert all(began <= row["seen"].timestamp() <= time.time() for row in found)

    page = (ROOT / "docs/fetch.md").read_text()
    code = page[page.index("    import unclip") : page.index("## Private sources")]
    opened = SimpleNamespace(artifact=lambda stage: unclip.Artifact(first.store, first.made[stage]))
    monkeypatch.setattr("unclip.open", lambda config: opened)
    exec(textwrap.dedent(code), {})
    assert (
        capsys.readouterr().out.splitlines()[0].startswith(f"000000000000 {urls[0]} opted_out http://a.test/robots.t")
    )
