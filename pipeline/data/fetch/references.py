"""References of a list: the one form in which they are compared, and the one in which they are shown."""

from __future__ import annotations

import os
import re
import string
from urllib.parse import parse_qs, quote, unquote, unquote_to_bytes, urlsplit

from pipeline.data.fetch.opener import Refused, normal_url
from pipeline.local import is_embedding, local_path

# Most references are in the form to compare already; no dot segments, no escapes, nothing that a parser has to split.
_PLAIN = re.compile(
    r"https?://((?:[a-z0-9-]+\.)+[a-z0-9-]+/(?:[A-Za-z0-9_/-]|\.(?![./?]|$))*(?:\?[A-Za-z0-9._/=&-]+)?)"
)
_PARAMETER = re.compile(r"([?&;#])([^=?&;#]+)=([^&;#]+)")
_SECRET = re.compile(
    r"x-[a-z]+-.*|.*(sig|token|key(?!word)|secret|pass|pwd|auth|cred|expir|policy|hmac|session|jwt|accessid).*"
    r"|exp|s[eprtv]|sid|h[dm].*|oh|oe|q-.*|ticket|code",
    re.IGNORECASE | re.DOTALL,
)
_USER = re.compile(
    r"^(\s*[A-Za-z][A-Za-z0-9+.-]*://)(?:[^/?#]*|(?!\[)[^/?#@:]*:(?!\d*(?:[/?#]|$)).*)@", re.DOTALL
)  # the second form has a password that should have been escaped, where a colon would come before a port
_UNRESERVED = frozenset((string.ascii_letters + string.digits + "-._~").encode())
_RANDOM = re.compile(r"[A-Za-z0-9+/=_.~%-]{32,}")  # long and without words: what signs something, under any name


def comparable(reference: str) -> str:
    """Returns the form by which deny lists, forgetting and the search for duplicates know a reference.

    Of http and https alike: what a server sees of the URL, without the scheme, in one spelling of the host (lower case,
    IDNA, no usual port), of dots in the path, and of escapes (RFC 3986, 6.2.2). Of a file its path as file://. Other
    references are as they stand.
    """
    text = without_password(reference.strip())
    if plain := _PLAIN.fullmatch(text):
        return plain[1]
    try:
        parts = urlsplit(normal_url(text))
    except Refused:
        return _file(text)
    query = f"?{_normal_path(parts.query)}" if parts.query else ""
    return f"{parts.netloc}{_normal_path(parts.path)}{query}"


def _file(text: str) -> str:
    """Returns the one spelling of a reference to a file, any other text as it stands."""
    try:
        path = local_path(text)
    except ValueError:
        return text
    return text if path is None else f"file://{quote(os.fsencode(os.path.normpath(path)))}"


def shown(reference: str) -> str:
    """Returns a reference as reports, commands, evidence and messages show it: with *** for what lets others use it.

    That is what stands before an @, and the values of parameters that sign a URL or say who asks.
    """
    if is_embedding(reference):  # behind the # stands the image's URL, escaped
        place, behind, url = reference.partition("#")
        return place + behind + shown(unquote(url))
    return _PARAMETER.sub(_masked, without_password(reference))


def part_of(reference: str, *numbers: str) -> tuple[str, dict[str, str], list[int]] | None:
    """Returns the file that a reference to a part of one names, the values of its query, and these ``numbers`` of them.

    None stands for a reference that lacks a number, or has one below 0.
    """
    try:
        parts = urlsplit(reference)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        found = [int(query[name]) for name in numbers]
    except (KeyError, ValueError):
        return None
    return (os.fsdecode(unquote_to_bytes(parts.path)), query, found) if min(found) >= 0 else None


def without_password(reference: str) -> str:
    """Returns a reference with *** for what stands before an @ in its place, since many can read a store.

    It is not fetched: see pipeline.data.fetch.opener.normal_url.
    """
    return _USER.sub(r"\1***@", reference) if "@" in reference else reference


def _masked(parameter: re.Match[str]) -> str:
    before, name, value = parameter.groups()
    secret = _SECRET.fullmatch(unquote(name)) or _RANDOM.fullmatch(value)
    return f"{before}{name}={'***' if secret else value}"


def _normal_path(text: str) -> str:
    """Returns the one spelling of a path or a query: escapes in upper case, and only where they are needed."""
    pieces = re.split(r"(%[0-9A-Fa-f]{2})", text)
    return "".join(_escape(piece) if i % 2 else quote(piece, "!&'()+,/:;=?@[]%") for i, piece in enumerate(pieces))


def _escape(escaped: str) -> str:
    octet = unquote_to_bytes(escaped)
    return octet.decode() if octet[0] in _UNRESERVED else escaped.upper()
