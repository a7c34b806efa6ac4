"""The replicas of a server: started when they are needed, watched while they live, and replaced when they hang."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from serve.errors import ApiError
from serve.queue import Event, Observe, ReplicaDied
from serve.settings import ServeSettings
from serve.work import Work

PING_S = 1.0
# Pings without any sign of life after which a replica is taken for hung. They are counted and not timed: where the
# whole machine is busy or was asleep, the gateway's own pings are late, too.
MISSED = 4
# Without a step, after which drawing counts as stalled: on a busy machine a step can take 70 times the warm-up's.
STILL_S = 30.0
UPSCALE_S = 5.0  # that a batch waits for a replica before another one is started
# A step of a busy machine may take this many times the slowest one of the warm-up, which drew one image.
SLACK = 10.0
END_S = 10.0  # in which a replica that is given up has to end, before another one is started all the same
AGAIN_S = 5.0  # between two starts of which the first has failed
log = logging.getLogger("unclip")


class Handle(Protocol):
    """A replica as the gateway reaches it, in this process or in another one."""

    def draw(self, work: Work) -> AsyncGenerator[Event]:
        """Yields the events of ``Replica.draw``. Raises ReplicaDied, RequestRefused, or what went wrong."""

    async def describe(self) -> dict[str, Any]:
        """Returns what the replica draws with, at once, also while it draws. Raises ReplicaDied."""

    async def close(self) -> None:
        """Ends a replica that draws nothing."""

    async def kill(self) -> None:
        """Ends a replica that does not answer."""


@dataclass(eq=False)
class Member:
    """A replica with what is known of it.

    Attributes:
        handle: Handle through which the replica is called.
        about: Description of its bundle, as ``Replica.describe`` returns it.
        busy: State of drawing a batch now.
        images: Images of its batch, or of the last one.
        missed: Pings since its last sign of life.
        still: Pings since its last step, while it has a batch.
        since: time.monotonic() of the end of its last batch.
        lost: Future that is set when it is given up.
        ping: Ping that is on its way.
    """

    handle: Handle
    about: dict[str, Any]
    busy: bool = False
    images: int = 0
    missed: int = 0
    still: int = 0
    since: float = field(default_factory=time.monotonic)
    lost: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    ping: asyncio.Task[None] | None = None


class ReplicaPool:
    """Draws with up to ``settings.replicas`` replicas, each with one batch at a time.

    Args:
        start: Function that starts a replica. Raises UserError where the bundle cannot be loaded.
        settings: Settings, of which it reads the number of replicas and how long one may be silent.
        observe: Function that records a metric.
        tell: Function that is told with every ping whether all drawing hangs.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[Handle]],
        settings: ServeSettings,
        observe: Observe,
        tell: Callable[[bool], None],
    ):
        self.start, self.settings, self.observe, self.tell = start, settings, observe, tell
        self.members: list[Member] = []
        self.tasks: set[asyncio.Task[Any]] = set()
        self.starting = 0
        self.failed = False  # the last replica was lost, and none could be started since
        self.hung = False  # no replica that is alive makes a step
        self.tried = 0.0  # time.monotonic() of the last start that failed
        self.load_s = AGAIN_S  # of the last start
        self.about: dict[str, Any] = {}
        self.changed = asyncio.Event()

    async def open(self, first: int) -> None:
        """Starts ``first`` replicas and waits for one of them. Raises what went wrong with it."""
        for _ in range(first - 1):
            self._spawn(self._start())
        await self._start(first=True)
        self._spawn(self._watch())

    async def close(self) -> None:
        """Ends all of them."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*(member.handle.close() for member in self.members), return_exceptions=True)
        self.members.clear()

    def ready(self) -> bool:
        """Returns whether a replica is alive and does not hang, or none is needed before a request."""
        alive = any(member.missed <= 1 for member in self.members)
        return (alive and not self.hung) or (not self.members and not self.failed and not self.settings.idle_replicas)

    async def describe(self) -> dict[str, Any]:
        """Returns what the replicas draw with, by the last ping. Raises ReplicaDied where that is not known yet."""
        if not self.about:
            raise ReplicaDied("no replica has answered yet")
        return self.about

    async def draw(self, work: Work) -> AsyncGenerator[Event]:
        """Yields the events of a replica's ``draw``.

        Raises ReplicaDied where the replica ends or hangs, ApiError where there is none any more, and what
        ``Handle.draw`` raises.
        """
        member, drawing = await self._acquire(), True
        member.images, member.still = len(work.rows), 0
        try:
            async with aclosing(member.handle.draw(work)) as events:
                while (event := await self._next(member, events)) is not None:
                    member.missed = member.still = 0
                    if event[0] == "bundle":
                        self.about = member.about = event[1]
                    elif event[0] == "drawn":
                        drawing = False
                        self._release(member)
                    yield event
        except ReplicaDied:
            self._lose(member, "is gone", member.handle.close)
            raise
        finally:
            if drawing:  # else it may have the next batch by now
                self._release(member)

    async def _next(self, member: Member, events: AsyncGenerator[Event]) -> Event | None:
        """Returns the next event, None after the last. Raises ReplicaDied if the replica is lost or makes no step."""
        patience = self._patience(member)
        waiting = asyncio.ensure_future(anext(events))
        try:
            await asyncio.wait((waiting, member.lost), timeout=patience, return_when="FIRST_COMPLETED")
            if waiting.done():
                return waiting.result()
        except StopAsyncIteration:
            return None
        finally:
            if not waiting.done():  # a generator that runs cannot be closed
                waiting.cancel()
                await asyncio.wait((waiting,))
        self._lose(member, f"made no step for {patience:.0f} s", member.handle.kill)
        raise ReplicaDied("it does not answer")

    def _patience(self, member: Member) -> float:
        """Returns the seconds without an event after which a drawing is taken for stuck."""
        return max(self.settings.watchdog_s, SLACK * self.settings.batch * member.about["slowest_s"])

    def _hangs(self, member: Member) -> bool:
        """Returns whether a drawing makes no step; it may go on, and is given up only after ``_patience``."""
        return member.still * PING_S >= max(STILL_S, SLACK * member.images * member.about["slowest_s"])

    def _release(self, member: Member) -> None:
        member.busy, member.still, member.since = False, 0, time.monotonic()
        self._changed()

    def _changed(self) -> None:
        self.observe("num_replicas", len(self.members))
        # Wakes those who wait now; who waits next waits for the next change.
        self.changed.set()
        self.changed = asyncio.Event()

    async def _acquire(self) -> Member:
        began = time.monotonic()
        while True:
            if free := next((member for member in self.members if not member.busy and not member.missed > 1), None):
                free.busy = True
                return free
            if self.failed:
                raise ApiError(
                    503, "unavailable", "No process can draw this now: try again later", retry_after=self.load_s
                )
            waited = time.monotonic() - began
            room = len(self.members) + self.starting < self.settings.replicas
            if room and (not self.members or waited > UPSCALE_S) and not self.starting:
                self._spawn(self._start())
            with suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), PING_S)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _start(self, first: bool = False) -> None:
        began = time.monotonic()
        self.starting += 1
        try:
            handle = await self.start()
            about = await handle.describe()
        except Exception as e:
            if first:
                raise
            log.warning("a replica did not start (%s); trying again", e)
            self.failed, self.tried = not self.members, time.monotonic()
        else:
            self.members.append(Member(handle, about))
            self.failed, self.about, self.load_s = False, about, time.monotonic() - began
        finally:
            self.starting -= 1
            self._changed()

    def _lose(self, member: Member, why: str, end: Callable[[], Awaitable[None]]) -> None:
        """Gives up a replica, ends it, and starts another one in its place."""
        if member not in self.members:
            return
        log.warning("a replica %s, and is replaced", why)
        self.members.remove(member)
        member.lost.set_result(None)
        self.failed = not self.members
        self._spawn(self._replace(end))
        self._changed()

    async def _replace(self, end: Callable[[], Awaitable[None]]) -> None:
        self.starting += 1  # nobody else starts one meanwhile
        try:
            # First, for it may hold what the next one needs: the memory of a GPU, or this very process.
            await asyncio.wait_for(end(), END_S)
        except Exception as e:
            log.warning("a lost replica could not be killed (%r)", e)
        finally:
            self.starting -= 1
        await self._start()

    async def _watch(self) -> None:
        """Pings all replicas, gives up those that are silent, and ends those that have been idle."""
        while True:
            await asyncio.sleep(PING_S)
            now = time.monotonic()
            for member in list(self.members):
                if member.missed >= MISSED:
                    self._lose(member, f"gave no sign of life for {MISSED} pings", member.handle.kill)
                    continue
                member.missed += 1  # until the answer to its ping resets it
                member.still += member.busy
                if member.ping is None or member.ping.done():
                    member.ping = asyncio.create_task(self._ping(member))
            alive = [member for member in self.members if member.missed <= 1]
            hung = bool(alive) and all(map(self._hangs, alive))
            if hung and not self.hung:
                log.warning("drawing has stalled; requests get 503 until it resumes")
            self.hung = hung
            self.tell(hung)
            idle = [m for m in self.members if not m.busy and now - m.since > self.settings.idle_s]
            for member in idle[: max(0, len(self.members) - self.settings.idle_replicas)]:
                self.members.remove(member)
                self._spawn(member.handle.close())
                self._changed()
            least = max(self.settings.idle_replicas, int(self.failed))
            if len(self.members) + self.starting < least and now - self.tried > AGAIN_S:
                self._spawn(self._start())

    async def _ping(self, member: Member) -> None:
        try:
            about = await member.handle.describe()
        except Exception:  # of a process that has gone
            self._lose(member, "is gone", member.handle.close)
            return
        self.about = member.about = about
        member.missed = 0
