"""Serves the images of benchmarks.pairs: ready answers from memory, one thread, little of the machine.

python -m benchmarks.pairs_server PICTURES DELAY_S HOSTS: PICTURES is a folder of *.jpg. It prints its port, answers
after DELAY_S on 127.0.0.1, .2 and so on, and ends with its standard input. /N.jpg is picture N modulo their number,
/report what was asked for since the last one: JSON of the times, in seconds, and the seconds of processor time.
"""

import asyncio
import json
import socket
import sys
from pathlib import Path
from time import monotonic, process_time

ROBOTS = b"User-agent: *\nDisallow: /private/\nAllow: /\n"


class Server:
    """Answers by path, and the requests so far."""

    def __init__(self, pictures: Path, delay_s: float):
        self.delay_s = delay_s
        self._pictures = [_answer(file.read_bytes(), "image/jpeg") for file in sorted(pictures.glob("*.jpg"))]
        self._robots = _answer(ROBOTS, "text/plain")
        self._times: list[float] = []
        self._cpu = process_time()

    def answer(self, path: str) -> bytes:
        """Returns a whole response."""
        if path == "/robots.txt":
            return self._robots
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
            asyncio.get_running_loop().call_later(self._server.delay_s, self._answer, path)

    def _answer(self, path: str) -> None:
        self._transport.write(self._server.answer(path))
        self._transport.close()


def _answer(body: bytes, kind: str) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


async def serve(pictures: Path, delay_s: float, hosts: int) -> None:
    """Serves until the process ends."""
    server, port = Server(pictures, delay_s), 0
    loop = asyncio.get_running_loop()
    for i in range(1, hosts + 1):  # all of 127.0.0.0/8 is this machine
        listening = await loop.create_server(lambda: Connection(server), f"127.0.0.{i}", port, backlog=1024)
        port = listening.sockets[0].getsockname()[1]
    print(port, flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
