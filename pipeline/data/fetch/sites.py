"""Knows what sites want, by their robots.txt, and which of them do not answer."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

from protego import Protego

from pipeline.data.fetch.board import Note
from pipeline.data.fetch.opener import Refused
from pipeline.data.fetch.rules import MAX_RULES, allows, parse_robots

MOST_TOLD = 32 << 10  # bytes of a robots.txt that other workers are told of
SILENT = 10  # requests in a row without an answer in time, after which a site is left alone
Exchange = Callable[[Mapping[str, Note], Sequence[str]], Mapping[str, Note]]
"""Tells other workers of notes, by origin, and returns theirs on some origins."""


@dataclass
class _Site:
    lock: Lock = field(default_factory=Lock)
    until: float = 0.0  # time.monotonic()
    seen: float = 0.0  # seconds since the epoch
    answer: Protego | str = ""  # rules, the reason why they cannot be had, or "" where everything is allowed
    size: int = 0  # bytes of its rules in memory, at most
    failures: int = 0  # in a row, of its robots.txt
    silent: int = 0  # requests in a row that it did not answer in time


class Sites:
    """Keeps the robots.txt of every site for a day, for the threads of a worker.

    A 4xx status allows everything. Any other failure is every image's reason for five minutes, and twice as long each
    time it fails again, for a site whose wishes are unknown is left alone (RFC 9309, 2.3.1). That includes 429, the one
    4xx that is not an answer. So is a site left alone that has not answered SILENT requests in a row, or not in time.

    Args:
        fetch: Function that turns the URL of a robots.txt into its bytes, or into the reason why it has none.
        exchange: Function that shares notes with other workers.
    """

    DAY_S, FAILURE_S = 86_400.0, 300.0
    MAX_SITES, MAX_BYTES = 10_000, 128 << 20  # of rules in memory

    def __init__(self, fetch: Callable[[str], bytes | str], exchange: Exchange = lambda news, origins: {}):
        self._fetch, self._exchange = fetch, exchange
        self._lock = Lock()
        self._sites: OrderedDict[str, _Site] = OrderedDict()
        self._size = 0
        self._told: dict[str, Note] = {}  # by other workers, on sites that will be asked
        self._news: dict[str, Note] = {}  # for them

    def expect(self, origins: Iterable[str]) -> None:
        """Learns what other workers know of sites that will be asked, and tells them what they may not know."""
        with self._lock:
            news, self._news = self._news, {}
            now, nothing = time.monotonic(), _Site()
            new = [origin for origin in origins if self._sites.get(origin, nothing).until <= now]
        told = self._exchange(news, new)
        with self._lock:
            if len(self._told) > self.MAX_SITES:  # of sites that nobody asked then
                self._told.clear()
            self._told.update(told)

    def heard(self, origin: str, reason: str | None) -> None:
        """Counts that a site has answered a request, or the reason why it has not."""
        with self._lock:
            site = self._sites.get(origin)
        if site is None:
            return
        with site.lock:
            site.silent = site.silent + 1 if reason else 0
            if reason and site.silent >= SILENT:
                site.silent = 0
                self._keep(site, origin, self._note(site, origin, reason, time.time()))

    def forbidden_since(self, origin: str, url: str) -> float | None:
        """Returns when a rule was read that forbids a URL of this origin, in seconds since the epoch, or None.

        Raises Refused with the reason why robots.txt cannot be had.
        """
        with self._lock:
            site = self._sites.setdefault(origin, _Site())
            self._sites.move_to_end(origin)
        with site.lock:
            if site.until <= time.monotonic():
                self._read(site, origin)
            answer, seen = site.answer, site.seen
        self._forget()
        if isinstance(answer, str):
            if answer:
                raise Refused(answer)
            return None
        return None if allows(answer, url) else seen

    def check_left_alone(self, origin: str) -> None:
        """Raises Refused with the reason where a site is left alone just now. Waits for nothing and nobody."""
        with self._lock:
            site = self._sites.get(origin)
        if site and isinstance(site.answer, str) and site.answer and site.until > time.monotonic():
            raise Refused(site.answer)

    def _read(self, site: _Site, origin: str) -> None:
        with self._lock:
            told = self._told.pop(origin, None)
        if told is not None and told.until > time.time():
            self._keep(site, origin, told)
            return
        seen = time.time()
        self._keep(site, origin, self._note(site, origin, self._fetch(f"{origin}/robots.txt"), seen))

    def _note(self, site: _Site, origin: str, found: bytes | str, seen: float) -> Note:
        """Returns what was found at a site, with the time for which it holds, and keeps it for other workers."""
        failed = isinstance(found, str) and found != "http_4xx"
        site.failures = site.failures + 1 if failed else 0
        hold_s = min(self.DAY_S, self.FAILURE_S * 2 ** (site.failures - 1)) if failed else self.DAY_S
        note = Note(found, failed, seen, time.time() + hold_s)
        if len(found) <= MOST_TOLD:
            with self._lock:
                self._news[origin] = note
        return note

    def _keep(self, site: _Site, origin: str, note: Note) -> None:
        found, site.seen = note.found, note.seen
        site.until = time.monotonic() + note.until - time.time()
        site.answer = parse_robots(found) if isinstance(found, bytes) else found if note.failed else ""
        # What protego takes for them at most, measured: a rule is three objects and its text.
        size = 24 * len(found) + 1000 * min(len(found.splitlines()), MAX_RULES) if isinstance(found, bytes) else 0
        with self._lock:
            if self._sites.get(origin) is site:  # else it was forgotten meanwhile
                self._size += size - site.size
            site.size = size

    def _forget(self) -> None:
        """Drops the sites whose last use is longest ago."""
        with self._lock:
            while len(self._sites) > self.MAX_SITES or self._size > self.MAX_BYTES:
                self._size -= self._sites.popitem(last=False)[1].size
