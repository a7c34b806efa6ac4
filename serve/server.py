"""The HTTP server: uvicorn, with limits for slow clients, and an end at which every accepted request is answered."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.settings import CLOSING_S

HEADERS_S = 10.0  # in which the header of a request has to arrive
HEADER_BYTES = 32 << 10
PART = 4 << 10  # of what arrives at once, as long as it may be a header
UNFINISHED = 256  # connections whose header is still to come: a quarter of the usual limit of open files
READING_S = 60.0  # in which a client has to read something of an answer that waits for it
KEEP_ALIVE_S = 65  # longer than the 60 s of usual load balancers, which must be the ones to close
log = logging.getLogger("unclip")


class BoundedConnection(H11Protocol):
    """Closes a connection whose header does not arrive in time, and the oldest of too many such connections.

    It also closes one whose client does not read its answer.
    """

    unfinished: ClassVar[OrderedDict[BoundedConnection, asyncio.TimerHandle]] = OrderedDict()
    unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time of the first header."""
        super().connection_made(transport)
        self._expect_header()

    def data_received(self, data: bytes) -> None:
        """Starts the time of a later header, and ends it where the header is whole."""
        if self.conn.their_state is h11.IDLE and self not in self.unfinished:
            self._expect_header()
        # In parts: h11 measures a header only while it is not whole.
        while data and self in self.unfinished and not self.transport.is_closing():
            super().data_received(data[:PART])
            data = data[PART:]
            if self.conn.their_state is not h11.IDLE:
                self._end_time()
        if data and not self.transport.is_closing():
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends both times."""
        self._end_time()
        if self.unread:
            self.unread.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Starts the time of an answer that is too large for the network to take at once."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """Ends that time."""
        super().resume_writing()
        if self.unread:
            self.unread.cancel()

    def _expect_reading(self) -> None:
        self.unread = self.loop.call_later(READING_S, self._check_reading, self.transport.get_write_buffer_size())

    def _check_reading(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._expect_reading()
        else:
            self.transport.abort()  # close() would wait for the client

    def _expect_header(self) -> None:
        self.unfinished[self] = self.loop.call_later(HEADERS_S, self._close)
        if len(self.unfinished) > UNFINISHED:
            next(iter(self.unfinished))._close()

    def _end_time(self) -> None:
        if timer := self.unfinished.pop(self, None):
            timer.cancel()

    def _close(self) -> None:
        self._end_time()
        self.transport.close()


class Server(uvicorn.Server):
    """Serves an application until SIGTERM or Ctrl-C, at which requests that were accepted are answered first.

    Args:
        app: The application.
        drain: Begins to refuse new requests.
        busy: Returns how many accepted requests are still to be answered.
        cut: Ends what is still drawn when the time is over, so that its requests are answered with an error.
        drain_s: Seconds that accepted requests have.
    """

    def __init__(
        self,
        app: ASGIApp,
        drain: Callable[[], None],
        busy: Callable[[], int],
        cut: Callable[[], None],
        drain_s: float,
    ):
        config: Any = uvicorn.Config(
            app,
            http=BoundedConnection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(CLOSING_S),
            h11_max_incomplete_event_size=HEADER_BYTES,
        )
        super().__init__(config)
        self.drain, self.busy, self.cut, self.drain_s = drain, busy, cut, drain_s
        self.ending: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ends in order at the first signal, and at once at the second."""
        loop = asyncio.get_running_loop()
        mine = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
        before = {each: signal.getsignal(each) for each in mine}
        for each in mine:
            loop.add_signal_handler(each, self.end)
        try:
            yield
        finally:
            for each in mine:
                loop.remove_signal_handler(each)
                signal.signal(each, before[each])

    def end(self) -> None:
        """Begins to end; called again, it waits for nothing more."""
        if self.ending is not None:
            self.cut()
            self.should_exit = self.force_exit = True
            return
        self.drain()
        if waiting := self._open():
            log.warning("answering %d requests first; Ctrl-C again ends at once", waiting)
        self.ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        if not await self._answered(self.drain_s):
            log.warning("%d requests are aborted, unanswered after %g s", self._open(), self.drain_s)
            self.cut()
            await self._answered(CLOSING_S)
        self.should_exit = True

    async def _answered(self, seconds: float) -> bool:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (left := self._open()) and loop.time() < until:
            await asyncio.sleep(0.05)
        return not left

    def _open(self) -> int:
        """Returns how many requests are not answered, or their answers not read."""
        return self.busy() + sum(each.transport.get_write_buffer_size() > 0 for each in self.server_state.connections)
