"""Says what is not asked for: what deny lists name, and what sites forbid in robots.txt and X-Robots-Tag.

A deny list is a text file, one host, URL or hash a line; empty lines and those that begin with ``#`` are passed over.
Its content is part of the recipe. It travels as a blob, so that every worker reads what the configuration read.

robots.txt (RFC 9309) is read by protego. Rules for ``img2dataset`` are obeyed as well as rules for ``unclip-ray``, for
both names are in the user agent.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from protego import Protego

from pipeline.data.fetch.opener import Refused, normal_url
from pipeline.data.fetch.references import comparable, shown
from pipeline.errors import UserError
from pipeline.parse import ContentFile
from pipeline.store import Store
from pipeline.store.records import read_blob

AGENTS = frozenset({"unclip-ray", "img2dataset"})
ROBOTS_BYTES = 500 << 10  # of a robots.txt are read (RFC 9309, 2.5)
MAX_RULES = 2_000  # for us in a robots.txt; a URL is compared with every one, and each may hold many wildcards

_OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})  # none is noindex, nofollow
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_AGENT, _OTHERS = "User-agent: ", "another"  # as _for_us writes them
_AGENT_LINE = re.compile(r"user(?:-|\s*)agent(?:\s*:|\s)\s*([^\s/]*).*", re.IGNORECASE)


@dataclass(frozen=True)
class DenyLists:
    """Holds entries by kind, in one spelling.

    Attributes:
        hosts: Hosts, each with all its subdomains.
        urls: URLs as ``comparable`` returns them.
        sha256: SHA-256 of bytes as fetched, in lower-case hex.
    """

    hosts: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()
    sha256: frozenset[str] = frozenset()

    def url(self, url: str) -> str | None:
        """Returns the entry that denies a normal URL (see opener.normal_url), as text, or None."""
        if comparable(url) in self.urls:
            return f"deny_urls: {shown(url)}"
        labels = (urlsplit(url).hostname or "").split(".")
        names = (".".join(labels[i:]) for i in range(len(labels)))
        return next((f"deny_hosts: {name}" for name in names if name in self.hosts), None)

    def hash(self, sha256: str) -> str | None:
        """Returns the entry that denies bytes of this hash, as text, or None."""
        return f"deny_sha256: {sha256.lower()}" if sha256.lower() in self.sha256 else None


NOTHING_DENIED = DenyLists()


def read_deny_lists(
    store: Store, hosts: ContentFile | None, urls: ContentFile | None, sha256: ContentFile | None
) -> DenyLists:
    """Returns the deny lists of a recipe. Raises UserError for the first line that is not an entry of its kind."""
    return DenyLists(
        frozenset(_entries(store, hosts, _host, "a host name")),
        frozenset(_entries(store, urls, _url, "an http(s) URL")),
        frozenset(_entries(store, sha256, _sha256, "a sha256 of 64 hexadecimal digits")),
    )


def _entries(store: Store, file: ContentFile | None, normal: Callable[[str], str], kind: str) -> Iterator[str]:
    if file is None:
        return
    for number, line in enumerate(read_blob(store, file).decode("utf-8", "replace").splitlines(), start=1):
        text = re.sub(r"(^|\s)#.*", "", line.removeprefix("\ufeff")).strip()
        if text:
            try:
                yield normal(text)
            except Refused:
                raise UserError(f"{file.path or file} line {number}: {text[:200]!r} is not {kind}") from None


def _host(text: str) -> str:
    parts = urlsplit(normal_url(f"http://{text.removeprefix('*').removeprefix('.')}"))
    if parts.path != "/" or parts.query or parts.port or parts.hostname is None:
        raise Refused("unsupported_reference")
    return parts.hostname


def _url(text: str) -> str:
    return comparable(normal_url(text))


def _sha256(text: str) -> str:
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise Refused("unsupported_reference")
    return text.lower()


# --- robots.txt and X-Robots-Tag --------------------------------------------------------------------------------------


def user_agent(contact: str) -> str:
    """Returns who asks: this software, and where to complain."""
    return f"unclip-ray (img2dataset; +{contact or 'https://github.com/rom1504/img2dataset'})"


def unpacked(robots: bytes) -> bytes | str:
    """Returns a robots.txt as it was before a server compressed it, unasked; "unreachable" if that cannot be read."""
    if not robots.startswith(b"\x1f\x8b"):
        return robots
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(robots)) as file:
            return file.read(ROBOTS_BYTES)
    except (OSError, EOFError, zlib.error):
        return "unreachable"


def parse_robots(body: bytes) -> Protego:
    """Returns the rules of a robots.txt; any bytes can be read.

    Groups that name us, by either name, are one group; only without such a group that for ``*`` counts. A site with
    over MAX_RULES rules for us is left alone: its wishes are not known unless all of them are compared.
    """
    text = body[:ROBOTS_BYTES].removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    kept: list[str] = []
    rules, heading, ours = 0, False, False
    for line in filter(None, map(_for_us, text.splitlines())):
        if line.startswith(_AGENT):  # several such lines begin one group
            ours = (heading and ours) or line != _AGENT + _OTHERS
            heading = True
        else:
            heading = False
            if not ours:
                continue
            rules += 1
        kept.append(line)
    return Protego.parse(f"{_AGENT}*\nDisallow: /" if rules > MAX_RULES else "\n".join(kept))


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
    return _AGENT + ("unclip-ray" if name in AGENTS else name if name == "*" else _OTHERS)


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
