"""The pool: what is silent, stuck or gone is replaced, and nobody waits for it."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from pipeline.sampling.recipe import ImageRecipe, Row
from serve import pool
from serve.errors import ApiError
from serve.pool import ReplicaPool
from serve.queue import Event, ReplicaDied
from serve.settings import ServeSettings
from serve.work import Work

WORK = Work(ImageRecipe(side=64), (Row("a", 0),))


class Fake:
    """A replica that draws, hangs or is silent, as it is told."""

    def __init__(self) -> None:
        self.hangs, self.silent, self.ended, self.closed = False, False, "", 0
        self.drawn, self.encoded = asyncio.Event(), asyncio.Event()
        self.drawn.set()
        self.encoded.set()

    async def draw(self, work: Work) -> AsyncGenerator[Event]:
        try:
            yield ("bundle", {"bundle": "b", "slowest_s": 0.0})
            if self.hangs:
                await asyncio.sleep(1000)
            await self.drawn.wait()
            yield ("drawn",)
            await self.encoded.wait()
            yield ("image", 0, b"", 0.5)
        finally:
            self.closed += 1

    async def describe(self) -> dict[str, Any]:
        if self.silent:
            await asyncio.sleep(1000)
        return {"bundle": "b", "slowest_s": 0.0}

    async def close(self) -> None:
        self.ended = "closed"

    async def kill(self) -> None:
        self.ended = "killed"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PING_S", 0.02)


async def opened(
    made: list[Fake], first: int = 1, broken: bool = False, make: Callable[[], Fake] = Fake, **settings: Any
) -> ReplicaPool:
    async def start() -> Fake:
        if broken and made:
            await asyncio.sleep(1000)
        made.append(make())
        return made[-1]

    found = ReplicaPool(start, ServeSettings(**settings), lambda *_, **__: None, lambda _: None)
    await found.open(first)
    await happens(lambda: len(found.members) >= first)
    return found


async def happens(event: Callable[[], object]) -> None:
    while not event():
        await asyncio.sleep(0)


async def draw(drawn: ReplicaPool) -> list[str]:
    return [event[0] async for event in drawn.draw(WORK)]


async def test_a_replica_that_makes_no_step_is_replaced_and_its_batch_can_be_drawn_again() -> None:
    made: list[Fake] = []
    drawn = await opened(made, replicas=1, watchdog_s=0.1)
    made[0].hangs = True
    with pytest.raises(ReplicaDied):
        await draw(drawn)
    await happens(lambda: len(made) >= 2 and drawn.members)
    assert (made[0].ended, made[0].closed) == ("killed", 1)
    assert await draw(drawn) == ["bundle", "drawn", "image"]
    await drawn.close()
    assert made[1].ended == "closed"


async def test_a_step_may_take_as_long_as_the_warm_up_says() -> None:
    drawn = await opened([], replicas=1, watchdog_s=60.0, batch=4)
    (member,) = drawn.members
    assert drawn._patience(member) == 60
    member.about = {"slowest_s": 3.0}
    assert drawn._patience(member) == 120


async def test_a_machine_that_is_only_slow_is_not_a_stalled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PING_S", 1.0)
    drawn = await opened([], replicas=1)
    (member,) = drawn.members
    member.busy, member.images, member.still = True, 1, 18  # seconds of a step that took a tenth in the warm-up
    member.about = {"slowest_s": 0.1}
    assert not drawn._hangs(member)
    member.still = 30
    assert drawn._hangs(member)
    member.about = {"slowest_s": 6.0}
    assert not drawn._hangs(member)
    await drawn.close()
    await drawn.close()


async def test_nobody_waits_for_a_replica_that_is_lost_and_not_yet_replaced() -> None:
    made: list[Fake] = []
    drawn = await opened(made, broken=True, replicas=1)
    made[0].hangs = made[0].silent = True
    tasks = [asyncio.create_task(draw(drawn)) for _ in range(3)]
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(ends[0], ReplicaDied)
    for end in ends[1:]:
        assert isinstance(end, ApiError)
        assert (end.status, "Retry-After" in end.headers) == (503, True)
    assert not drawn.ready()
    assert made[0].ended == "killed"
    await drawn.close()


async def test_a_silent_replica_gets_no_work_and_is_replaced() -> None:
    made: list[Fake] = []
    drawn = await opened(made, 2, replicas=2, idle_replicas=2)
    made[0].silent = True
    await happens(lambda: drawn.members[0].missed >= 2)
    assert drawn.ready()
    assert await draw(drawn) == ["bundle", "drawn", "image"]
    assert [member.missed for member in drawn.members if member.handle is made[1]] == [0]
    await happens(lambda: made[0].ended == "killed" and len(made) >= 3)
    await drawn.close()


async def test_idle_replicas_end_and_come_back() -> None:
    made: list[Fake] = []
    drawn = await opened(made, replicas=1, idle_replicas=0, idle_s=0.05)
    await happens(lambda: not drawn.members)
    assert drawn.ready()
    assert await draw(drawn) == ["bundle", "drawn", "image"]
    assert (len(made), made[0].ended) == (2, "closed")
    await drawn.close()


async def test_a_replica_has_one_batch_at_a_time_while_it_encodes_the_one_before() -> None:
    made: list[Fake] = []
    drawn = await opened(made, replicas=1)
    made[0].encoded.clear()
    first = asyncio.create_task(draw(drawn))
    (member,) = drawn.members
    await happens(lambda: member.busy)
    await happens(lambda: not member.busy)
    made[0].drawn.clear()
    second = asyncio.create_task(draw(drawn))
    await happens(lambda: member.busy)
    made[0].encoded.set()
    await first
    assert member.busy
    made[0].drawn.set()
    await second
    assert not member.busy
    await drawn.close()


async def test_a_replica_that_hangs_has_ended_before_another_one_is_started() -> None:
    """It may hold the memory of the GPU; and where it is this process, that ends, and starts nothing."""

    class Stubborn(Fake):
        async def kill(self) -> None:
            await ended.wait()

    ended = asyncio.Event()
    made: list[Fake] = []
    drawn = await opened(made, make=Stubborn, replicas=1, watchdog_s=0.05)
    made[0].hangs = True
    with pytest.raises(ReplicaDied):
        await draw(drawn)
    await asyncio.sleep(0.2)  # ten pings
    assert (len(made), drawn.ready()) == (1, False)
    ended.set()
    await happens(lambda: drawn.members)
    assert len(made) == 2
    await drawn.close()


async def test_a_process_that_is_gone_is_not_killed_for_its_number_may_be_anothers() -> None:
    class Gone(Fake):
        async def draw(self, work: Work) -> AsyncGenerator[Event]:
            raise ReplicaDied("gone")
            yield

    made: list[Fake] = []
    drawn = await opened(made, make=lambda: Fake() if made else Gone(), replicas=1)
    with pytest.raises(ReplicaDied):
        await draw(drawn)
    await happens(lambda: len(made) >= 2)
    assert made[0].ended == "closed"
    await drawn.close()
