"""Fetches the bytes behind image references: from servers, from S3 and from files, within limits.

A server is asked in a visit that connects to public addresses only, checks every hop of its redirects, waits for its
turn, says who asks, and stops at a deadline and a byte budget. Reasons for a refusal are those of pipeline.ledger.
"""

from __future__ import annotations

import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from threading import BoundedSemaphore, Lock
from urllib.parse import urlsplit

from pipeline.data.fetch.opener import Evidence, Guard, Refused, failures_as_reasons, normal_url
from pipeline.data.fetch.references import shown
from pipeline.data.fetch.rules import NOTHING_DENIED, ROBOTS_BYTES, DenyLists, unpacked, user_agent
from pipeline.data.fetch.s3 import S3Reader
from pipeline.data.fetch.sites import Exchange, Sites
from pipeline.data.fetch.visit import Access, Hosts, Room, Visit, origin_of, private_headers
from pipeline.ledger import DEFERRED
from pipeline.local import NOTHING, PathPolicy, local_path, read_local, reason_of
from pipeline.settings import PairsSettings
from pipeline.store.parallel import as_they_end

_BACKOFF_S = 0.5
MOST_BYTES = 512 << 20  # of bodies that wait to be taken or are large; above half of it no reference is asked for
AT_ONCE = 16  # files and objects on S3, which are read whole and answer soon


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

    Args:
        settings: Settings of the fetch.
        max_bytes: Largest size of an image, bytes.
        deny: Lists of what is never asked for.
        reach: Paths and buckets that may be read.
        allow: Hosts and networks that may be reached although they are not public.
        exchange: Function that shares what is found out about sites with other workers; None where there are none.

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
        exchange: Exchange | None = None,
    ):
        self._settings, self._max_bytes, self._deny, self._reach = settings, max_bytes, deny, reach
        private = private_headers(settings.headers, os.environ)
        self._room = Room(MOST_BYTES)
        guard, hosts = Guard(settings.hosts, allow), Hosts(settings.per_host)
        self._access = Access(guard, hosts, user_agent(settings.contact), self._room, private)
        self._exchange = exchange
        self._sites = Sites(self._read_robots, exchange or (lambda news, origins: {}))
        self._s3 = S3Reader(AT_ONCE, settings.timeout_s, max_bytes)
        self._near = BoundedSemaphore(AT_ONCE)
        self._pool = ThreadPoolExecutor(settings.threads)  # a thread that waits costs some 50 kB
        self._asking = Lock()

    def fetch(self, references: Sequence[str]) -> Iterator[tuple[int, Fetched]]:
        """Yields the place of each reference among them with what it gave, in the order in which servers answer.

        Several threads may call this: a second one's references are asked for when all of the first one's have been,
        and while their last answers are still to come. In memory are SMALL_BYTES for each of twice as many bodies as
        threads, and MOST_BYTES.
        """

        def places() -> Generator[int, None, None]:
            with self._asking:
                yield from spread_hosts(references)

        def fetch(place: int) -> tuple[int, Fetched]:
            return place, self._fetch(references[place])

        if self._exchange is not None:  # beside the first requests, which may ask for what others know
            self._pool.submit(self._expect, references)
        ahead = 2 * self._settings.threads
        with closing(places()) as asked:
            for place, fetched in as_they_end(
                lambda place: self._pool.submit(fetch, place), asked, ahead, self._room.is_half_free
            ):
                self._room.take(-len(fetched.data or b""))
                yield place, fetched

    def _expect(self, references: Sequence[str]) -> None:
        origins = set()
        for reference in references:
            with suppress(Refused):
                origins.add(origin_of(normal_url(reference.strip())))
        self._sites.expect(origins)

    def _fetch(self, reference: str) -> Fetched:
        try:
            reference = reference.strip()
            parts = urlsplit(reference)
            if parts.scheme in ("http", "https") and parts.hostname:
                return self._download(normal_url(reference))
            # Judged as the list was read, too; but the store that it came through may be another's.
            if reason := self._reach.refusal(reference):
                return Fetched(None, reason)
            with self._near:
                if parts.scheme == "s3":
                    return self._read_s3(reference)
                if path := local_path(reference):
                    return self._checked(Fetched(read_local(path, self._max_bytes, self._reach), None))
        except OSError as e:
            return Fetched(None, reason_of(e))
        except Refused as refusal:
            return Fetched(None, str(refusal))
        except ValueError:  # not a URL at all, or a NUL in a path
            pass
        return Fetched(None, "unsupported_reference")

    def _download(self, url: str) -> Fetched:
        limits = (self._settings.timeout_s, self._max_bytes)
        with closing(Visit(self._access, *limits, self._check, self._recheck)) as visit:
            fetched = self._tries(visit, lambda: _body(visit, url))
            if not visit.barred:
                # A body that does not end in time holds a turn as long as no answer does.
                unheard = fetched.reason == "timeout" or (not visit.status and fetched.reason in DEFERRED)
                self._sites.heard(origin_of(visit.url), fetched.reason if unheard else None)
            return self._checked(fetched)

    def _read_s3(self, reference: str) -> Fetched:
        limit = _Limit(time.monotonic() + self._settings.timeout_s)
        return self._checked(self._tries(limit, lambda: self._s3.read(reference, limit.deadline)))

    def _checked(self, fetched: Fetched) -> Fetched:
        if fetched.data is None:
            return fetched
        self._room.take(len(fetched.data), wait=False)  # until it is taken from here
        return fetched if fetched.data else Fetched(None, "zero_bytes")

    def _check(self, url: str) -> None:
        """Raises Refused for a URL that must not be asked for."""
        self._check_denied(url)
        origin = origin_of(url)
        if (seen := self._sites.forbidden_since(origin, url)) is not None:
            raise Refused("opted_out", Evidence(f"{origin}/robots.txt disallows {shown(url)}", seen))

    def _recheck(self, url: str) -> None:
        """Raises Refused for a URL of a site that has fallen silent while others waited for their turn."""
        self._sites.check_left_alone(origin_of(url))

    def _check_denied(self, url: str) -> None:
        if entry := self._deny.url(url):
            raise Refused("denied", Evidence(entry, time.time()))

    def _read_robots(self, url: str) -> bytes | str:
        with closing(
            Visit(self._access, self._settings.timeout_s, ROBOTS_BYTES, self._check_denied, image=False)
        ) as visit:
            fetched = self._tries(visit, lambda: _body(visit, url, robots=True))
            if fetched.reason == "truncated":  # of which the rules may have been in the rest
                return "unreachable"
            return fetched.reason or unpacked(fetched.data or b"")

    def _tries(self, limit: Visit | _Limit, once: Callable[[], bytes]) -> Fetched:
        """Calls ``once`` until it succeeds, fails for good, or tries or time are used up."""
        for attempt in range(self._settings.retries + 1):
            try:
                return Fetched(once(), None)
            except Refused as refusal:
                fetched = Fetched(None, str(refusal), refusal.evidence)
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


def _body(visit: Visit, url: str, robots: bool = False) -> bytes:
    """Asks once for a body; of a robots.txt for what counts. Raises Refused."""
    with visit.open(url) as response, failures_as_reasons():
        return response.read(ROBOTS_BYTES) if robots else response.read_all(visit.reserve)


def spread_hosts(references: Sequence[str]) -> list[int]:
    """Returns the places of references in an order in which those of one host are as far from each other as can be.

    A host is asked for few at a time; where many follow each other, threads would wait for it and no other were asked.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, reference in enumerate(references):
        places[reference.partition("://")[2].partition("/")[0].lower()].append(place)
    ranked = (((i + 0.5) / len(own), place) for own in places.values() for i, place in enumerate(own))
    return [place for _, place in sorted(ranked)]
