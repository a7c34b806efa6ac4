"""What sites ask of robots: robots.txt (RFC 9309) and X-Robots-Tag, read and applied. Pure, but for the cache.

Rules for ``img2dataset`` are obeyed as well as those for ``unclip-ray``, for both names are in the user agent.
"""

from __future__ import annotations

import re
import string
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Lock
from urllib.parse import quote, unquote_to_bytes, urlsplit

from pipeline.data.fetch.opener import Refused

AGENTS = frozenset({"unclip-ray", "img2dataset"})
ROBOTS_BYTES = 500 << 10  # bytes of a robots.txt that are read (RFC 9309, 2.5)
MAX_RULES = 10_000  # for us, and as many for everybody, that are heeded; what comes later counts as cut off

_OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})  # none is noindex, nofollow
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_UNRESERVED = frozenset((string.ascii_letters + string.digits + "-._~").encode())


@dataclass(frozen=True, slots=True)
class Rule:
    """A line of robots.txt that concerns us. ``pattern`` is normalised, with ``*`` and a final ``$``."""

    allow: bool
    pattern: str
    line: int
    text: str

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return sum(map(sys.getsizeof, (self, self.pattern, self.line, self.text)))


def parse_robots(body: bytes) -> tuple[Rule, ...]:
    """The rules of all groups that name us, else of those for ``*`` (RFC 9309, 2.2). Never fails: what is no rule is
    passed over."""
    ours: list[Rule] = []
    others: list[Rule] = []
    agents: set[str] = set()
    named, in_rules = False, False
    text = body[:ROBOTS_BYTES].removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        key, colon, value = line.partition("#")[0].partition(":")
        key, value = key.strip().lower(), value.strip()
        if not colon:
            continue
        if key == "user-agent":
            if in_rules:
                agents, in_rules = set(), False
            agents.add(re.split(r"[\s/]", value, maxsplit=1)[0].lower())
            named = named or bool(agents & AGENTS)
        elif key in ("allow", "disallow") and agents:
            in_rules = True
            kind = ours if agents & AGENTS else others if "*" in agents else None
            if value and kind is not None and len(kind) < MAX_RULES:
                kind.append(Rule(key == "allow", _normal_pattern(value), number, line.strip()[:200]))
    return tuple(ours if named else others)


def decide(rules: Iterable[Rule], url: str) -> Rule | None:
    """The rule that forbids a URL, or None. The longest pattern wins; of two equally long ones, that which allows."""
    parts = urlsplit(url)
    if parts.path == "/robots.txt":
        return None
    path = normal_path(f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}")
    found = [rule for rule in rules if _matches(rule.pattern, path)]
    best = max(found, key=lambda rule: (len(rule.pattern), rule.allow), default=None)
    return None if best is None or best.allow else best


def _normal_pattern(value: str) -> str:
    end = "$" if value.endswith("$") else ""
    return normal_path(value.removesuffix("$"), "*") + end


def normal_path(text: str, special: str = "") -> str:
    """Returns the one spelling of a path or a query: escapes in upper case, none for unreserved characters, one for
    each character outside ASCII, and for those that are not listed here, unless ``special`` has them."""
    pieces = re.split(r"(%[0-9A-Fa-f]{2})", text)
    return "".join(
        _escape(piece) if i % 2 else quote(piece, "!&'()+,/:;=?@[]%" + special) for i, piece in enumerate(pieces)
    )


def _escape(escaped: str) -> str:
    octet = unquote_to_bytes(escaped)
    return octet.decode() if octet[0] in _UNRESERVED else escaped.upper()


def _matches(pattern: str, path: str) -> bool:
    """Whether a path begins with a pattern; ``*`` is any characters. In time linear in both for each ``*``."""
    anchored = pattern.endswith("$")
    first, *rest = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    if not rest:
        return not anchored or path == first
    at = len(first)
    for piece in rest[:-1] if anchored else rest:
        at = path.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return not anchored or (path.endswith(rest[-1]) and len(path) - len(rest[-1]) >= at)


def opting_out(tags: Iterable[str]) -> str | None:
    """The first X-Robots-Tag value that keeps us out, or None.

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
    answer: tuple[Rule, ...] | str = ()  # rules, or the reason why there are none
    size: int = 0  # bytes of its rules in memory


class Robots:
    """The robots.txt of every site, asked for once a day, shared by the threads of a worker.

    ``fetch``: a robots.txt's URL to its bytes, or to the reason why there are none. A 4xx status allows everything; any
    other failure is every picture's reason for five minutes, for a site whose wishes are unknown is not asked (RFC
    9309, 2.3.1). That includes 429, the one 4xx that is no answer.
    """

    DAY_S, FAILURE_S = 86_400.0, 300.0
    MAX_SITES, MAX_BYTES = 10_000, 32 << 20  # of rules, as they lie in memory

    def __init__(self, fetch: Callable[[str], bytes | str]):
        self._fetch = fetch
        self._lock = Lock()
        self._sites: OrderedDict[str, _Site] = OrderedDict()
        self._size = 0

    def forbidding(self, origin: str, url: str) -> tuple[str, float] | None:
        """The rule that forbids a URL of this origin, as text, and when it was read, in seconds since the epoch; or
        None. Raises Refused with the reason why robots.txt cannot be had."""
        with self._lock:
            site = self._sites.setdefault(origin, _Site())
            self._sites.move_to_end(origin)
        with site.lock:
            if site.until <= time.monotonic():
                self._read(site, origin)
            answer, seen = site.answer, site.seen
        self._forget()
        if isinstance(answer, str):
            raise Refused(answer)
        rule = decide(answer, url)
        return None if rule is None else (f"{origin}/robots.txt line {rule.line}: {rule.text}", seen)

    def _read(self, site: _Site, origin: str) -> None:
        site.seen = time.time()
        found = self._fetch(f"{origin}/robots.txt")
        failed = isinstance(found, str) and found != "http_4xx"
        site.answer = parse_robots(found) if isinstance(found, bytes) else found if failed else ()
        size = sum(rule.size for rule in site.answer) if isinstance(site.answer, tuple) else 0
        site.until = time.monotonic() + (self.FAILURE_S if failed else self.DAY_S)
        with self._lock:
            if self._sites.get(origin) is site:  # else it was forgotten meanwhile
                self._size += size - site.size
            site.size = size

    def _forget(self) -> None:
        """Drop the sites that were not asked for longest."""
        with self._lock:
            while len(self._sites) > self.MAX_SITES or self._size > self.MAX_BYTES:
                self._size -= self._sites.popitem(last=False)[1].size
