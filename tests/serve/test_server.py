"""Clients that read their answers slowly, or not at all, on real connections."""

import asyncio
import socket
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from serve import server
from serve.server import Server

ANSWER = bytes(16 << 20)  # more than the kernel takes from a server whose client does not read


class Running:
    """A server of one long answer, with a client that has asked for it."""

    def __init__(self) -> None:
        self.answered, self.drained = asyncio.Event(), False
        self.server = Server(self, self.drain, lambda: 0, lambda: None, 60.0)

    def drain(self) -> None:
        self.drained = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", str(len(ANSWER)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": ANSWER})
        self.answered.set()

    async def __aenter__(self) -> "Running":
        listening = socket.create_server(("127.0.0.1", 0))
        self.serving = asyncio.create_task(self.server.serve([listening]))
        self.client = socket.create_connection(listening.getsockname())
        self.client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.client, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await self.answered.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.client.close()
        self.server.should_exit = True
        await self.serving

    async def read(self) -> int:
        """Reads the answer, and returns how many bytes came."""
        came, loop = 0, asyncio.get_running_loop()
        while came < len(ANSWER) and (part := await loop.sock_recv(self.client, 1 << 20)):
            came += len(part)
        return came


async def test_a_client_that_reads_nothing_is_closed_and_its_bytes_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "READING_S", 0.1)

    async with Running() as one:
        (connection,) = one.server.server_state.connections
        assert connection.transport.get_write_buffer_size() > 1 << 20
        while one.server.server_state.connections:
            await asyncio.sleep(0.05)
        assert connection.transport.get_write_buffer_size() == 0


async def test_a_client_that_reads_slowly_gets_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "READING_S", 0.2)

    async with Running() as one:
        loop, came = asyncio.get_running_loop(), 0
        while came < len(ANSWER):
            part = await loop.sock_recv(one.client, 2 << 20)
            assert part
            came += len(part)
            await asyncio.sleep(0.05)


async def test_an_answer_that_is_still_being_read_is_waited_for_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CLOSING_S", 0.0)

    async with Running() as one:
        one.server.end()
        await asyncio.sleep(0.5)  # the loop of uvicorn looks ten times a second
        assert one.drained
        assert not one.serving.done()
        assert await one.read() > len(ANSWER)
        await one.serving


async def test_a_header_that_is_too_long_is_refused_also_if_it_arrives_at_once() -> None:
    async with Running() as one:
        loop = asyncio.get_running_loop()
        with socket.create_connection(one.client.getpeername()) as other:
            other.setblocking(False)
            header = b"GET / HTTP/1.1\r\nHost: a\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n"
            await loop.sock_sendall(other, header)
            assert (await loop.sock_recv(other, 12)) == b"HTTP/1.1 400"
        assert await one.read() >= len(ANSWER)  # others are answered


HALF = b"GET / HTTP/1.1\r\nHost: a\r\nX-Long: "


async def closed(one: socket.socket) -> bool:
    """Waits until the server says something, and returns whether that is the connection's end."""
    try:
        return await asyncio.get_running_loop().sock_recv(one, 1) == b""
    except ConnectionError:  # it has closed before a byte came
        return True


async def test_a_header_that_does_not_end_is_closed_however_many_bytes_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADERS_S", 0.3)

    async with Running() as one:
        with socket.create_connection(one.client.getpeername()) as slow:
            slow.setblocking(False)
            slow.sendall(HALF)
            end = asyncio.create_task(closed(slow))
            while not end.done():
                with suppress(ConnectionError):
                    slow.sendall(b"x")
                await asyncio.sleep(0.02)
            assert await end


async def test_of_too_many_headers_the_oldest_are_closed_and_the_others_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "UNFINISHED", 4)

    async with Running() as one:
        with ExitStack() as stack:
            half = [stack.enter_context(socket.create_connection(one.client.getpeername())) for _ in range(7)]
            for each in half:
                each.setblocking(False)
                each.sendall(HALF)
            for each in half[:3]:
                assert await closed(each)
            for each in half[3:]:
                each.sendall(b"x\r\n\r\n")
                assert await asyncio.get_running_loop().sock_recv(each, 12) == b"HTTP/1.1 200"
