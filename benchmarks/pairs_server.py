"""Serves the images of benchmarks.pairs: ready answers from memory, one thread, little of the machine.

python -m benchmarks.pairs_server PICTURES DELAY_S SPREAD: PICTURES is a folder of *.jpg. It prints its port, answers
on all addresses of 127.0.0.0/8, and ends with its standard input. It answers after DELAY_S on average, by a log-normal
law of width SPREAD; on 127.8.0.0/16 five times later, and on 127.9.0.0/16 it never does. On 127.7.0.0/16 it answers
for robots.txt, and begins answers for all else that never end. /N.jpg is picture N modulo their number, /gone a 404,
/page a page, and /report what was asked for since the last one: JSON of the times of pictures' answers, in seconds, and
the seconds of processor time.
"""

import asyncio
import json
import random
import socket
import sys
from pathlib import Path
from time import monotonic, process_time

ROBOTS = b"User-agent: *\nDisallow: /private/\nAllow: /\n"
BEGUN = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: 100000\r\n\r\n"  # of which no more comes


class Server:
    """Answers by path, and the requests so far."""

    def __init__(self, pictures: Path, delay_s: float, spread: float):
        self._delay_s, self._spread, self._random = delay_s, spread, random.Random(0)
        self._page = _answer(b"<html>", "text/html")
        self._pictures = [_answer(file.read_bytes(), "image/jpeg") for file in sorted(pictures.glob("*.jpg"))]
        self._robots = _answer(ROBOTS, "text/plain")
        self._times: list[float] = []
        self._cpu = process_time()

    def delay(self, host: str, path: str) -> float | None:
        """Returns the seconds until an answer, None where there is none."""
        if path == "/report":
            return 0.0
        drawn = self._random.lognormvariate(-(self._spread**2) / 2, self._spread)
        return None if host.startswith("127.9.") else self._delay_s * drawn * (5 if host.startswith("127.8.") else 1)

    def answer(self, host: str, path: str) -> bytes:
        """Returns a whole response, or BEGUN."""
        if path.startswith("/gone"):
            return b"HTTP/1.1 404 Gone\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        if path.startswith("/page"):
            return self._page
        if path == "/robots.txt":
            return self._robots
        if host.startswith("127.7."):
            return BEGUN
        if path == "/report":
            report = {"times": self._times, "cpu": process_time() - self._cpu}
            self._times, self._cpu = [], process_time()
            return _answer(json.dumps(report).encode(), "application/json")
        self._times.append(monotonic())
        return self._pictures[int(path[1:].partition(".")[0]) % len(self._pictures)]


class Connection(asyncio.Protocol):
    """Answers one request."""

    def __init__(self, server: Server):
        self._server, self._request = server, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

    def data_received(self, data: bytes) -> None:
        self._request += data
        if self._request.endswith(b"\r\n\r\n"):
            path = self._request.split(b" ", 2)[1].decode()
            host = self._transport.get_extra_info("sockname")[0]
            delay = self._server.delay(host, path)
            if delay is not None:
                asyncio.get_running_loop().call_later(delay, self._answer, host, path)

    def _answer(self, host: str, path: str) -> None:
        answer = self._server.answer(host, path)
        self._transport.write(answer)
        if answer is not BEGUN:
            self._transport.close()


def _answer(body: bytes, kind: str) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


async def serve(pictures: Path, delay_s: float, spread: float) -> None:
    """Serves until the process ends."""
    server, loop = Server(pictures, delay_s, spread), asyncio.get_running_loop()
    listening = await loop.create_server(lambda: Connection(server), "0.0.0.0", 0, backlog=1024)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])))
