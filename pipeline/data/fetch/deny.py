"""Reads deny lists: hosts, URLs and images that are never fetched or kept, whatever a site says.

A list is a text file, one entry a line; empty lines and those that begin with ``#`` are passed over. Its content is
part of the recipe. It travels as a blob, so that every worker reads what the configuration read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from pipeline.data.fetch.opener import Refused, normal_url
from pipeline.data.fetch.references import comparable, shown
from pipeline.errors import UserError
from pipeline.parse import ContentFile
from pipeline.store import Store
from pipeline.store.records import read_blob


@dataclass(frozen=True)
class DenyLists:
    """Holds entries by kind, in one spelling.

    Attributes:
        hosts: Each with all below it.
        urls: As ``comparable`` returns them.
        sha256: In lower-case hex, of bytes as fetched.
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
        text = line.strip().removeprefix("\ufeff")
        if text and not text.startswith("#"):
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
