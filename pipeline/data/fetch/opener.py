"""Requests for untrusted URLs: public addresses only, one deadline, a byte budget, no proxy, no redirect.

A name is resolved once and the connection goes to the address that was checked, so no name that changes its address
reaches the machine itself, its network or a cloud's metadata service. Redirects are followed by
pipeline.data.fetch.fetcher, hop by hop, each a request here. Every failure is a Refused whose text is a reason of
pipeline.ledger.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from pipeline.data.fetch.addresses import is_public
from pipeline.errors import UserError
from pipeline.local import MAX_REFERENCE

_SAFE = "!#$%&'()*+,/:;=?@[]~"  # what a browser leaves as it is in a path or a query
_LONGEST_HOST = 253  # characters of a name that DNS can hold; older Pythons take quadratic time for the IDNA of more
SMALL_BYTES = 256 << 10  # of a body are read by each thread; for the rest it waits until there is room
NAME_S, MOST_NAMES = 60.0, 10_000
_SHARES = 4  # of the time that is left an address of a name may take one, if others wait behind it


@dataclass(frozen=True)
class Evidence:
    """Says what asked us to leave a reference alone, and when it was seen, in seconds since the epoch."""

    text: str
    seen: float


class Refused(Exception):
    """Says why a reference yields no bytes; its text is the reason."""

    def __init__(self, reason: str, evidence: Evidence | None = None):
        super().__init__(reason)
        self.evidence = evidence


class Guard:
    """Decides at which addresses a host may be reached.

    ``host_map``: host name to "address:port"; such a host is trusted. ``allow``: host names, addresses and networks
    that may be reached although they are not public. Raises UserError for an entry that cannot be read.
    """

    def __init__(self, host_map: Mapping[str, str], allow: Sequence[str]):
        self._map: dict[str, tuple[str, int]] = {}
        for host, target in host_map.items():
            address, _, port = target.rpartition(":")
            if not address or not port.isdecimal():
                raise UserError(f"hosts: {host}: {target!r} is not of the form address:port")
            self._map[host.lower()] = (address.strip("[]"), int(port))
        self._hosts = {entry.lower() for entry in allow}
        self._known: dict[str, tuple[list[str], float]] = {}  # addresses, and a time.monotonic()
        self._networks = []
        for entry in allow:
            try:
                self._networks.append(ipaddress.ip_network(entry))
            except ValueError:
                if "/" in entry or ":" in entry:
                    raise UserError(f"allow: {entry!r} is neither a host name nor a network like 10.0.0.0/8") from None

    def connect(self, host: str, port: int, deadline: float) -> socket.socket:
        """Connects to the first permitted address that answers, trying one after the other within the deadline.

        An address that lets its share of the time go by leaves the rest to the next. Raises Refused where no address
        is permitted, or the one that answers is this machine's own; OSError where none answers.
        """
        host = host.lower()
        trusted = host in self._map or host in self._hosts
        host, port = self._map.get(host, (host, port))
        found = self._addresses(host, port)
        addresses = [address for address in found if trusted or self._allows(address) or is_public(_parsed(address))]
        if not addresses:
            raise Refused("forbidden_address")
        for left in range(len(addresses), 0, -1):
            address = addresses[-left]
            try:
                share = _remaining(deadline) / min(left, _SHARES)
                connection = socket.create_connection((address, port), timeout=share)
            except OSError:
                if left == 1:
                    raise
                continue
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            # A public address of this machine: its services that a firewall keeps from others would answer.
            if not trusted and not self._allows(address) and connection.getsockname()[0] == connection.getpeername()[0]:
                connection.close()
                raise Refused("forbidden_address")
            return connection
        raise AssertionError("the last address connects or raises")

    def forbids(self, host: str) -> bool:
        """Returns whether a host is surely refused, as far as its name says it: no name is resolved."""
        host = host.lower()
        if not host or host in self._map or host in self._hosts:
            return False
        try:
            return not (is_public(_parsed(host)) or self._allows(host))
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")

    def _addresses(self, host: str, port: int) -> list[str]:
        """Returns the addresses of a name, remembered for a minute: resolvers of clouds bear few questions."""
        found, until = self._known.get(host, ([], 0.0))
        if until <= time.monotonic():
            found = [str(place[0]) for *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
            if len(self._known) >= MOST_NAMES:
                self._known.clear()
            self._known[host] = found, time.monotonic() + NAME_S
        return found

    def _allows(self, address: str) -> bool:
        ip = _parsed(address)
        return any(ip in network for network in self._networks)


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address.partition("%")[0])


@lru_cache(maxsize=1024)  # each of a URL's checks asks for it
def normal_url(reference: str) -> str:
    """Returns an http(s) URL in one spelling, that the guard, the server, robots.txt and deny lists all see.

    Host in lower case and ASCII (IDNA), spaces and letters outside ASCII escaped as a browser does, no fragment, no
    ``.`` or ``..`` in the path. Raises Refused for anything else, for one over MAX_REFERENCE, and for user names and
    escapes in the host, which parsers read differently.
    """
    if len(reference) > MAX_REFERENCE:
        raise Refused("unsupported_reference")
    try:
        parts = urlsplit(reference)
        host, port = parts.hostname or "", parts.port
        if len(host) > _LONGEST_HOST:
            raise Refused("unsupported_reference")
        # Dots are taken off behind IDNA, which has four characters for them.
        name = f"[{host}]" if ":" in host else host.encode("idna").decode("ascii").lower().rstrip(".")
    except ValueError:  # UnicodeError is one
        raise Refused("unsupported_reference") from None
    if parts.scheme not in ("http", "https") or not name or any(mark in parts.netloc for mark in "@%\\ "):
        raise Refused("unsupported_reference")
    usual = {"http": http.client.HTTP_PORT, "https": http.client.HTTPS_PORT}[parts.scheme]
    place = name if port in (None, usual) else f"{name}:{port}"
    path = quote(_without_dots(parts.path), _SAFE) or "/"
    return urlunsplit((parts.scheme, place, path, quote(parts.query, _SAFE), ""))


def _without_dots(path: str) -> str:
    """Resolves the segments ``.`` and ``..`` of a path, escaped ones too, as browsers do (RFC 3986, 5.2.4)."""
    if "/." not in path and "/%2" not in path:
        return path
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        dots = re.sub("%2e", ".", segment, flags=re.IGNORECASE)
        if dots == "..":
            del kept[-1:]
        elif dots != ".":
            kept.append(segment)
    if dots in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)


def ask(guard: Guard, url: str, headers: Mapping[str, str], deadline: float, max_bytes: int) -> Response:
    """Returns the answer to a GET of a normal URL, whatever its status, its body not yet read.

    ``deadline`` is a time.monotonic(). What it raises are reasons after failures_as_reasons.
    """
    parts = urlsplit(url)
    connection_to = {"http": _HTTPConnection, "https": _HTTPSConnection}[parts.scheme]
    connection = connection_to(parts.netloc, guard, deadline, max_bytes)
    selector = f"{parts.path}?{parts.query}" if parts.query else parts.path
    try:
        connection.request("GET", selector, headers={**headers, "Connection": "close"})
        response = connection.getresponse()
        assert isinstance(response, Response)
    except BaseException:
        connection.close()
        raise
    if connection.sock:  # the server means to keep it open; the response has a file of its own
        connection.sock.close()
    return response


@contextlib.contextmanager
def failures_as_reasons() -> Iterator[None]:
    """Turns whatever goes wrong between us and a server into a Refused."""
    try:
        yield
    except TimeoutError:
        raise Refused("timeout") from None
    except http.client.IncompleteRead:
        raise Refused("truncated") from None
    except OSError:  # one of a wrong certificate is a ValueError, too
        raise Refused("unreachable") from None
    except (http.client.InvalidURL, ValueError):
        raise Refused("unsupported_reference") from None
    except http.client.HTTPException:
        raise Refused("unreachable") from None


def _remaining(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


class _HTTPConnection(http.client.HTTPConnection):
    def __init__(self, place: str, guard: Guard, deadline: float, max_bytes: int):
        super().__init__(place)
        self._guard, self._deadline = guard, deadline
        self.response_class = partial(Response, deadline=deadline, max_bytes=max_bytes)  # type: ignore[assignment]

    def connect(self) -> None:
        self.sock = self._guard.connect(self.host, self.port, self._deadline)


class _HTTPSConnection(_HTTPConnection):
    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        super().connect()
        self.sock = _tls_context().wrap_socket(self.sock, server_hostname=self.host)


@cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


class Response(http.client.HTTPResponse):
    """Stops at the deadline of its reader, however slowly bytes drip, and at ``max_bytes``."""

    def __init__(self, sock: socket.socket, *args: Any, deadline: float, max_bytes: int, **settings: Any):
        super().__init__(sock, *args, **settings)
        self._max_bytes = max_bytes
        self.reader = _DeadlineReader(self.fp.detach(), sock, deadline)
        self.fp = io.BufferedReader(self.reader)

    def read(self, amt: int | None = None) -> bytes:
        if amt is None:
            return self.read_all()
        body = super().read(amt)
        if self.length and len(body) < amt:
            raise Refused("truncated")
        return body

    def read_all(self, reserve: Callable[[int], object] = int) -> bytes:
        """Returns the whole body.

        ``reserve`` is called before more than SMALL_BYTES are read, with the bytes that may follow. It may wait: that
        time is not the server's.
        """
        if self.length is not None and self.length > self._max_bytes:
            raise Refused("too_large")
        with failures_as_reasons():
            body = self.read(min(SMALL_BYTES, self._max_bytes + 1))
            if len(body) == SMALL_BYTES and not self.isclosed():
                began = time.monotonic()
                reserve(self._max_bytes - SMALL_BYTES if self.length is None else self.length)
                self.reader.deadline += time.monotonic() - began
                body += self.read(self._max_bytes + 1 - SMALL_BYTES)
        if len(body) > self._max_bytes:
            raise Refused("too_large")
        return body


class _DeadlineReader(io.RawIOBase):
    """Reads from a socket's file and waits no longer than until the deadline, a time.monotonic()."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: float):
        super().__init__()
        self._raw, self._sock, self.deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_remaining(self.deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()
