"""Fetches the bytes behind image references: from servers, from S3 and from files, within limits.

A server is asked in a visit that connects to public addresses only, checks every hop of its redirects, waits for its
turn, says who asks, and stops at a deadline and a byte budget. Reasons for a refusal are those of pipeline.ledger.
"""

from __future__ import annotations

import http.client
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from threading import Condition
from urllib.parse import urljoin, urlsplit

from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from pipeline.data.fetch.opener import Evidence, Guard, Refused, ask, failures_as_reasons, normal_url
from pipeline.data.fetch.references import shown
from pipeline.data.fetch.rules import NOTHING_DENIED, ROBOTS_BYTES, DenyLists, Robots, opting_out, unpacked, user_agent
from pipeline.data.fetch.s3 import S3Reader
from pipeline.errors import UserError
from pipeline.ledger import DEFERRED
from pipeline.local import NOTHING, PathPolicy, local_path, read_local, reason_of
from pipeline.settings import PairsSettings
from pipeline.store.parallel import ordered_map

_BACKOFF_S = 0.5
MAX_REDIRECTS = 5
LONGEST_HOLD_S = 86_400  # a server that says more is asked again after a day
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_OTHER_MEDIA = (
    "text/html",
    "application/xhtml+xml",
    "application/json",
    "application/pdf",
    "video/",
    "audio/",
    "font/",
)


@dataclass(frozen=True)
class Fetched:
    """Holds the bytes behind a reference, or the reason why it has none; of an opt-out the evidence, too."""

    data: bytes | None
    reason: str | None
    evidence: Evidence | None = None


@dataclass(frozen=True)
class _Limit:
    """Holds what a visit has, too: a time.monotonic() to be done by, and whether another try is useless."""

    deadline: float
    barred: bool = False


class Fetcher:
    """Fetches http(s) URLs, objects on S3 (s3://bucket/key) and local files (file:// or an absolute path).

    Each may have at most ``max_bytes``. Of this machine and of S3 only what is within ``reach`` is read.

    The time limit is for a whole image, with redirects, retries and pauses; name resolution has the system's own, and
    waiting for other requests to the host or for its robots.txt does not count. Another try comes after a timeout, a
    failed connection, a 429 or a 5xx status. Every site's robots.txt and X-Robots-Tag headers are obeyed. Proxies of
    the environment are not used. S3 is reached as the AWS settings of this machine say, wherever it is.

    Raises:
        UserError: for settings that cannot be read, and while fetching for credentials that S3 refuses.
    """

    def __init__(
        self,
        settings: PairsSettings,
        max_bytes: int,
        deny: DenyLists = NOTHING_DENIED,
        reach: PathPolicy = NOTHING,
        allow: Sequence[str] = (),
    ):
        self._settings, self._max_bytes, self._deny, self._reach = settings, max_bytes, deny, reach
        private = private_headers(settings.headers, os.environ)
        guard, hosts = Guard(settings.hosts, allow), Hosts(settings.per_host)
        self._access = Access(guard, hosts, user_agent(settings.contact), private)
        self._robots = Robots(self._read_robots)
        self._s3 = S3Reader(settings.threads, settings.timeout_s, max_bytes)

    def fetch(self, references: Sequence[str]) -> Iterator[Fetched]:
        """Yields one result a reference, in order; at most twice as many bodies as threads are in memory.

        No reference is asked for while bodies that wait to be taken are together larger than MOST_BYTES.
        """
        return ordered_map(self._fetch, references, self._settings.threads, lambda fetched: len(fetched.data or b""))

    def _fetch(self, reference: str) -> Fetched:
        try:
            reference = reference.strip()
            parts = urlsplit(reference)
            if parts.scheme in ("http", "https") and parts.hostname:
                return self._download(normal_url(reference))
            # Judged as the list was read, too; but the store that it came through may be another's.
            if reason := self._reach.refusal(reference):
                return Fetched(None, reason)
            if parts.scheme == "s3":
                return self._read_s3(reference)
            if path := local_path(reference):
                return _checked(read_local(path, self._max_bytes, self._reach))
        except OSError as e:
            return Fetched(None, reason_of(e))
        except Refused as refusal:
            return Fetched(None, str(refusal))
        except ValueError:  # not a URL at all, or a NUL in a path
            pass
        return Fetched(None, "unsupported_reference")

    def _download(self, url: str) -> Fetched:
        with closing(Visit(self._access, self._settings.timeout_s, self._max_bytes, self._check)) as visit:
            fetched = self._tries(visit, lambda: _once(visit, url))
            return replace(fetched if fetched.data is None else _checked(fetched.data), evidence=visit.evidence)

    def _read_s3(self, reference: str) -> Fetched:
        limit = _Limit(time.monotonic() + self._settings.timeout_s)

        def once() -> Fetched:
            try:
                return _checked(self._s3.read(reference, limit.deadline))
            except Refused as refusal:
                return Fetched(None, str(refusal))

        return self._tries(limit, once)

    def _check(self, url: str) -> None:
        """Raises Refused for a URL that must not be asked for."""
        self._check_denied(url)
        origin = origin_of(url)
        if (seen := self._robots.forbidden_since(origin, url)) is not None:
            raise Refused("opted_out", Evidence(f"{origin}/robots.txt disallows {shown(url)}", seen))

    def _check_denied(self, url: str) -> None:
        if entry := self._deny.url(url):
            raise Refused("denied", Evidence(entry, time.time()))

    def _read_robots(self, url: str) -> bytes | str:
        with closing(
            Visit(self._access, self._settings.timeout_s, ROBOTS_BYTES, self._check_denied, image=False)
        ) as visit:
            fetched = self._tries(visit, lambda: _once(visit, url, ROBOTS_BYTES))
            if fetched.reason == "truncated":  # of which the rules may have been in the rest
                return "unreachable"
            return fetched.reason or unpacked(fetched.data or b"")

    def _tries(self, limit: Visit | _Limit, once: Callable[[], Fetched]) -> Fetched:
        """Calls ``once`` until it succeeds, fails for good, or tries or time are used up."""
        for attempt in range(self._settings.retries + 1):
            fetched = once()
            pause = backoff(attempt)
            again = fetched.reason in DEFERRED or fetched.reason == "truncated"  # here: the transfer broke off
            if (
                limit.barred
                or not again
                or attempt == self._settings.retries
                or time.monotonic() + pause > limit.deadline
            ):
                break
            time.sleep(pause)
        return fetched


def backoff(attempt: int, draw: Callable[[], float] = random.random) -> float:
    """Returns the seconds until another try after ``attempt`` (from 0) failed, half of 0.5 * 2**attempt to all of it.

    ``draw`` gives numbers in [0, 1). Drawn, so that clients that failed together do not come back together.
    """
    return _BACKOFF_S * 2**attempt * (0.5 + 0.5 * draw())


def _once(visit: Visit, url: str, most: int | None = None) -> Fetched:
    """Asks once for a body, or for its first ``most`` bytes."""
    try:
        with visit.open(url) as response, failures_as_reasons():
            return Fetched(response.read(most), None)
    except Refused as refusal:
        return Fetched(None, str(refusal))


def _checked(data: bytes) -> Fetched:
    return Fetched(data, None) if data else Fetched(None, "zero_bytes")


# --- visits -----------------------------------------------------------------------------------------------------------


class Hosts:
    """Knows who is asked now, and until when a host wants to be left alone. Shared by the threads of a worker.

    ``per_host``: requests at once to one host. Memory: the hosts that are asked now and those that said Retry-After.
    """

    def __init__(self, per_host: int):
        self._per_host = per_host
        self._changed = Condition()
        self._inside: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}  # time.monotonic()
        self._prune_at = 1000

    @contextmanager
    def turn(self, host: str) -> Iterator[None]:
        """Waits for a place among the requests to ``host`` and holds it. Never wait for one while holding another."""
        with self._changed:
            self._changed.wait_for(lambda: self._inside[host] < self._per_host)
            self._inside[host] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[host] -= 1
                if not self._inside[host]:
                    del self._inside[host]
                self._changed.notify_all()

    def hold(self, host: str, seconds: float) -> None:
        """Leaves ``host`` alone for some seconds."""
        now = time.monotonic()
        with self._changed:
            if len(self._not_before) >= self._prune_at:
                self._not_before = {name: until for name, until in self._not_before.items() if until > now}
                self._prune_at = 2 * len(self._not_before) + 1000
            self._not_before[host] = max(now + seconds, self._not_before.get(host, 0.0))

    def held(self, host: str) -> float:
        """Returns for how many seconds ``host`` has still to be left alone."""
        with self._changed:
            return max(self._not_before.get(host, 0.0) - time.monotonic(), 0.0)


def retry_after(value: str | None) -> float:
    """Returns the seconds that a Retry-After header asks to wait, at most a day; 0 if it cannot be read."""
    try:
        return float(Retry(retry_after_max=LONGEST_HOLD_S).parse_retry_after(value or ""))
    except (InvalidHeader, ValueError, TypeError, IndexError, OverflowError):
        return 0.0


@dataclass(frozen=True)
class Access:
    """Holds what all visits of a worker share.

    ``headers`` are by origin (scheme://host[:port]), sent to it alone.
    """

    guard: Guard
    hosts: Hosts
    agent: str
    headers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class Visit:
    """Asks for one reference, for as long and as often as its limits let it; to be closed.

    ``evidence`` says why a URL was refused. ``barred``: the last URL was refused before it was asked for, so another
    try is useless.

    Args:
        access: Guard, hosts, user agent and headers that all visits share.
        timeout_s: Seconds for all hops and tries together; waiting for a turn, and what ``check`` takes, does not
            count.
        max_bytes: Largest size of a body, bytes.
        check: Called with every URL before it is asked for; may raise Refused.
        image: False for robots.txt, which may be of any type and has no X-Robots-Tag.
    """

    def __init__(
        self, access: Access, timeout_s: float, max_bytes: int, check: Callable[[str], None], image: bool = True
    ):
        self.deadline = time.monotonic() + timeout_s
        self.evidence: Evidence | None = None
        self.barred = False
        self._access, self._max_bytes, self._check, self._image = access, max_bytes, check, image
        self._turn = ExitStack()

    def open(self, url: str) -> http.client.HTTPResponse:
        """Returns the answer to a normal URL, behind at most five redirects, its body not yet read. Raises Refused."""
        try:
            return self._follow(url)
        except Refused as refusal:
            self.evidence = refusal.evidence
            raise

    def close(self) -> None:
        """Gives the turn back."""
        self._turn.close()

    def _follow(self, url: str) -> http.client.HTTPResponse:
        for _ in range(MAX_REDIRECTS + 1):
            with failures_as_reasons():
                response = self._ask(url)
                try:
                    target = self._judge(response, url)
                except Refused:
                    response.close()
                    raise
            if target is None:
                return response
            response.close()
            url = target
        raise Refused("unreachable")

    def _ask(self, url: str) -> http.client.HTTPResponse:
        host, origin = host_of(url), origin_of(url)
        self._turn.close()
        self.barred = True
        began = time.monotonic()
        self._check(url)
        self._turn.enter_context(self._access.hosts.turn(host))
        self.deadline += time.monotonic() - began
        pause = self._access.hosts.held(host)
        if time.monotonic() + pause > self.deadline:
            raise Refused("rate_limited" if pause else "timeout")
        if pause:
            time.sleep(pause)
        self.barred = False
        headers = {"User-Agent": self._access.agent, **self._access.headers.get(origin, {})}
        return ask(self._access.guard, url, headers, self.deadline, self._max_bytes)

    def _judge(self, response: http.client.HTTPResponse, url: str) -> str | None:
        """Returns where the answer leads to, or None for a body. Raises Refused."""
        status, headers = response.status, response.headers
        if status in (429, 503) and (seconds := retry_after(headers["Retry-After"])):
            self._access.hosts.hold(host_of(url), seconds)
        if self._image and status < 400 and (tag := opting_out(headers.get_all("X-Robots-Tag", []))):
            raise Refused("opted_out", Evidence(f"X-Robots-Tag: {tag[:500]} at {shown(url)}", time.time()))
        if status in _REDIRECTS and (location := headers["Location"]):
            return _target(url, location)
        if status == 429:
            raise Refused("rate_limited")
        if not 200 <= status < 300:
            raise Refused({4: "http_4xx", 5: "http_5xx"}.get(status // 100, "unreachable"))
        if self._image and (headers["Content-Type"] or "").strip().lower().startswith(_OTHER_MEDIA):
            raise Refused("not_an_image")
        return None


def private_headers(names: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Returns headers by origin, from origins and the environment variables that hold lines of "Name: value".

    Raises UserError for an origin or a variable that cannot be read; it shows no value.
    """
    headers: dict[str, dict[str, str]] = {}
    for place, variable in names.items():
        try:
            origin = origin_of(normal_url(place))
        except Refused:
            raise UserError(f"headers: {place!r} is not of the form https://host") from None
        if variable not in environment:
            raise UserError(
                f"headers: {variable}, for {place}, is not set in the environment of every worker; export it"
            )
        lines = [line.strip() for line in environment[variable].splitlines() if line.strip()]
        if not lines or not all(re.fullmatch(r"[A-Za-z0-9-]+: *[!-~][ -~]*", line) for line in lines):
            raise UserError(f"headers: {variable}, for {place}, is not lines of the form Name: value, in ASCII")
        headers[origin] = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return headers


def host_of(url: str) -> str:
    """Returns the host of a normal URL."""
    return urlsplit(url).hostname or ""


def origin_of(url: str) -> str:
    """Returns scheme://host[:port] of a normal URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _target(url: str, location: str) -> str:
    # http.client reads headers as Latin-1; most servers that send more than ASCII mean UTF-8.
    target = urljoin(url, location.encode("latin-1", "replace").decode("utf-8", "replace").strip())
    if not target.lower().startswith(("http:", "https:")):
        raise Refused("forbidden_address")
    return normal_url(target)
