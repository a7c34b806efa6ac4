"""Several calls at once, in order or as they end, and never more ahead than is said."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from pipeline.errors import CorruptObject
from pipeline.store.parallel import as_they_end, in_order


class Calls:
    """Calls that end at once, the second one with an error where it is said so, and others when they are ended."""

    def __init__(self, fails: bool = False, pending: tuple[int, ...] = ()):
        self.begun: list[Future[int]] = []
        self.fails, self.pending = fails, pending

    def submit(self, item: int) -> Future[int]:
        self.begun.append(future := Future[int]())
        if self.fails and item == 1:
            future.set_exception(CorruptObject("blobs/ab/abc", "is missing"))
        elif item not in self.pending:
            future.set_result(item)
        return future


@pytest.mark.parametrize("ahead", [1, 3, 9])
def test_results_come_in_order_and_no_more_than_asked_for_are_under_way(ahead: int) -> None:
    calls = Calls()
    results = in_order(calls.submit, range(7), ahead)
    assert len(calls.begun) == min(ahead, 7)  # before anything is asked for
    for number in range(7):
        assert next(results) == number
        assert len(calls.begun) == min(number + 1 + ahead, 7)
    assert list(results) == []


@pytest.mark.parametrize("iterate", [partial(in_order, ahead=2), partial(as_they_end, ahead=1)])
def test_a_failure_comes_when_its_turn_has_come(iterate: Any) -> None:
    results = iterate(Calls(fails=True).submit, range(3))
    assert next(results) == 0
    with pytest.raises(CorruptObject, match=r"^blobs/ab/abc: is missing$"):
        next(results)


def test_a_call_that_hangs_holds_up_no_other() -> None:
    """Such as a dead link, of which a list from the web has one in twenty."""
    calls = Calls(pending=(1, 3))
    results = as_they_end(calls.submit, range(20), ahead=3)
    assert [next(results) for _ in range(18)] == [0, 2, *range(4, 20)]
    for hanging in (3, 1):
        calls.begun[hanging].set_result(hanging)
    assert [*results] == [3, 1]


def test_calls_stay_within_what_is_ahead_and_wait_for_room() -> None:
    calls, full = Calls(), False
    results = as_they_end(calls.submit, range(9), 3, lambda: not full)
    assert next(results) == 0
    assert len(calls.begun) == 4  # one was taken
    full = True
    assert [next(results) for _ in range(3)] == [1, 2, 3]
    assert len(calls.begun) == 5  # where none is under way, one begins
    full = False
    assert [*results] == [4, 5, 6, 7, 8]


def test_leaving_waits_for_calls_under_way_and_begins_no_more() -> None:
    started, may_end = threading.Event(), threading.Event()

    def work(item: int) -> int:
        if item:
            started.set()
            assert may_end.wait(60)
        return item

    with ThreadPoolExecutor(2) as pool:
        calls: list[Future[int]] = []
        submit: Callable[[int], Future[int]] = lambda item: calls.append(pool.submit(work, item)) or calls[-1]  # noqa: E731
        results = as_they_end(submit, range(9), 4)
        assert next(results) == 0
        assert started.wait(60)
        threading.Timer(0.1, may_end.set).start()
        results.close()  # type: ignore[attr-defined]
        assert all(call.done() for call in calls)
        assert any(call.cancelled() for call in calls)
        assert len(calls) == 5
