"""The queue of requests: bounded and in order. Requests with equal settings are drawn together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import Context
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pipeline.sampling.recipe import Row
from serve.errors import ApiError
from serve.settings import ServeSettings
from serve.work import Work

WAIT_S = 0.02  # that a batch waits for more requests like its first, which costs one that is alone as much
AGAIN_S = 5  # in which a server that is stopped, or one beside it, may be there again
ATTEMPTS = 3  # at a batch whose replica dies: it may be the batch that kills it
log = logging.getLogger("unclip")
Event = tuple[Any, ...]


class ReplicaDied(Exception):
    """The replica that drew is gone, or does not answer; another one can draw the same."""


class RequestRefused(Exception):
    """The bundle cannot draw that, or an image is withheld; ``code`` is for programs."""

    def __init__(self, message: str, code: str = "invalid_request"):
        super().__init__(message)
        self.code = code


class Observe(Protocol):
    """Records a metric of the server, see FIGURES of ``serve.metrics``."""

    def __call__(self, name: str, value: float = 1, **labels: str) -> None: ...


class RunWork(Protocol):
    """Draws a work with some replica, and yields events.

    Raises ReplicaDied, RequestRefused, ApiError, or what went wrong. ("drawn",) says that the next work can begin;
    images may follow it.
    """

    def __call__(self, work: Work) -> AsyncGenerator[Event]: ...


def stopping() -> ApiError:
    """Returns the error for requests that this server does not answer any more."""
    return ApiError(503, "unavailable", "The server is stopping: try again", retry_after=AGAIN_S)


def hanging() -> ApiError:
    """Returns the error for requests of which nothing can be drawn now."""
    return ApiError(503, "unavailable", "Drawing has stalled: try again later", retry_after=AGAIN_S)


def late(deadline: float) -> ApiError:
    """Returns the error for a request that took longer than ``deadline`` seconds."""
    message = f"This was not drawn within {deadline:g} seconds: ask for fewer or smaller images"
    return ApiError(503, "deadline_exceeded", message, retry_after=AGAIN_S)


@dataclass(eq=False)
class Job:
    """A request in the queue, with the events that are still to be read."""

    work: Work
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    gone: bool = False
    came: float = field(default_factory=time.monotonic)
    seen: set[tuple[Any, ...]] = field(default_factory=set)  # of the events that a second attempt repeats

    def tell(self, event: Event) -> None:
        """Passes an event on, each image once."""
        if event[0] in ("partial", "image"):
            image = event[:3] if event[0] == "partial" else event[:2]  # a row has partial images of several sides
            if image in self.seen:
                return
            self.seen.add(image)
        self.events.put_nowait(event)


class RequestQueue:
    """Draws jobs in the order in which they came, as many batches at once as there are replicas.

    Args:
        draw: Function that draws one batch.
        settings: Settings, of which it reads replicas, batch, queue and deadline_s. A request is never split.
        observe: Function that records a metric.
    """

    def __init__(self, draw: RunWork, settings: ServeSettings, observe: Observe):
        self.draw, self.settings, self.observe = draw, settings, observe
        self.waiting: deque[Job] = deque()
        self.running: list[list[Job]] = []  # batches
        self.tasks: set[asyncio.Task[None]] = set()  # lanes
        self.batches: set[asyncio.Task[None]] = set()
        self.stopped, self.hangs = False, False
        self.seconds = 5.0  # of a batch, averaged over the last ones

    def images(self) -> int:
        """Returns how many images wait."""
        return sum(len(job.work.rows) for job in self.waiting)

    async def run(self, work: Work) -> AsyncGenerator[Event]:
        """Yields ("place", jobs before this one) as it changes, then the events of drawing.

        Raises ApiError where the queue is full, RequestRefused and what went wrong. Leaving the iteration takes the job
        out.
        """
        if self.stopped:
            raise stopping()
        if self.hangs:
            raise hanging()
        # An empty queue takes a request of any size: requests are not split, so it would never have room for it.
        if self.waiting and self.images() + len(work.rows) > self.settings.queue:
            again = self.seconds * self.images() / (self.settings.batch * self.settings.replicas)
            raise ApiError(
                429, "queue_full", f"{len(self.waiting)} requests wait already: try again later", retry_after=again
            )
        job = Job(work)
        self.waiting.append(job)
        job.tell(("place", len(self.waiting) - 1 + len(self.running)))
        if len(self.tasks) < self.settings.replicas:
            # In a context of its own: Ray Serve ends what a request has begun when its client goes.
            task = asyncio.create_task(self._lane(), context=Context())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)  # a task that is cancelled before it begins runs no ``finally``
        missing = len(work.rows)
        self._count()
        try:
            while missing:
                try:
                    left = job.came + self.settings.deadline_s - time.monotonic()
                    event = await asyncio.wait_for(job.events.get(), max(0, left))
                except TimeoutError:
                    raise late(self.settings.deadline_s) from None
                if isinstance(event, Exception):
                    raise event
                if event[0] == "withheld":
                    raise RequestRefused(event[2], "content_policy_violation")
                missing -= event[0] == "image"
                yield event
        finally:
            job.gone = True
            if job in self.waiting:
                self.waiting.remove(job)
            self._count()

    def _count(self) -> None:
        self.observe("num_queue_reqs", len(self.waiting))
        self.observe("num_running_reqs", sum(map(len, self.running)))

    async def _lane(self) -> None:
        """Draws batches until nothing waits."""
        try:
            await self._batches()
        finally:  # at once: a request that comes before a callback would wait for this lane
            self.tasks.discard(asyncio.current_task())

    async def _batches(self) -> None:
        while self.waiting:
            if self.images() < self.settings.batch:
                await asyncio.sleep(WAIT_S)
            jobs = self._take()
            if not jobs:
                continue
            # A task of its own: the lane goes on when the GPU is free, while this batch is still encoded and sent.
            drawing = asyncio.create_task(self._run(jobs, drawn := asyncio.Event()))
            self.batches.add(drawing)
            drawing.add_done_callback(self.batches.discard)
            await drawn.wait()
            for place, job in enumerate(self.waiting):
                job.tell(("place", place + len(self.running)))

    async def _run(self, jobs: list[Job], drawn: asyncio.Event) -> None:
        """Draws a batch, and tells its jobs what becomes of it. Sets ``drawn`` where the next one can begin."""
        self.running.append(jobs)
        self._count()
        for job in jobs:
            self.observe("queue_time_seconds", time.monotonic() - job.came)
        began = time.monotonic()
        try:
            await self._draw(jobs, drawn)
            self.seconds = 0.7 * self.seconds + 0.3 * (time.monotonic() - began)
        except BaseException as e:
            for job in jobs:
                job.events.put_nowait(e if isinstance(e, Exception) else stopping())
            if not isinstance(e, Exception):
                raise
        finally:
            drawn.set()
            self.running.remove(jobs)
            self._count()

    def cut(self) -> None:
        """Ends all that is drawn and waits, and refuses what comes later, with an error that says to come back."""
        self.stopped = True
        self._tell(stopping)

    def tell_hang(self, hangs: bool) -> None:
        """Refuses what is drawn, waits and comes, with an error that says to come back, as long as drawing hangs."""
        self.hangs = hangs
        if hangs:
            self._tell(hanging)

    def _tell(self, error: Callable[[], ApiError]) -> None:
        for job in (*self.waiting, *(job for jobs in self.running for job in jobs)):
            if not job.gone:
                job.events.put_nowait(error())

    def _take(self) -> list[Job]:
        """Returns the first job with those behind it that have equal settings, as long as the batch has room."""
        taken: list[Job] = []
        room = self.settings.batch
        for job in list(self.waiting):
            first = taken[0].work if taken else job.work
            alike = job.work.settings == first.settings
            # Other kinds share latents or a way between two images, which are those of one request.
            alone = first.kind != "draw" and bool(taken)
            if alike and not alone and (not taken or len(job.work.rows) <= room):
                taken.append(job)
                room -= len(job.work.rows)
                self.waiting.remove(job)
        return taken

    async def _draw(self, jobs: list[Job], drawn: asyncio.Event) -> None:
        rows: list[Row] = []
        owners: list[tuple[Job, int]] = []
        for job in jobs:
            owners += [(job, i) for i in range(len(job.work.rows))]
            rows += job.work.rows
        work = replace(jobs[0].work, rows=tuple(rows), partial=any(job.work.partial for job in jobs))
        self.observe("batch_size", len(rows))
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with aclosing(self.draw(work)) as events:
                    async for event in events:
                        if all(job.gone for job in jobs):
                            return  # which ends the drawing, too
                        if event[0] == "drawn":
                            drawn.set()
                        elif event[0] == "stage":
                            self.observe("stage_latency_seconds", event[2], stage=event[1])
                        elif event[0] in ("partial", "image", "withheld"):
                            job, own = owners[event[1]]
                            job.tell((event[0], own, *event[2:]))
                        else:
                            for job in jobs:
                                job.tell(event)
                self.observe("images_total", len(rows), kind=work.kind)
                return
            except ReplicaDied as e:
                if attempt == ATTEMPTS:
                    raise
                self.observe("retries_total")
                log.warning("a replica was lost while drawing (%s); its %d images are drawn again", e, len(rows))
