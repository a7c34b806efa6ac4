"""The queue: bounded, in order, together where settings are equal, and nothing lost where a process dies."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serve.errors import ApiError
from serve.queue import ATTEMPTS, Event, ReplicaDied, RequestQueue, RequestRefused
from serve.settings import ServeSettings
from serve.work import Work
from tests.serve.queues import BEGUN, B, Replica, make_queue, work


async def images(of: RequestQueue, asked: Work) -> list[bytes]:
    made: dict[int, bytes] = {}
    async for event in of.run(asked):
        if event[0] == "image":
            assert event[1] not in made, "an image came twice"
            made[event[1]] = event[2]
    return [made[i] for i in range(len(asked.rows))]


async def test_requests_of_equal_settings_are_drawn_together_in_order_and_get_their_own() -> None:
    replica = Replica()
    drawn = make_queue(replica)
    asked = [work("z"), work("a", "b"), work("c", options=B), work("d"), work("e", "f"), work("g", kind="change")]
    tasks = [asyncio.create_task(images(drawn, one)) for one in asked]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    replica.go.set()
    made = await asyncio.gather(*tasks)
    assert made == [[f"{r.caption}{r.seed}".encode() for r in one.rows] for one in asked]
    batches = ["".join(row.caption or "" for row in one.rows) for one in replica.works]
    assert batches == ["zabd", "c", "ef", "g"]


async def test_a_full_queue_says_when_to_come_back_and_places_count_down() -> None:
    replica = Replica()
    drawn = make_queue(replica, limit=2)
    tasks = []
    for steps, caption in zip((4, 3, 2), "abc", strict=True):
        tasks.append(asyncio.create_task(images(drawn, work(caption, options={"decoder_steps": steps}))))
        await asyncio.sleep(0.01)
    with pytest.raises(ApiError) as caught:
        await images(drawn, work("d"))
    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) >= 1
    places: list[int] = []

    async def watch() -> None:
        async for event in drawn.run(work("e")):
            places.extend(event[1:] if event[0] == "place" else ())

    drawn.settings = ServeSettings(replicas=1, queue=9)
    watched = asyncio.create_task(watch())
    await asyncio.sleep(0.01)
    replica.go.set()
    await asyncio.gather(*tasks, watched)
    assert places == [3, 2, 1]


async def test_a_batch_whose_process_dies_is_drawn_again_and_each_image_comes_once() -> None:
    replica = Replica(deaths=2)
    replica.go.set()
    assert await images(make_queue(replica), work("a", "b")) == [b"a0", b"b1"]
    assert len(replica.works) == 3
    replica = Replica(deaths=ATTEMPTS)
    replica.go.set()
    with pytest.raises(ReplicaDied):
        await images(make_queue(replica), work("a", "b"))
    replica = Replica(error=RequestRefused("too many steps"))
    replica.go.set()
    with pytest.raises(RequestRefused, match="too many steps"):
        await images(make_queue(replica), work("a"))


async def test_a_client_that_goes_leaves_the_queue_and_ends_its_drawing() -> None:
    replica = Replica()
    drawn = make_queue(replica)
    first, second, third = (
        asyncio.create_task(images(drawn, work(c, options={"decoder_steps": i}))) for i, c in enumerate("abc", 2)
    )
    await asyncio.sleep(0.01)
    for task in (first, second):
        task.cancel()
    async with asyncio.timeout(60):  # a busy loop needs more turns than one timer leaves it
        while len(drawn.waiting) > 1:
            await asyncio.sleep(0.01)
    assert len(drawn.waiting) == 1
    replica.go.set()
    assert await third == [b"c0"]
    assert [one.rows[0].caption for one in replica.works] == ["a", "c"]
    assert replica.closed == 2


async def test_a_lane_outlives_the_client_that_began_it() -> None:
    """Ray Serve cancels whatever a request has begun, by the request's context, when its client goes."""

    async def client(drawn: RequestQueue, asked: Work, begun: list[Any]) -> list[bytes]:
        BEGUN.set(begun)
        return await images(drawn, asked)

    replica = Replica()
    drawn = make_queue(replica)
    begun: list[Any] = []
    first = asyncio.create_task(client(drawn, work("a", "b"), begun))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(client(drawn, work("c", options=B), []))
    await asyncio.sleep(0.01)
    for task in (first, *begun):
        task.cancel()
    await asyncio.sleep(0.01)
    replica.go.set()
    assert await asyncio.wait_for(second, 5) == [b"c0"]


async def test_a_request_that_comes_as_the_last_lane_ends_gets_its_own() -> None:
    """Its turn of the event loop is the one in which the lane has found the queue empty."""

    came: list[asyncio.Task[list[bytes]]] = []

    async def draw(work: Work) -> AsyncGenerator[Event]:
        yield ("image", 0, (work.rows[0].caption or "").encode(), 0.5)
        if not came:
            came.append(asyncio.create_task(images(drawn, another)))

    another = work("b")
    drawn = make_queue(draw)
    assert await images(drawn, work("a")) == [b"a"]
    while not came:
        await asyncio.sleep(0)
    assert await asyncio.wait_for(came[0], 5) == [b"b"]
    assert not drawn.tasks


async def test_a_request_that_is_not_drawn_in_its_time_is_told_to_come_back() -> None:
    replica = Replica()
    drawn = make_queue(replica)
    drawn.settings = ServeSettings(replicas=1, deadline_s=0.05)
    for asked in (work("a"), work("b", options=B)):  # one is drawn, the other waits behind it
        with pytest.raises(ApiError) as caught:
            await images(drawn, asked)
        assert (caught.value.status, caught.value.code) == (503, "deadline_exceeded")
        assert int(caught.value.headers["Retry-After"]) >= 1
