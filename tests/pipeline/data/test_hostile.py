"""The hostile corpus through the pairs stage: nothing dies, every row is counted once, and nobody inside is asked.

``Public`` plays the servers of the internet. ``Forbidden`` listens where no list may lead: its log must stay empty.
"""

import gzip
import hashlib
import io
import socket
import socketserver
import struct
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import quote, unquote

import pytest

from pipeline.data.fetch.references import without_password
from pipeline.data.source.rows import read_captions
from pipeline.graph.artifacts import read_shards
from pipeline.ledger import REASONS
from tests.pipeline.data.bench import Bench, picture, write_list
from tests.pipeline.data.hostile import MAX_PIXELS, files

MAX_BYTES = 200_000
HOST = "http://public.test"
OK = b"HTTP/1.1 200 OK\r\n"
BODY = picture(1)
LENGTH = b"Content-Length: %d\r\n" % len(BODY)

# Ways to write loopback, link-local, private and other inner addresses. {port} is where a forbidden server listens.
INSIDE = [
    "127.0.0.1:{port}", "127.1:{port}", "127.0.1:{port}", "127.127.127.127:{port}",
    "localhost:{port}", "LOCALHOST:{port}", "localhost.:{port}", "127.0.0.1.:{port}",
    "0x7f.0.0.1:{port}", "0x7f000001:{port}", "0X7F.1:{port}", "2130706433:{port}",
    "017700000001:{port}", "0177.0.0.1:{port}", "0177.0x0.1:{port}", "0.0.0.0:{port}", "0:{port}",
    "[::1]:{port}", "[::]:{port}", "[::ffff:127.0.0.1]:{port}", "[::ffff:7f00:1]:{port}",
    "[0:0:0:0:0:ffff:7f00:1]:{port}", "[64:ff9b::7f00:1]:{port}", "[2002:7f00:1::1]:{port}",
    "１２７.0.0.1:{port}", "127。0。0。1:{port}", "①②⑦.0.0.1:{port}", "169.254.169.254", "[fe80::1]",
    "[fd00:ec2::254]", "10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "224.0.0.1",
    "255.255.255.255", "private.test:{port}", "loopback.test:{port}", "metadata.test",
    "mapped.test:{port}", "[ff02::1]",
]  # fmt: skip
NAMES = {
    "private.test": ["10.0.0.5", "192.168.7.7"], "loopback.test": ["127.0.0.1"], "metadata.test": ["169.254.169.254"],
    "mapped.test": ["::ffff:127.0.0.1"],
}  # fmt: skip
# Ways to write a host that parsers read differently: not for us at all.
AMBIGUOUS = [
    "user@127.0.0.1:{port}", "public.test@127.0.0.1:{port}", "127.0.0.1:{port}@public.test",
    "%31%32%37.0.0.1:{port}", "127.0.0.1%2f@public.test", "public.test\\@127.0.0.1:{port}",
    "[::1%25lo]:{port}", "[::1:{port}", "127.0.0.1:{port}x",
]  # fmt: skip
# Other references, and what a list says beside them: its sha256, and the reason.
OTHERS = [
    ("", "", "no_reference"),
    (f"{HOST}/fine", "", "duplicate_url"),
    (f"{HOST}/fine?hashed", hashlib.sha256(BODY).hexdigest(), None),
    (f"{HOST}/fine?other", "0" * 64, "hash_mismatch"),
    ("http://www.denied.test/a.png", "", "denied"),
    ("http://closed.test/a.png", "", "unreachable"),
    ("file:///nowhere/a.png", "", "missing_file"),
    ("file:///etc/passwd", "", "forbidden_reference"),
    ("s3://anybodys/a.png", "", "forbidden_reference"),
    ("tar:///etc/a.tar?offset=0&size=9", "", "forbidden_reference"),
    ("embedding:///etc?part=0&row=0", "", "forbidden_reference"),
    ("ftp://public.test/a.png", "", "unsupported_reference"),
    ("tar:///nowhere/a.tar", "", "unsupported_reference"),  # not a member
    (f"tar:///nowhere/a.tar?offset=0&size={10**12}", "", "too_large"),
    ("tar://[/a.tar?offset=0&size=9", "", "unsupported_reference"),  # no address
    (f"tar:///nowhere/a.tar?offset={10**30}&size=9", "", "missing_file"),
    ("tar:///nowhere/a.tar?offset=-1&size=9", "", "unsupported_reference"),
]


def endless() -> Iterator[bytes]:
    yield OK + b"\r\n"
    while True:
        yield bytes(65_536)


def endless_chunks() -> Iterator[bytes]:
    yield OK + b"Transfer-Encoding: chunked\r\n\r\n"
    while True:
        yield b"10000\r\n" + bytes(65_536) + b"\r\n"


def endless_headers() -> Iterator[bytes]:
    yield OK
    while True:
        yield b"X-More: " + b"x" * 1000 + b"\r\n"


def slow(head: bytes, body: bytes) -> Iterator[bytes]:
    yield head
    for i in range(len(body)):
        time.sleep(0.05)
        yield body[i : i + 1]


def silence() -> Iterator[bytes]:
    yield b""
    time.sleep(8)


ANSWERS = {  # path: what comes over the wire, and the reason
    "/fine": (OK + LENGTH + b"\r\n" + BODY, None),
    "/no-length": (OK + b"\r\n" + BODY, None),
    "/http-1.0": (b"HTTP/1.0 200 OK\r\n\r\n" + BODY, None),
    "/chunked": (OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY), None),
    "/length-below": (OK + b"Content-Length: 300\r\n\r\n" + BODY, "truncated"),
    "/length-above": (OK + b"Content-Length: %d\r\n\r\n%s" % (len(BODY) + 1, BODY), "truncated"),
    "/length-huge": (OK + b"Content-Length: 99999999999999\r\n\r\n" + BODY, "too_large"),
    "/length-negative": (OK + b"Content-Length: -1\r\n\r\n" + BODY, None),  # http.client reads to the end
    "/length-words": (OK + b"Content-Length: many\r\n\r\n" + BODY, None),
    "/chunk-cut": (OK + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n" + BODY[:500], "truncated"),
    "/chunk-garbage": (OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n" + BODY, "truncated"),
    "/gzip-bomb": (OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(100 << 20)), "not_an_image"),
    "/gzip-picture": (OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(BODY), "not_an_image"),
    "/page": (OK + b"Content-Type: text/html\r\n\r\n" + BODY, "not_an_image"),
    "/film": (OK + b"Content-Type: video/mp4\r\n\r\n" + bytes(100), "not_an_image"),
    "/lie": (OK + b"Content-Type: image/png\r\n\r\n<html></html>", "not_an_image"),
    "/empty": (OK + b"Content-Length: 0\r\n\r\n", "zero_bytes"),
    "/nothing": (b"", "unreachable"),
    "/no-http": (b"SSH-2.0-OpenSSH_9.9\r\n", "unreachable"),
    "/http-0.9": (BODY, "unreachable"),
    "/bad-status": (b"HTTP/1.1 two OK\r\n\r\n", "unreachable"),
    "/status-999": (b"HTTP/1.1 999 No\r\n\r\n", "unreachable"),
    "/status-204": (b"HTTP/1.1 204 No Content\r\n\r\n", "zero_bytes"),
    "/status-304": (b"HTTP/1.1 304 Not Modified\r\n\r\n", "unreachable"),
    "/status-300": (b"HTTP/1.1 300 Multiple Choices\r\n\r\n", "unreachable"),
    "/status-401": (b"HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm=x\r\n\r\n", "http_4xx"),
    "/status-418": (b"HTTP/1.1 418 Teapot\r\n\r\n", "http_4xx"),
    "/status-429": (b"HTTP/1.1 429 No\r\n\r\n", "rate_limited"),
    "/status-507": (b"HTTP/1.1 507 Full\r\n\r\n", "http_5xx"),
    "/line-long": (b"HTTP/1.1 200 " + b"x" * 100_000 + b"\r\n\r\n", "unreachable"),
    "/header-long": (OK + b"X: " + b"x" * 100_000 + b"\r\n\r\n", "unreachable"),
    "/headers-many": (OK + b"X: y\r\n" * 1000 + b"\r\n" + BODY, "unreachable"),
    "/headers-binary": (OK + b"X-\xff\xfe: \0\r\n\r\n" + BODY, None),
    "/robots-header": (OK + b"X-Robots-Tag: noai\r\n\r\n" + BODY, "opted_out"),
    "/loop": (b"HTTP/1.1 302 Found\r\nLocation: /loop\r\n\r\n", "unreachable"),
    "/no-location": (b"HTTP/1.1 302 Found\r\n\r\n", "unreachable"),
    "/to-file": (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", "forbidden_address"),
    "/to-ftp": (b"HTTP/1.1 301 Found\r\nLocation: ftp://public.test/\r\n\r\n", "forbidden_address"),
    "/to-data": (b"HTTP/1.1 303 Found\r\nLocation: data:image/png;base64,AA\r\n\r\n", "forbidden_address"),
    "/to-script": (b"HTTP/1.1 307 Found\r\nLocation: javascript:alert(1)\r\n\r\n", "forbidden_address"),
    "/to-gopher": (b"HTTP/1.1 308 Found\r\nLocation: gopher://127.0.0.1:70/\r\n\r\n", "forbidden_address"),
    "/to-utf-8": ("HTTP/1.1 302 Found\r\nLocation: /füne\r\n\r\n".encode(), None),
    "/f%C3%BCne": (OK + b"\r\n" + BODY, None),
    "/endless": (endless, "too_large"),
    "/endless-chunks": (endless_chunks, "too_large"),
    "/endless-headers": (endless_headers, "unreachable"),
    "/drip": (lambda: slow(OK + LENGTH + b"\r\n", BODY), "timeout"),
    "/drip-headers": (lambda: slow(OK, b"X-Header: value\r\n" * 100), "timeout"),
    "/drip-status": (lambda: slow(b"", OK * 100), "timeout"),
    "/silence": (silence, "timeout"),
}  # fmt: skip


@contextmanager
def raw_server(log: list[str]) -> Iterator[int]:
    """Writes ANSWERS byte by byte as they stand; notes each request line with its Host. Yields its port on loopback."""
    lock = Lock()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                line = self.rfile.readline(10_000).decode("latin-1").strip()
                headers = list(iter(lambda: self.rfile.readline(10_000).strip(), b""))
                with lock:
                    log.append(f"{line} {[h for h in headers if h.lower().startswith(b'host:')]}")
                path = line.split(" ")[1] if " " in line else ""
                if path.startswith("/to?"):
                    self.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: " + unquote(path[4:]).encode() + b"\r\n\r\n")
                    return
                wire, _ = ANSWERS.get(path.partition("?")[0], (b"HTTP/1.1 404 Not Found\r\n\r\n", None))
                for part in [wire] if isinstance(wire, bytes) else wire():
                    self.wfile.write(part)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass(frozen=True)
class Outcome:
    """The corpus after the stage: the bench, each row's reference and the reasons it may end with, and the logs."""

    bench: Bench
    expected: list[tuple[str, frozenset[str | None]]]
    public: list[str]
    forbidden: list[str]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    folder = tmp_path_factory.mktemp("hostile")
    public: list[str] = []
    forbidden: list[str] = []
    resolve = socket.getaddrinfo

    def resolving(host: str, port: int, *rest: object, **options: object) -> object:
        if host in NAMES:
            kinds = [(socket.AF_INET6 if ":" in a else socket.AF_INET, a) for a in NAMES[host]]
            return [(kind, socket.SOCK_STREAM, 6, "", (address, port)) for kind, address in kinds]
        return resolve(host, port, *rest, **options)

    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolving)
        port = stack.enter_context(raw_server(public))
        inner = stack.enter_context(raw_server(forbidden))
        expected = [(f"{HOST}{path}", frozenset({end})) for path, (_, end) in ANSWERS.items()]
        for i, spelling in enumerate(INSIDE):
            place = spelling.format(port=inner)
            refused = frozenset({"forbidden_address"})
            # Numbered, for spellings of one URL are duplicates.
            expected += [(f"http://{place}/{i}.png", refused), (f"{HOST}/to?{quote(f'http://{place}/b.png')}", refused)]
        for spelling in AMBIGUOUS:
            place = spelling.format(port=inner)
            # Some are equal without what stands before the @, which is not kept.
            refused = frozenset({"unsupported_reference", *(["duplicate_url"] if "@" in place else [])})
            expected += [(f"http://{place}/a.png", refused), (f"{HOST}/to?{quote(f'http://{place}/b.png')}", refused)]
        for file in files():
            path = folder / quote(file.name)
            path.write_bytes(file.data)
            expected.append((f"file://{quote(str(path))}", file.ends))
        rows = [(url, f"row {i}") for i, (url, _) in enumerate(expected)]
        rows += [(url, f"{sha256} is expected", "", sha256) for url, sha256, _ in OTHERS]
        expected += [(url, frozenset({end})) for url, _, end in OTHERS]
        source = write_list(folder / "list.csv", rows)
        (folder / "denied.txt").write_text("denied.test\n")
        hosts = {"public.test": f"127.0.0.1:{port}", "closed.test": "127.0.0.1:1"}
        settings = {"hosts": hosts, "retries": 0, "timeout_s": 3.0, "per_host": 16}
        recipe = {"max_bytes": MAX_BYTES, "max_pixels": MAX_PIXELS, "deny_hosts": str(folder / "denied.txt")}
        paths = {"paths": [source], "shard_rows": 250, "roots": ["/nowhere"]}
        bench = Bench(folder / "store", [source], source=paths, pairs=recipe, run={"pairs": settings})
        bench.make("source", "pairs")
        yield Outcome(bench, expected, public, forbidden)


def test_every_row_is_there_once_with_its_reason(outcome: Outcome) -> None:
    rows = outcome.bench.rows("pairs")
    assert [row["url"] for row in rows] == [without_password(url) for url, _ in outcome.expected]
    assert len({row["key"] for row in rows}) == len(rows)
    wrong = {
        row["url"]: row["reason"]
        for row, (_, ends) in zip(rows, outcome.expected, strict=True)
        if row["reason"] not in ends or (row["status"] == "kept") != (row["reason"] is None)
    }
    assert wrong == {}


def test_the_ledger_counts_them_all(outcome: Outcome) -> None:
    ledger = outcome.bench.made["pairs"].ledger
    found = Counter(row["reason"] for row in outcome.bench.rows("pairs"))
    assert ledger.rows == len(outcome.expected)
    assert ledger.kept == found.pop(None)
    later = {"http_5xx", "rate_limited", "timeout", "unreachable"}
    assert ledger.deferred == {reason: count for reason, count in found.items() if reason in later}
    assert ledger.rejected == {reason: count for reason, count in found.items() if reason not in later}
    assert ledger.deferred.keys() == later


def test_what_is_kept_has_the_size_that_it_was_made_with(outcome: Outcome) -> None:
    rows = {row["url"].rpartition("/")[2]: row for row in outcome.bench.rows("pairs") if row["status"] == "kept"}
    kept = [(file, rows[quote(quote(file.name))]) for file in files() if file.ends == {None}]
    assert kept
    assert [(row["width"], row["height"]) for _, row in kept] == [file.size for file, _ in kept]


def test_nobody_inside_was_asked(outcome: Outcome) -> None:
    assert outcome.forbidden == []
    asked = [line for line in outcome.public if "/robots.txt" not in line]
    assert len(asked) > len(ANSWERS) + len(INSIDE)
    assert all("[b'Host: public.test']" in line for line in outcome.public)
    assert {end for _, ends in outcome.expected for end in ends} - {None} <= REASONS.keys()


# --- tars and texts ---------------------------------------------------------------------------------------------------


def test_odd_tar_members_cost_nothing_and_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "inner" / "odd.tar"
    path.parent.mkdir()
    (tmp_path / "secret.png").write_bytes(picture(9))
    before = sorted(tmp_path.rglob("*"))
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, link
            tar.addfile(member, io.BytesIO(data))

        add("../../escape.png", picture(1))
        add("../../escape.txt", b"a caption above us")
        add(str(tmp_path / "absolute.png"), picture(2))
        add("link.png", kind=tarfile.SYMTYPE, link="../secret.png")
        add("link.txt", b"nothing to see")
        add("device.png", kind=tarfile.CHRTYPE)
        add("pipe.png", kind=tarfile.FIFOTYPE)
        add("twice.png", picture(3))
        add("between.png", picture(4))
        add("twice.png", picture(5))
        add("n" * 300 + ".PNG", picture(7))
        add("name\udcff\udcfe.png", picture(8))  # not UTF-8
        add("cut.png", picture(1)[:-300])
        add("empty.png")
        add(
            "promise.png", b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", 9**6, 9**6, 8, 2, 0, 0, 0, 0)
        )
    bench = Bench(tmp_path / "store", [str(path)], pairs={"max_pixels": MAX_PIXELS})
    bench.make("source", "captions", "pairs")
    damaged = ["truncated", "zero_bytes", "decode_error"]
    reasons = [None, None, "no_reference", *[None] * 5, *damaged]
    assert [row["reason"] for row in bench.rows("pairs")] == reasons
    after = [p for p in sorted(tmp_path.rglob("*")) if p != path and not p.is_relative_to(tmp_path / "store")]
    assert after == before
    captions = read_captions(bench.store, read_shards(bench.store, bench.made["captions"])[0])
    assert captions[f"{0:012d}"] == ["a caption above us"]
