"""A replica: a bundle in this process, and the thread that draws with it. It is its own ``Handle`` (serve/pool.py)."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event as Flag
from threading import Thread
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.release.signing import Untrusted
from pipeline.sampling.drawing import refusals
from serve.bundle import ServedBundle, read_head
from serve.model_runner import ModelRunner
from serve.queue import Event, RequestRefused
from serve.settings import CLOSING_S, ServeSettings
from serve.work import Work

SELDOM_S = 600.0  # between two looks at a release that cannot be loaded
log = logging.getLogger("unclip")


class Replica:
    """Holds the bundle and draws one batch at a time. A new release is loaded beside the old one.

    PNG files are made in a thread of their own, while the next batch is drawn.
    """

    def __init__(self, served: ServedBundle, settings: ServeSettings):
        self.served, self.settings = served, settings
        self.runner = self._open(served.current())
        self.next: ModelRunner | None = None
        self.warning = ""
        self.closed = Flag()
        # One thread each: images are drawn, and encoded, in the order in which they came.
        self.drawing, self.encoding = ThreadPoolExecutor(1, "drawing"), ThreadPoolExecutor(1, "encoding")
        if not served.key:
            Thread(target=self._follow, daemon=True).start()

    def _open(self, key: str) -> ModelRunner:
        unclip, settings = self.served.open(key, self.settings.device), self.settings
        judges = {
            what: (read_head(path, unclip.clip.embed_dim), most)
            for what, path, most in (
                ("prompt", settings.prompt_head, settings.most_prompt),
                ("image", settings.image_head, settings.most_image),
            )
            if path
        }
        if settings.cpus and unclip.clip.mean.device.type == "cpu":
            torch.set_num_threads(settings.cpus)  # other processes draw on the other cores
        runner = ModelRunner(key, unclip, settings.batch, judges)
        runner.warm_up()
        return runner

    def _follow(self) -> None:
        """Loads every new release, for the next batch to be drawn with.

        One that cannot be loaded changes nothing, and is tried again, ever more seldom.
        """
        seen, pause = self.runner.key, self.settings.follow_s
        while not self.closed.wait(pause):
            try:
                key = self.served.current()
                if key != seen:
                    self.next, seen = self._open(key), key
                    log.info("bundle %s is served from the next request on", key[:12])
                self.warning, pause = "", self.settings.follow_s
            except Exception as e:  # a release that is damaged or cannot be read leaves the old one in service
                pause = min(2 * pause, max(SELDOM_S, pause))
                what = "is not signed by a trusted key" if isinstance(e, Untrusted) else "could not be loaded"
                self.warning = f"the release {what}, and the previous one stays in service: see the log"
                log.warning("bundle %s stays in service: the release could not be loaded (%s)", self.runner.key[:12], e)

    async def describe(self) -> dict[str, Any]:
        """Returns what this replica draws with, and the slowest step of its warm-up in seconds."""
        if self.next is not None:
            self.runner, self.next = self.next, None
        return self.runner.describe() | {"warning": self.warning, "slowest_s": self.runner.slowest}

    async def draw(self, work: Work) -> AsyncGenerator[Event]:
        """Yields ("bundle", its description), then the events of ``ModelRunner.draw``.

        ("drawn",) comes where the next batch can be drawn; images may follow it. Raises RequestRefused, and what went
        wrong.
        """
        about = await self.describe()
        runner, loop, stop = self.runner, asyncio.get_running_loop(), Flag()
        events: asyncio.Queue[Event | BaseException] = asyncio.Queue()

        def emit(event: Event | BaseException) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def attempt(task: Callable[[], None]) -> None:
            try:
                task()
            except BaseException as e:
                emit(e)

        def draw() -> None:
            with refusals():
                runner.draw(work, emit, stop.is_set, lambda task: self.encoding.submit(attempt, task))
            emit(("drawn",))

        self.drawing.submit(attempt, draw)
        missing, drawn = len(work.rows), False
        try:
            yield ("bundle", about)
            while missing or not drawn:
                event = await events.get()
                if isinstance(event, UserError):
                    log.warning("%s was refused: %s", work.kind, event)
                    raise RequestRefused(str(event))
                if isinstance(event, BaseException):
                    raise event
                missing -= event[0] in ("image", "withheld")
                drawn |= event[0] == "drawn"
                yield event
        finally:
            stop.set()

    async def close(self) -> None:
        """Gives the memory of the models back, as soon as nothing is drawn."""
        drawn = asyncio.wrap_future(self.drawing.submit(int))  # behind all that is drawn
        self.closed.set()
        self.drawing.shutdown(wait=False)
        self.encoding.shutdown(wait=False)
        try:
            await asyncio.wait_for(drawn, CLOSING_S)
        except TimeoutError:  # Python would wait for the thread for ever, if it hangs in a driver
            log.warning("drawing did not end in time; this process ends without waiting for it")
            os._exit(0)

    async def kill(self) -> None:
        """Ends this process: a thread that hangs in a driver cannot be ended alone."""
        await asyncio.sleep(CLOSING_S)  # for the errors of requests that wait
        log.error("serve: drawing hangs, and this process ends; start it again")
        os._exit(1)
