"""The gateway: equal requests are drawn once, whatever becomes of the first."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

import serve.gateway
from serve.bundle import ServedBundle
from serve.errors import ApiError
from serve.gateway import Gateway, Result, ResultCache
from serve.queue import ReplicaDied
from serve.settings import ServeSettings
from serve.work import Work
from tests.serve.queues import B, Replica, make_queue, work


async def ask() -> dict[str, Any]:
    return {"bundle": "b", "sides": [64]}


def make_gateway(replica: Replica) -> Gateway:
    return Gateway(
        ServedBundle("tiny", key="b"),
        ServeSettings(),
        make_queue(replica),
        ResultCache(1 << 20),
        ask,
        lambda *_, **__: None,
    )


async def drawn(gateway: Gateway, asked: Work) -> list[Result]:
    made = {event[1]: event[3] async for event in gateway.draw(asked) if event[0] == "image"}
    return [made[i] for i in range(len(asked.rows))]


async def test_equal_requests_at_once_are_drawn_once() -> None:
    replica = Replica()
    one = make_gateway(replica)
    asked = [work("a", "b"), work("a", "b"), work("a"), work("a", "b", "c"), work("a", options=B)]
    tasks = [asyncio.create_task(drawn(one, each)) for each in asked]
    await asyncio.sleep(0.01)
    replica.go.set()
    first, second, part, more, other = await asyncio.gather(*tasks)
    assert first == second == [*part, first[1]] == more[:2]
    assert (more[2].png, other[0].png) == (b"c2", b"a0")
    assert sorted(row.caption or "" for each in replica.works for row in each.rows) == ["a", "a", "b", "c"]
    assert not one.drawing


async def test_when_the_first_of_equal_requests_goes_one_of_the_others_is_drawn() -> None:
    replica = Replica()
    one = make_gateway(replica)
    tasks = [asyncio.create_task(drawn(one, work("a"))) for _ in range(5)]
    await asyncio.sleep(0.01)
    tasks[0].cancel()
    await asyncio.sleep(0.01)
    replica.go.set()
    first, *others = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert isinstance(first, asyncio.CancelledError)
    assert all(each == others[0] for each in others)
    assert len(replica.works) == 2  # what went, and one
    assert not one.drawing


async def test_requests_that_wait_for_an_equal_one_hold_so_many_bytes_of_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve.gateway, "BEHIND_BYTES", 10)

    replica = Replica()
    one = make_gateway(replica)
    with_images = replace(work("a", kind="vary"), images=(b"3by", b"2b"))
    tasks = [asyncio.create_task(drawn(one, each)) for each in [with_images] * 4 + [work("a")] * 20]
    await asyncio.sleep(0.01)
    replica.go.set()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    (refused,) = [end for end in ends if not isinstance(end, list)]  # two of them wait behind the first
    assert (refused.status, refused.code, refused.retry_after > 0) == (429, "queue_full", True)  # type: ignore[attr-defined]
    assert (one.behind, len(replica.works)) == (0, 2)


def test_an_image_is_named_by_its_whole_recipe_with_a_key_that_nobody_has() -> None:
    one, other = make_gateway(Replica()), make_gateway(Replica())
    base = work("a")
    (row,) = base.rows
    changes: Any = [{"operation": "inpaint"}, {"side": 256}, {"options": B}, {"eta": 0.5}, {"before": "b"}]
    turned = replace(base, recipe=replace(base.recipe, operation="interpolate", shares=(0.0,)))
    recipes = [
        base, *(replace(base, recipe=replace(base.recipe, **each)) for each in changes),
        *(replace(base, rows=(row._replace(**each),)) for each in ({"seed": 7}, {"caption": "b"})),
        replace(turned, rows=(row._replace(share=0.5),)), turned,
        replace(base, images=(b"1",)), replace(base, images=(b"2",)),
    ]  # fmt: skip
    names = [one._names(bundle, each)[0] for bundle in ("b", "c") for each in recipes]
    assert len(set(names)) == len(names) == len({*names, other._names("b", base)[0]}) - 1


def test_images_that_were_asked_for_last_are_kept_up_to_a_number_of_bytes() -> None:
    kept = ResultCache(10)
    for name in "abc":
        kept.keep(name, Result(b"6bytes", 0, None))
    assert list(kept.kept) == ["c"]
    assert kept.bytes <= 10


async def test_a_drawing_that_breaks_is_an_error_of_the_servers() -> None:
    replica = Replica(error=MemoryError("CUDA out of memory"))
    one = make_gateway(replica)
    replica.go.set()
    with pytest.raises(ApiError) as raised:
        await drawn(one, work("a"))
    assert (raised.value.status, raised.value.body["error"]["type"]) == (500, "server_error")
    assert not one.drawing


async def test_a_server_whose_process_is_gone_says_to_come_back_until_it_has_heard_of_its_bundle() -> None:
    async def gone() -> dict[str, Any]:
        raise ReplicaDied("killed")

    one = make_gateway(Replica())
    one.ask = gone
    with pytest.raises(ApiError) as caught:
        await one.described()
    assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "10"})
