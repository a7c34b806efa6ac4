"""An HTTP proxy on loopback that stands before the S3 server and fails as networks and servers do.

It passes the Host header on as it came, since a signature covers it; SeaweedFS checks the signature against that
header and not against its own address.
"""

import http.client
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("refuse", "delay", "drip", "cut", "lose", "reset")
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass(frozen=True)
class Request:
    """A request that came, by the number of those before it, and what was done to it."""

    number: int
    method: str
    path: str
    fault: str | None
    body: int


Choose = Callable[[int, str, str], str | None]
"""The fault for the request of this number, method and path (with its query), or None."""


def never(number: int, method: str, path: str) -> None:
    return None


def always(fault: str) -> Choose:
    return lambda number, method, path: fault


def on_first_sight(fault: str) -> Choose:
    """Every request meets the fault once; when it is sent again, it passes."""
    seen: set[tuple[str, str]] = set()

    def choose(number: int, method: str, path: str) -> str | None:
        new = (method, path) not in seen
        seen.add((method, path))
        return fault if new else None

    return choose


def at_random(seed: int, chance: float) -> Choose:
    """Any of FAULTS, by the request's number."""

    def choose(number: int, method: str, path: str) -> str | None:
        draw = random.Random(f"{seed} {number}")
        return draw.choice(FAULTS) if draw.random() < chance else None

    return choose


@dataclass
class FaultProxy:
    """refuse: 503 SlowDown, nothing is forwarded. delay: ``pause_s`` before it is forwarded. drip: the body of the
    answer in small pieces, ``pause_s`` before each. cut: the connection ends in the middle of the body of the answer.
    lose: it ends after the request was forwarded and answered, before a byte of that. reset: it ends before the request
    is forwarded. keep, of a deletion of many: nothing is forwarded, and a success names every object as not deleted.
    ``choose`` may be replaced at any time; ``requests`` are all that came. A connection carries ``bytes_per_s``.
    """

    upstream: str
    choose: Choose = never
    pause_s: float = 0.05
    bytes_per_s: float = float("inf")
    requests: list[Request] = field(default_factory=list)
    endpoint: str = ""
    connections: list[socket.socket] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, method: str, path: str, body: int) -> str | None:
        with self._lock:
            fault = self.choose(len(self.requests), method, path)
            self.requests.append(Request(len(self.requests), method, path, fault, body))
            return fault

    def faults(self) -> set[str]:
        """The kinds that were met."""
        return {request.fault for request in self.requests if request.fault}


@contextmanager
def failing(upstream: str) -> Iterator[FaultProxy]:
    """A running proxy before the server at ``upstream``, http://host:port."""
    proxy = FaultProxy(upstream)

    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    server.daemon_threads = True
    proxy.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        for connection in proxy.connections:  # the server behind waits for its own when it ends
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.proxy.connections.append(self.connection)
        self.upstream: http.client.HTTPConnection | None = None

    def finish(self) -> None:
        if self.upstream is not None:
            self.upstream.close()
        super().finish()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.begin(self.command, self.path, len(body))
        if fault == "refuse":
            self._send(503, "Service Unavailable", [("Content-Type", "application/xml")], SLOW_DOWN, None)
            return
        if fault == "keep":
            error = b"<Error><Key>%b</Key><Code>InternalError</Code></Error>"
            errors = b"".join(error % key for key in re.findall(b"<Key>(.*?)</Key>", body))
            self._send(200, "OK", [], b"<DeleteResult>%b</DeleteResult>" % errors, None)
            return
        if fault == "reset":
            self._end()
            return
        if fault == "delay":
            time.sleep(self.proxy.pause_s)
        answer = self._forward(body)
        data = answer.read()
        time.sleep((len(body) + len(data)) / self.proxy.bytes_per_s)
        if fault == "lose":
            self._end()
            return
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
        length = answer.getheader("Content-Length")
        self._send(answer.status, answer.reason, headers, data, fault, length)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _forward(self, body: bytes) -> http.client.HTTPResponse:
        if self.upstream is None:
            self.upstream = http.client.HTTPConnection(urlsplit(self.proxy.upstream).netloc, timeout=60)
            self.upstream.connect()
            self.upstream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):  # neither is signed
                self.upstream.putheader(name, value)
        self.upstream.endheaders(body or None)
        return self.upstream.getresponse()

    def _send(
        self,
        status: int,
        reason: str,
        headers: list[tuple[str, str]],
        data: bytes,
        fault: str | None,
        length: str | None = None,
    ) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(data)))
        if fault == "cut" and (self.command == "HEAD" or len(data) < 2):
            self._end()  # a body is missing, so not even the headers leave
            return
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self._end()
        elif fault == "drip":
            step = max(1, len(data) // 4)
            for start in range(0, len(data), step):
                time.sleep(self.proxy.pause_s)
                self.wfile.write(data[start : start + step])
        else:
            self.wfile.write(data)

    def _end(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client has given up
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        pass


_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
