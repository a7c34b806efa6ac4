"""Serves drawings from this machine, drawn on demand, so that the quick start downloads images without a network.

It runs in processes of its own, one for each core: drawing holds the interpreter lock.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from pipeline.data.source.drawings.flaws import FLAWED, flawed_bytes
from pipeline.data.source.drawings.world import draw_png, drawing_of, require_packages
from pipeline.errors import UserError
from pipeline.graph.resources import cores
from pipeline.sandbox import python_path

CACHED_IMAGES = 1024  # about 10 kB each at 256 px, 50 kB at 1024 px


@lru_cache(maxsize=CACHED_IMAGES)
def _draw(url_path: str) -> bytes:
    return flawed_bytes(url_path) if url_path.startswith(FLAWED) else draw_png(*drawing_of(url_path))


@contextmanager
def serving() -> Iterator[str]:
    """Runs a server as long as the block lasts; yields "127.0.0.1:PORT".

    It ends with the block and also when this process dies, however it dies.

    Raises:
        UserError: if the demo packages are missing or the server does not start.
    """
    require_packages()  # names a missing package here, where it is one line
    command = [sys.executable, "-P", "-m", "pipeline.data.source.drawings.server"]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    pipe = subprocess.PIPE
    # In a group of its own: a terminal's Ctrl-C is for this process, and may come before the server is ready.
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, process_group=0) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            if not address:
                raise UserError(f"the server of drawings did not start; run python {' '.join(command[1:])} to see why")
            yield address
        finally:
            with suppress(ProcessLookupError):  # it has crashed already
                os.killpg(process.pid, signal.SIGKILL)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # downloaders connect with many threads at once
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of a client that has gone, as downloaders do whose time is over: their ledger counts it."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds until an idle connection is dropped

    def do_GET(self) -> None:
        try:
            image = _draw(urlsplit(self.path).path)
        except LookupError:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(image)))
        self.end_headers()
        self.wfile.write(image)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the downloader's ledger counts every failure."""


def main() -> None:
    """Serves on a free loopback port, says which; ends, as its forks do, when stdin closes or its parent dies."""
    parent = os.getppid()
    server = _Server(("127.0.0.1", 0), _Handler)
    print(f"127.0.0.1:{server.server_port}", flush=True)
    for _ in range(cores() - 1):
        first = os.getpid()
        if os.fork() == 0:  # it takes requests from the same socket
            parent = first
            break
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # A fork of the parent may hold the other end of stdin open, so its process id is watched too.
    while os.getppid() == parent and not select.select([sys.stdin], [], [], 1.0)[0]:
        pass


if __name__ == "__main__":
    main()
