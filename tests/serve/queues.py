"""A queue of requests before replicas that do as they are told."""

import asyncio
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any

from pipeline.sampling.recipe import ImageRecipe, Row
from serve.queue import Event, ReplicaDied, RequestQueue
from serve.settings import ServeSettings
from serve.work import Work

A, B = {"decoder_steps": 2}, {"decoder_steps": 3}
BEGUN: ContextVar[list[Any]] = ContextVar("begun")  # by a request, as Ray Serve keeps it


class Replica:
    """Draws at once when it is let, and notes what; ``deaths`` of its processes come in the middle of a batch."""

    def __init__(self, deaths: int = 0, error: Exception | None = None):
        self.works: list[Work] = []
        self.go = asyncio.Event()
        self.deaths, self.error, self.closed = deaths, error, 0

    async def __call__(self, work: Work) -> AsyncGenerator[Event]:
        self.works.append(work)
        if (begun := BEGUN.get(None)) is not None:
            begun.append(asyncio.current_task())
        try:
            await self.go.wait()
            if self.error:
                raise self.error
            for i, row in enumerate(work.rows):
                if i == 1 and self.deaths:
                    self.deaths -= 1
                    raise ReplicaDied("killed")
                yield ("step", "decoder", i, 9)
                yield ("image", i, f"{row.caption}{row.seed}".encode(), 0.5)
        finally:
            self.closed += 1


def work(*captions: str, options: Any = A, kind: str = "draw") -> Work:
    recipe = ImageRecipe(kind, side=64, options=options)
    return Work(recipe, tuple(Row(caption, i) for i, caption in enumerate(captions)))


def make_queue(replica: Any, batch: int = 4, limit: int = 8) -> RequestQueue:
    return RequestQueue(replica, ServeSettings(replicas=1, batch=batch, queue=limit), lambda *_, **__: None)
