"""Plays the web of benchmarks.pairs to one worker of the fetch, without sockets and on a clock of its own.

The fetch is the real one: its threads, turns, retries, robots.txt and parsing. A server's answer that takes ten seconds
keeps its thread for ten seconds of the clock, which goes SPEED times as fast as the machine's: whatever the machine
takes counts SPEED times, so a busy one shows rates that are too low and none that is too high.
"""

import csv
import io
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

from benchmarks.pairs import DEAD_S, SMALL, WEB_S, WEB_SPREAD, Site, make_pictures
from benchmarks.pairs_server import BEGUN, Server
from pipeline.data.fetch import fetcher, opener, sites, visit
from pipeline.data.fetch.fetcher import Fetcher
from pipeline.data.fetch.opener import Guard, Response
from pipeline.settings import PairsSettings

SPEED = 2.0


@dataclass(frozen=True)
class Clock:
    """Stands for the module ``time``, and goes ``speed`` times as fast."""

    speed: float

    def monotonic(self) -> float:
        return time.monotonic() * self.speed

    def time(self) -> float:
        return self.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / self.speed)


class Answer(io.BytesIO):
    """Stands for a socket from which an answer can be read, and for its file; for more of BEGUN it waits in vain."""

    def __init__(self, data: bytes, clock: Clock):
        super().__init__(data)
        self._begun, self._clock = data is BEGUN, clock

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def settimeout(self, seconds: float) -> None:
        self._timeout_s = seconds

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer)
        if self._begun and not size:
            self._clock.sleep(self._timeout_s)
            raise TimeoutError
        return size


@contextmanager
def played(server: Server, clock: Clock) -> Iterator[None]:
    """Lets every request of the fetch be answered by ``server``, without a connection, and at the time of ``clock``."""

    def ask(guard: Guard, url: str, headers: Mapping[str, str], deadline: float, max_bytes: int) -> Response:
        parts = urlsplit(url)
        host = parts.hostname or ""
        delay = server.delay(host, parts.path)
        left = deadline - clock.monotonic()
        clock.sleep(max(0.0, min(left, math.inf if delay is None else delay)))
        if delay is None or delay > left:
            raise TimeoutError
        answer = Answer(server.answer(host, parts.path), clock)
        response = Response(answer, deadline=deadline, max_bytes=max_bytes)  # type: ignore[arg-type]
        response.begin()
        return response

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(visit, "ask", ask))
        for module in (fetcher, opener, sites, visit):
            stack.enter_context(mock.patch.object(module, "time", clock))
        yield


def fetch_web(rows: int, speed: float, delay_s: float = WEB_S) -> dict[str, float]:
    """Fetches the references of a list as the web has them, by one worker with its own settings.

    Args:
        rows: Rows of the list.
        speed: Speed of the clock.
        delay_s: Mean seconds until a server answers.

    Returns:
        "images_per_second" between 3/8 and 7/8 of the images; "kept", the share of the rows that are images;
        "milliseconds_per_image", of a core, the server's part included and decoding left out.
    """
    clock = Clock(speed)
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder), SMALL, 8)
        with open(Site(80).write_web_list(Path(folder, "list.csv"), rows)) as file:
            urls = [row["url"] for row in csv.DictReader(file)]
        server = Server(Path(folder), delay_s, WEB_SPREAD)
    times = []
    began = time.process_time()
    with played(server, clock):
        fetching = Fetcher(PairsSettings(timeout_s=DEAD_S), max_bytes=1 << 20)
        times = [clock.monotonic() for _, found in fetching.fetch(urls) if found.data is not None]
    busy = time.process_time() - began
    first, last = len(times) * 3 // 8, len(times) * 7 // 8
    return {
        "images_per_second": (last - first) / (times[last] - times[first]),
        "kept": len(times) / rows,
        "milliseconds_per_image": 1e3 * busy / len(times),
    }
