"""Turns parsed requests into images: from the cache, from an equal request that is being drawn, or new ones.

Equal requests get equal bytes. The cache has finished images by the keys of their recipes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.sampling.recipe import FROM_NOISE, Row
from pipeline.store.records import digest
from serve.bundle import ServedBundle
from serve.errors import ApiError, broken
from serve.guard import Traffic
from serve.queue import Event, Observe, ReplicaDied, RequestQueue, RequestRefused
from serve.settings import ServeSettings
from serve.work import Work

log = logging.getLogger("unclip")
BEHIND_BYTES = 1 << 29  # of images that requests hold while they wait for an equal one
EQUAL_S = 120.0  # that a request waits for an equal one, whose client may read slowly


@dataclass(frozen=True)
class Result:
    """An image as PNG, with its seed and its score."""

    png: bytes
    seed: int
    score: float | None


class ResultCache:
    """An LRU cache of images, up to ``most`` bytes.

    The name of an image in a URL cannot be guessed from its recipe: anyone who has the URL may read it.
    """

    def __init__(self, most: int):
        self.most, self.bytes = most, 0
        self.kept: OrderedDict[str, Result] = OrderedDict()
        self.secret = secrets.token_bytes(32)

    def name(self, key: str) -> str:
        """Returns the name of the image of a recipe's key."""
        return hashlib.blake2b(key.encode(), key=self.secret, digest_size=20).hexdigest()

    def get(self, name: str) -> Result | None:
        """Returns the image of a name, if it is kept."""
        if found := self.kept.get(name):
            self.kept.move_to_end(name)
        return found

    def keep(self, name: str, result: Result) -> Result:
        """Keeps an image, unless the same recipe has one, and returns the one that is kept."""
        if found := self.get(name):
            return found
        self.kept[name] = result
        self.bytes += len(result.png)
        while self.bytes > self.most and len(self.kept) > 1:
            self.bytes -= len(self.kept.popitem(last=False)[1].png)
        return result


@dataclass
class Gateway:
    """The state that the endpoints share.

    Attributes:
        served: Bundle that is served.
        settings: Settings of the server.
        queue: The queue of requests.
        results: Finished images.
        ask: Function that returns the description of the bundle that the replicas draw with, as ``Replica.describe``,
            and raises ReplicaDied where no replica has answered yet.
        observe: Function that records a metric.
        ready: Function that returns whether a request would be drawn.
        traffic: The requests that are being answered.
        drawing: The images that requests draw now, by name, until these requests have ended.
        behind: Bytes of the images of requests that wait for an equal one, outside the queue.
    """

    served: ServedBundle
    settings: ServeSettings
    queue: RequestQueue
    results: ResultCache
    ask: Callable[[], Awaitable[dict[str, Any]]]
    observe: Observe
    ready: Callable[[], bool] = lambda: True
    traffic: Traffic = field(default_factory=Traffic)
    drawing: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    behind: int = 0

    @property
    def name(self) -> str:
        """Returns what clients call the model."""
        return self.served.name

    async def described(self) -> dict[str, Any]:
        """Returns the description of the bundle that is drawn with. Raises ApiError if no replica has given it yet."""
        try:
            return await self.ask()
        except ReplicaDied:
            raise _unavailable() from None

    async def draw(self, work: Work) -> AsyncGenerator[Event]:
        """Yields the events of drawing, with ("image", row, name, Result) for each image.

        Waits for an equal request that draws the same already. Raises ApiError for what this bundle cannot draw, and
        when the queue is full.
        """
        names = self._names((await self.described())["bundle"], work)
        until = time.monotonic() + EQUAL_S
        while (others := {self.drawing[n] for n in names if n in self.drawing}) and time.monotonic() < until:
            held = sum(map(len, work.images))
            if held and self.behind + held > BEHIND_BYTES:
                raise ApiError(
                    429,
                    "queue_full",
                    "Too many requests with images wait for equal ones: try again later",
                    retry_after=self.queue.seconds,
                )
            yield ("place", 1)
            self.behind += held
            try:
                await asyncio.wait(others, timeout=until - time.monotonic())
            finally:
                self.behind -= held
            names = self._names((await self.described())["bundle"], work)
        kept = {i: found for i, name in enumerate(names) if (found := self.results.get(name))}
        if len(kept) < len(names) and work.kind not in FROM_NOISE:
            kept = {}  # drawn together from one inversion, which costs as much as an image
        missing = [i for i in range(len(names)) if i not in kept]
        ended = asyncio.get_running_loop().create_future()
        mine = {names[i]: ended for i in missing}
        self.drawing |= mine
        try:
            for i, found in kept.items():
                self.observe("cached_images_total")
                yield ("image", i, names[i], found)
            if not missing:
                return
            rows = tuple(work.rows[i] for i in missing)
            async with aclosing(self.queue.run(replace(work, rows=rows))) as events:
                async for event in events:
                    if event[0] == "bundle":
                        names = self._names(event[1]["bundle"], work)
                    elif event[0] == "image":
                        i = missing[event[1]]
                        result = Result(event[2], work.rows[i].seed, event[3])
                        yield ("image", i, names[i], self.results.keep(names[i], result))
                    elif event[0] == "partial":
                        yield ("partial", missing[event[1]], *event[2:])
                    else:
                        yield event
        except RequestRefused as e:
            raise ApiError(400, e.code, str(e)) from None
        except ReplicaDied:
            raise _unavailable() from None
        except ApiError:
            raise
        except Exception:  # such as too little memory in a process that draws
            log.exception("%s could not be drawn", work.kind)
            raise broken() from None
        finally:
            ended.set_result(None)
            for name in mine:
                if self.drawing.get(name) is ended:
                    del self.drawing[name]

    def _names(self, bundle: str, work: Work) -> list[str]:
        return [self.results.name(self._key(bundle, work, row)) for row in work.rows]

    def _key(self, bundle: str, work: Work, row: Row) -> str:
        """Returns the key of one image: everything that it depends on."""
        return digest({**work.identity(row), "bundle": bundle})


def _unavailable() -> ApiError:
    return ApiError(503, "unavailable", "No process could draw this: try again", retry_after=10)
