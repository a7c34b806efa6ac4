"""Fetches the bytes behind image references: from servers, from S3 and from files, within limits.

Servers are asked through visits (pipeline.data.fetch.visit) that connect to public addresses only, are polite, and stop
at a deadline and a byte budget. Reasons for a refusal are those of pipeline.ledger.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from pipeline.data.fetch.deny import NOTHING_DENIED, DenyLists
from pipeline.data.fetch.opener import Evidence, Guard, Refused, failures_as_reasons, normal_url
from pipeline.data.fetch.references import shown
from pipeline.data.fetch.robots import ROBOTS_BYTES, Robots
from pipeline.data.fetch.s3 import S3Reader
from pipeline.data.fetch.visit import Access, Hosts, Visit, origin_of, private_headers, user_agent
from pipeline.ledger import DEFERRED
from pipeline.local import NOTHING, Reach, local_path, read_local, reason_of
from pipeline.settings import PairsSettings
from pipeline.store.parallel import ordered_map

_BACKOFF_S = 0.5


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
        self, settings: PairsSettings, max_bytes: int, deny: DenyLists = NOTHING_DENIED, reach: Reach = NOTHING
    ):
        self._settings, self._max_bytes, self._deny, self._reach = settings, max_bytes, deny, reach
        private = private_headers(settings.headers, os.environ)
        guard, hosts = Guard(settings.hosts, settings.allow), Hosts(settings.per_host)
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
            return fetched.reason or fetched.data or b""

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
