"""The fetch against a real local server that does what servers on the internet do."""

import contextlib
import datetime
import os
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.data.fetch import opener
from pipeline.data.fetch.fetcher import Fetched, Fetcher, spread_hosts
from pipeline.data.fetch.opener import Guard
from pipeline.errors import UserError
from pipeline.ledger import REASONS
from pipeline.local import NOTHING, PathPolicy
from pipeline.settings import PairsSettings
from tests.pipeline.data.bench import Page, Pages, fetch_all, serving

MAX_BYTES = 200_000
BODY = bytes(range(256)) * 8  # the fetch never looks inside


PAGES = {
    **{f"/status/{status}": Page(b"sorry", status) for status in (410, 502)},
    **{f"/hops/{i}": Page(status=302, headers={"Location": f"/hops/{i - 1}"}) for i in range(1, 6)},
    "/robots.txt": Page(status=404),  # see test_robots.py
    "/drip": Page(bytes(100), drip_s=0.1),
    "/short": Page(BODY[:-20], headers={"Content-Length": str(len(BODY))}),
    "/largest": Page(bytes(MAX_BYTES)),
    "/other-bot": Page(BODY, headers={"X-Robots-Tag": "someone-else: noai"}),
    "/busy": [Page(status=429), Page(status=500), Page(BODY)],
}


class Site(Pages):
    """``PAGES``, numbers that come more or less late, silence, and ``BODY`` for everything else."""

    released = Event()  # ends the silence

    def get(self, path: str, default: Any = None) -> Any:
        page = super().get(path, Page(BODY))
        _, kind, rest = [*path.split("/", 2), ""][:3]
        if kind == "silent":
            self.released.wait(60)
        if kind == "number":
            time.sleep(0.02 if int(rest) % 3 == 0 else 0)
            return Page(path.encode())
        return page

    def hits(self) -> Counter[str]:
        """Returns how often each path was asked for since the last call."""
        asked, self.asked = self.asked, []
        return Counter(path for path in asked if path != "/robots.txt")


SITE = Site(PAGES)


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with serving(SITE) as address:
        yield f"http://{address}"


def fetcher(reach: PathPolicy = NOTHING, **changes: object) -> Fetcher:
    settings = {"threads": 4, "timeout_s": 5.0, "retries": 0, "allow": ("127.0.0.1",), **changes}
    allow = settings.pop("allow")
    return Fetcher(PairsSettings(**settings), MAX_BYTES, reach=reach, allow=allow)


def one(reference: str, reach: PathPolicy = NOTHING, **changes: object) -> Fetched:
    [result] = fetch_all(fetcher(reach, **changes), [reference])
    assert (result.data is None) == (result.reason in REASONS)
    return result


@pytest.mark.parametrize("path", ["/largest", "/hops/5", "/other-bot", "/with space/é.png?q=a%20b"])
def test_what_is_allowed_arrives(site: str, path: str) -> None:
    """See tests/pipeline/data/test_hostile.py for what does not, and why."""
    assert one(site + path).data == (bytes(MAX_BYTES) if path == "/largest" else BODY)


def test_the_allow_list_takes_addresses_networks_and_names(site: str) -> None:
    port = site.rpartition(":")[2]
    SITE.hits()
    assert one(f"{site}/", allow=("10.0.0.0/8", "example.org")).reason == "forbidden_address"
    assert not SITE.hits()
    for allow, host in (("127.0.0.1", "127.0.0.1"), ("127.0.0.0/8", "127.0.0.1"), ("LOCALHOST", "localhost")):
        assert one(f"http://{host}:{port}/a.png", allow=(allow,)).data == BODY


def test_the_name_is_resolved_once(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that answers differently the second time (DNS rebinding) gains nothing."""
    answers = iter(["93.184.216.34", "127.0.0.1"])
    connected = []

    def resolve(host: str, port: int, *_: object, **__: object) -> list:
        address = next(answers) if host == "rebinding.test" else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert one("http://rebinding.test/", allow=()).reason == "unreachable"
    assert connected == ["93.184.216.34"]


def test_a_name_is_asked_for_once_a_minute(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, clock = [], [0.0]
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or [(0, 0, 0, "", ("127.0.0.1", 0))]
    )
    monkeypatch.setattr(opener, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    guard = Guard({}, [])
    for clock[0] in (0.0, 59.0, 61.0, 62.0):
        assert guard._addresses("a.test", 80) == ["127.0.0.1"]
        guard._addresses("b.test", 80)
    assert asked == ["a.test", "b.test"] * 2


def test_proxies_of_the_environment_are_not_used(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert one(site + "/a.png").data == BODY


def test_https_checks_the_certificate_and_keeps_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = tmp_path / "secure.pem"
    certificate.write_bytes(self_signed("secure.test"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with serving(SITE, context) as address:
        hosts = dict.fromkeys(("secure.test", "other.test"), address)
        opener._tls_context.cache_clear()
        assert one("https://secure.test/a.png", hosts=hosts).reason == "unreachable"  # nobody vouches for it
        opener._tls_context.cache_clear()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert one("https://secure.test/a.png", hosts=hosts).data == BODY
        assert one("https://secure.test/hops/3", hosts=hosts).data == BODY
        assert one("https://other.test/a.png", hosts=hosts).reason == "unreachable"
        assert one("https://secure.test/drip", hosts=hosts, timeout_s=0.5).reason == "timeout"
    opener._tls_context.cache_clear()


def self_signed(name: str) -> bytes:
    """A key and its certificate for one host name, PEM."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key.private_bytes(*form) + certificate.public_bytes(serialization.Encoding.PEM)


def test_only_passing_troubles_are_tried_again(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.fetch.fetcher._BACKOFF_S", 0.01)
    SITE.hits()
    ends = {"/busy": None, "/short": "truncated", "/status/502": "http_5xx", "/status/410": "http_4xx"}
    assert {path: one(site + path, retries=2, timeout_s=20.0).reason for path in ends} == ends
    assert SITE.hits() == {"/busy": 3, "/short": 3, "/status/502": 3, "/status/410": 1}


def test_every_reference_is_answered_once_and_look_ahead_is_bounded(site: str) -> None:
    results = fetcher(threads=3).fetch([f"{site}/number/{i}" for i in range(40)])
    SITE.hits()
    found = [next(results)]
    time.sleep(0.2)
    assert SITE.hits().total() <= 7
    found += results
    assert sorted((place, r.data) for place, r in found) == [(i, f"/number/{i}".encode()) for i in range(40)]


def test_one_that_is_silent_holds_up_no_other(site: str) -> None:
    """Not of its own list, with fewer threads than there are others, and not of the next one."""
    shared = fetcher(threads=2, timeout_s=60.0)
    first = shared.fetch([f"{site}/silent", *(f"{site}/number/{i}" for i in range(20))])
    assert sorted(place for place, _ in islice(first, 20)) == list(range(1, 21))
    assert sorted(place for place, _ in shared.fetch([f"{site}/number/{i}" for i in range(20)])) == list(range(20))
    SITE.released.set()
    assert [place for place, _ in first] == [0]


def test_references_of_one_host_are_spread_over_the_list() -> None:
    urls = [*(f"http://a.test/{i}" for i in range(6)), "http://b.test/0", "http://B.test/1", "/local", "http://c.test/"]
    assert spread_hosts(urls) == [0, 1, 6, 2, 8, 9, 3, 4, 7, 5]


def test_a_result_that_nobody_takes_stops_the_fetch(site: str) -> None:
    results = fetcher(threads=2).fetch([f"{site}/number/{i}" for i in range(100)])
    next(results)
    SITE.hits()
    results.close()  # type: ignore[attr-defined]
    assert SITE.hits().total() <= 4


@contextlib.contextmanager
def _black_hole(address: str, port: int) -> Iterator[None]:
    """A port where connections are neither accepted nor refused, as its queue is full."""
    with contextlib.ExitStack() as open_sockets:
        listener = open_sockets.enter_context(socket.socket())
        listener.bind((address, port))
        listener.listen(0)
        for _ in range(10):
            filler = open_sockets.enter_context(socket.socket())
            filler.settimeout(0.2)
            try:
                filler.connect((address, port))
            except TimeoutError:
                break
        else:
            pytest.fail("the queue never filled")
        yield


def test_an_address_that_never_answers_leaves_time_for_the_next(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve: Callable[..., list[tuple[object, ...]]] = socket.getaddrinfo

    def found(host: str, *rest: object, **more: object) -> list[tuple[object, ...]]:
        return [answer for each in ("127.0.0.2", "127.0.0.1") for answer in resolve(each, *rest, **more)]

    port = int(site.rpartition(":")[2])
    with _black_hole("127.0.0.2", port):
        monkeypatch.setattr(socket, "getaddrinfo", found)
        assert one(f"http://two.test:{port}/a.png", allow=("127.0.0.0/8",), timeout_s=2.0).data == BODY


def test_a_public_address_of_this_machine_is_not_the_internet(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opener, "is_public", lambda _: True)
    assert one(site + "/a.png", allow=()).reason == "forbidden_address"
    assert one(site + "/a.png").data == BODY


def test_files_are_read_within_the_same_budget(tmp_path: Path) -> None:
    (tmp_path / "a b#1.png").write_bytes(BODY)
    (tmp_path / "empty.png").touch()
    (tmp_path / "big.png").write_bytes(bytes(MAX_BYTES + 1))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("a b#1.png")
    (tmp_path / "out.png").symlink_to("/etc/passwd")
    mine = PathPolicy(own=(str(tmp_path),))
    assert one(str(tmp_path / "a b#1.png"), reach=mine).data == BODY
    assert one((tmp_path / "a b#1.png").as_uri(), reach=mine).data == BODY
    reasons = {
        "link.png": None, "empty.png": "zero_bytes", "big.png": "too_large", "none.png": "missing_file",
        "": "missing_file", "pipe.png": "missing_file", "out.png": "forbidden_reference",
        "../secret.png": "forbidden_reference",
    }  # fmt: skip
    assert {name: one(f"{tmp_path}/{name}", reach=mine).reason for name in reasons} == reasons
    assert one("/dev/zero", reach=mine).reason == "forbidden_reference"
    assert one("/dev/zero", reach=PathPolicy(own=("/dev",))).reason == "missing_file"


def test_nothing_of_the_machine_or_of_s3_is_read_that_nobody_has_named(tmp_path: Path) -> None:
    """Not even where the records of a list, which came through a store, ask for it."""
    (tmp_path / "a.png").write_bytes(BODY)
    for reference in (f"{tmp_path}/a.png", f"file://{tmp_path}/a.png", "s3://bucket/a.png", "tar:///a?offset=0&size=9"):
        assert one(reference).reason == "forbidden_reference"


@pytest.mark.parametrize(
    "reference",
    ["", "a.png", "gs://bucket/a.png", "ftp://example.org/a.png", "data:image/png;base64,AA", "http://", "http://[::1",
     "http://a:port/", "http:///a.png", "file://host/a.png", "/nul\0.png", "http://" + "a" * 64 + ".test/",
     "http://user@127.0.0.1/", "http://user:secret@a.test/", "http://ex%61mple.org/", "http://a.test\\@b.test/",
     "http://[fe80::1%25lo]/", "http://a..b/", "http://./", f"http://{'ü.' * 130}test/"],
)  # fmt: skip
def test_other_references_are_not_supported(reference: str) -> None:
    assert one(reference).reason == "unsupported_reference"


def test_settings_that_cannot_be_read_are_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"drawings\.test"):
        fetcher(hosts={"drawings.test": "localhost"})
    with pytest.raises(UserError, match=r"10\.0\.0\.0/99"):
        fetcher(allow=("10.0.0.0/99",))
