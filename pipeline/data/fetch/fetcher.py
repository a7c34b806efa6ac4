"""From an image reference to bytes: img2dataset's download, S3, or a file, within limits.

img2dataset fetches with urllib. Here it does so through visits (pipeline.data.fetch.visit) that connect to public
addresses only, are polite, and stop at a deadline and a byte budget. Its tar writer is not used: its shards are not
reproducible. Reasons for a refusal are those of pipeline.ledger.

img2dataset is imported on first use: it takes 3 s, and a plan needs none of it.
"""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from pipeline.data.fetch.deny import NOTHING_DENIED, DenyLists
from pipeline.data.fetch.opener import (
    Evidence,
    Guard,
    Refused,
    ThreadOpener,
    failures_as_reasons,
    normal_url,
    opening_with,
)
from pipeline.data.fetch.politeness import Hosts, backoff
from pipeline.data.fetch.robots import ROBOTS_BYTES, Robots
from pipeline.data.fetch.s3 import S3Reader
from pipeline.data.fetch.visit import Access, Visit, origin_of, private_headers, user_agent
from pipeline.ledger import DEFERRED, REASONS
from pipeline.local import NOTHING, Reach, local_path, read_local, reason_of
from pipeline.settings import PairsSettings
from pipeline.store.parallel import ordered_map


@dataclass(frozen=True)
class Fetched:
    """The bytes behind a reference, or the reason why there are none; of an opt-out the evidence, too."""

    data: bytes | None
    reason: str | None
    evidence: Evidence | None = None


@dataclass(frozen=True)
class _Limit:
    """What a visit has, too: a time.monotonic() to be done by, and whether another try is no use."""

    deadline: float
    barred: bool = False


class Fetcher:
    """Fetches http(s) URLs, objects on S3 (s3://bucket/key) and local files (file:// or an absolute path), each of at
    most ``max_bytes``. Of this machine and of S3 only what is within ``reach``.

    The time limit is for a whole picture, with redirects, retries and pauses; name resolution has the system's own, and
    waiting for other requests to the host or for its robots.txt does not count. Another try comes after a timeout, a
    failed connection, a 429 or a 5xx status. Every site's robots.txt and X-Robots-Tag headers are obeyed. Proxies of
    the environment are not used. S3 is reached as the AWS settings of this machine say, wherever it is. Raises
    UserError for settings that cannot be read, and while fetching for credentials that S3 refuses.
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
        _downloader()  # before the first deadline is set

    def fetch(self, references: Sequence[str]) -> Iterator[Fetched]:
        """Yield one result a reference, in order; at most twice as many bodies as threads are in memory.

        Nothing more is asked for while bodies that wait to be taken are together larger than MOST_BYTES.
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
            fetched = self._tries(visit, lambda: _download_once(url, visit, self._settings.timeout_s))
            return replace(fetched, evidence=visit.evidence)

    def _read_s3(self, reference: str) -> Fetched:
        limit = _Limit(time.monotonic() + self._settings.timeout_s)

        def once() -> Fetched:
            try:
                return _checked(self._s3.read(reference, limit.deadline))
            except Refused as refusal:
                return Fetched(None, str(refusal))

        return self._tries(limit, once)

    def _check(self, url: str) -> None:
        """Raise Refused for a URL that must not be asked for."""
        self._check_denied(url)
        if found := self._robots.forbidding(origin_of(url), url):
            raise Refused("opted_out", Evidence(*found))

    def _check_denied(self, url: str) -> None:
        if entry := self._deny.url(url):
            raise Refused("denied", Evidence(entry, time.time()))

    def _read_robots(self, url: str) -> bytes | str:
        with closing(
            Visit(self._access, self._settings.timeout_s, ROBOTS_BYTES, self._check_denied, picture=False)
        ) as visit:
            fetched = self._tries(visit, lambda: _robots_once(url, visit))
            return fetched.reason or fetched.data or b""

    def _tries(self, limit: Visit | _Limit, once: Callable[[], Fetched]) -> Fetched:
        """Call ``once`` until it succeeds, fails for good, or tries or time are used up."""
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


# --- img2dataset ------------------------------------------------------------------------------------------------------


@cache
def _downloader() -> Any:
    """img2dataset's downloader; its requests go through the calling thread's opener."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # albumentations asks a package index for news otherwise
    from img2dataset import downloader

    urllib.request.install_opener(ThreadOpener())  # type: ignore[arg-type]
    return downloader


def _download_once(url: str, visit: Visit, timeout_s: float) -> Fetched:
    with opening_with(visit):
        # It hands on no more than an error's text; that of our own is the reason. Its user agent and its reading of
        # X-Robots-Tag are not used: the visit has its own, which know every form of the header.
        _, stream, error = _downloader().download_image((0, url), timeout_s, None, None)
    if stream is not None:
        return _checked(stream.getvalue())
    return Fetched(None, error if error in REASONS else "unreachable")


def _robots_once(url: str, visit: Visit) -> Fetched:
    try:
        with failures_as_reasons(), visit.open(urllib.request.Request(url)) as response:
            return Fetched(response.read(ROBOTS_BYTES), None)
    except Refused as refusal:
        return Fetched(None, str(refusal))


def _checked(data: bytes) -> Fetched:
    return Fetched(data, None) if data else Fetched(None, "zero_bytes")
