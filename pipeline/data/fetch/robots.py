"""Reads what sites ask of robots: robots.txt (RFC 9309), by protego, and X-Robots-Tag.

Rules for ``img2dataset`` are obeyed as well as rules for ``unclip-ray``, for both names are in the user agent.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Lock

from protego import Protego

from pipeline.data.fetch.opener import Refused

AGENTS = frozenset({"unclip-ray", "img2dataset"})
ROBOTS_BYTES = 500 << 10  # of a robots.txt are read (RFC 9309, 2.5)
MAX_LINES = 20_000  # of a robots.txt are read; a URL is compared with every rule

_OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})  # none is noindex, nofollow
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_AGENT_LINE = re.compile(r"user(?:-|\s*)agent(?:\s*:|\s)\s*([^\s/]*).*", re.IGNORECASE)


def parse_robots(body: bytes) -> Protego:
    """Returns the rules of a robots.txt; any bytes can be read.

    Groups that name us, by either name, are one group; only without such a group that for ``*`` counts.
    """
    text = body[:ROBOTS_BYTES].removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    return Protego.parse("\n".join(map(_for_us, text.splitlines()[:MAX_LINES])))


def allows(rules: Protego, url: str) -> bool:
    """Returns whether rules let us ask for a URL."""
    return rules.can_fetch(url, "unclip-ray")


def _for_us(line: str) -> str:
    # Protego keeps a copy of the rules for each name, so a robots.txt of many names would take all memory. And it
    # takes a name for ours that only begins like ours.
    text = line.partition("#")[0].strip()
    if not (found := _AGENT_LINE.fullmatch(text)):
        return text
    name = found[1].lower()
    return f"User-agent: {'unclip-ray' if name in AGENTS else name if name == '*' else 'another'}"


def opting_out(tags: Iterable[str]) -> str | None:
    """Returns the first X-Robots-Tag value that keeps us out, or None.

    A value is a list of directives; ``name: directive`` begins those for one robot alone.
    """
    for tag in tags:
        robot: str | None = None
        for part in tag.lower().split(","):
            name, colon, directive = (word.strip() for word in part.partition(":"))
            if colon and name not in _VALUED and re.fullmatch(r"\*|[a-z][\w.-]*", name):
                robot = name
            else:
                directive = part.strip()
            if directive in _OPT_OUTS and (robot in (None, "*") or robot in AGENTS):
                return tag
    return None


# --- the cache --------------------------------------------------------------------------------------------------------


@dataclass
class _Site:
    lock: Lock = field(default_factory=Lock)
    until: float = 0.0  # time.monotonic()
    seen: float = 0.0  # seconds since the epoch
    answer: Protego | str = ""  # rules, the reason why they cannot be had, or "" where everything is allowed
    size: int = 0  # bytes of its rules in memory, at most


class Robots:
    """Keeps the robots.txt of every site for a day, for the threads of a worker.

    ``fetch`` turns the URL of a robots.txt into its bytes, or into the reason why it has none. A 4xx status allows
    everything; any other failure is every image's reason for five minutes, for a site whose wishes are unknown is left
    alone (RFC 9309, 2.3.1). That includes 429, the one 4xx that is not an answer.
    """

    DAY_S, FAILURE_S = 86_400.0, 300.0
    MAX_SITES, MAX_BYTES = 10_000, 128 << 20  # of rules in memory

    def __init__(self, fetch: Callable[[str], bytes | str]):
        self._fetch = fetch
        self._lock = Lock()
        self._sites: OrderedDict[str, _Site] = OrderedDict()
        self._size = 0

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

    def _read(self, site: _Site, origin: str) -> None:
        site.seen = time.time()
        found = self._fetch(f"{origin}/robots.txt")
        failed = isinstance(found, str) and found != "http_4xx"
        site.answer = parse_robots(found) if isinstance(found, bytes) else found if failed else ""
        # What protego takes for them at most, measured: a rule is three objects and its text.
        size = 24 * len(found) + 1000 * min(found.count(b"\n"), MAX_LINES) if isinstance(found, bytes) else 0
        site.until = time.monotonic() + (self.FAILURE_S if failed else self.DAY_S)
        with self._lock:
            if self._sites.get(origin) is site:  # else it was forgotten meanwhile
                self._size += size - site.size
            site.size = size

    def _forget(self) -> None:
        """Drops the sites whose last use is longest ago."""
        with self._lock:
            while len(self._sites) > self.MAX_SITES or self._size > self.MAX_BYTES:
                self._size -= self._sites.popitem(last=False)[1].size
