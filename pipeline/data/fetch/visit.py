"""Visits servers: each waits for its turn at the host, checks every hop of its redirects, and stays within its limits.

Reasons for a refusal are those of pipeline.ledger.
"""

from __future__ import annotations

import http.client
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Condition, Lock, Semaphore
from urllib.parse import urljoin, urlsplit
from weakref import WeakValueDictionary

from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from pipeline.data.fetch.opener import Evidence, Guard, Refused, Response, ask, failures_as_reasons, normal_url
from pipeline.data.fetch.references import shown
from pipeline.data.fetch.rules import opting_out
from pipeline.errors import UserError

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


class Room:
    """Counts the bytes of bodies that are large or wait to be taken. Any thread may call it."""

    def __init__(self, most: int):
        self._most, self._used, self._changed = most, 0, Condition()

    def take(self, size: int, wait: bool = True) -> None:
        """Takes ``size`` bytes, and waits until they are free or nothing is used; below 0 it gives some back."""
        with self._changed:
            if wait and size > 0:
                self._changed.wait_for(lambda: not self._used or self._used + size <= self._most)
            self._used += size
            if size < 0:
                self._changed.notify_all()

    def is_half_free(self) -> bool:
        """Returns whether half of the room is free."""
        return 2 * self._used <= self._most


class Hosts:
    """Knows who is asked now, and until when a host wants to be left alone. Shared by the threads of a worker.

    ``per_host``: requests at once to one host. Memory: the hosts that are asked now and those that said Retry-After.
    """

    def __init__(self, per_host: int):
        self._per_host = per_host
        self._lock = Lock()
        self._turns = WeakValueDictionary[str, Semaphore]()  # of hosts that somebody asks, or waits for
        self._not_before: dict[str, float] = {}  # time.monotonic()
        self._prune_at = 1000

    @contextmanager
    def turn(self, host: str) -> Iterator[None]:
        """Waits for a place among the requests to ``host`` and holds it. Never wait for one while holding another."""
        with self._lock:
            turns = self._turns.setdefault(host, Semaphore(self._per_host))
        with turns:
            yield

    def hold(self, host: str, seconds: float) -> None:
        """Leaves ``host`` alone for some seconds."""
        now = time.monotonic()
        with self._lock:
            if len(self._not_before) >= self._prune_at:
                self._not_before = {name: until for name, until in self._not_before.items() if until > now}
                self._prune_at = 2 * len(self._not_before) + 1000
            self._not_before[host] = max(now + seconds, self._not_before.get(host, 0.0))

    def held(self, host: str) -> float:
        """Returns for how many seconds ``host`` has still to be left alone."""
        with self._lock:
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
    room: Room
    headers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class Visit:
    """Asks for one reference, for as long and as often as its limits let it; to be closed.

    ``url`` is the last one, and ``status`` that of its answer, 0 for none. ``barred``: it was refused before it was
    asked for, so another try is useless.

    Args:
        access: Guard, hosts, user agent, room and headers that all visits share.
        timeout_s: Seconds for all hops and tries together; waiting for a turn, and what ``check`` takes, does not
            count.
        max_bytes: Largest size of a body, bytes.
        check: Called with every URL before its turn at the host, and may wait; raises Refused.
        recheck: Called with the same when the turn has come, for what has changed meanwhile; must not wait.
        image: False for robots.txt, which may be of any type and has no X-Robots-Tag.
    """

    def __init__(
        self,
        access: Access,
        timeout_s: float,
        max_bytes: int,
        check: Callable[[str], None],
        recheck: Callable[[str], None] = lambda url: None,
        image: bool = True,
    ):
        self.deadline = time.monotonic() + timeout_s
        self.barred = False
        self.url, self.status = "", 0
        self._access, self._max_bytes, self._image = access, max_bytes, image
        self._check, self._recheck = check, recheck
        self._held = ExitStack()

    def reserve(self, size: int) -> None:
        """Waits until there is room for so much of a body. It counts as the server's time no more than a turn does."""
        began = time.monotonic()
        self._access.room.take(size)
        self._held.callback(self._access.room.take, -size)
        self.deadline += time.monotonic() - began

    def close(self) -> None:
        """Gives the turn and the room back."""
        self._held.close()

    def open(self, url: str) -> Response:
        """Returns the answer to a normal URL, behind at most five redirects, its body not yet read. Raises Refused."""
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

    def _ask(self, url: str) -> Response:
        host = host_of(url)
        self._held.close()  # of the hop before: nobody waits for one turn while holding another
        self.barred, self.url, self.status = True, url, 0
        began = time.monotonic()
        self._check(url)
        self._held.enter_context(self._access.hosts.turn(host))
        self._recheck(url)
        self.deadline += time.monotonic() - began
        pause = self._access.hosts.held(host)
        if time.monotonic() + pause > self.deadline:
            raise Refused("rate_limited" if pause else "timeout")
        if pause:
            time.sleep(pause)
        self.barred = False
        headers = {"User-Agent": self._access.agent, **self._access.headers.get(origin_of(url), {})}
        response = ask(self._access.guard, url, headers, self.deadline, self._max_bytes)
        self.status = response.status
        return response

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
            raise UserError(f"headers: {variable}, for {place}, must hold ASCII lines of the form Name: value")
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
