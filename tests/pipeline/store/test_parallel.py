"""Several calls at once, in order or as they end, and never more ahead than is said."""

import heapq
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from pipeline.errors import CorruptObject
from pipeline.store.parallel import as_they_end, in_order


@pytest.mark.parametrize("ahead", [1, 3, 9])
def test_results_come_in_order_and_no_more_than_asked_for_are_under_way(ahead: int) -> None:
    submitted: list[int] = []

    def submit(number: int) -> Future[int]:
        submitted.append(number)
        future: Future[int] = Future()
        future.set_result(10 * number)
        return future

    results = in_order(submit, range(7), ahead)
    assert submitted == list(range(min(ahead, 7)))  # before anything is asked for
    for number in range(7):
        assert next(results) == 10 * number
        assert len(submitted) == min(number + 1 + ahead, 7)
    assert list(results) == []


def test_a_failure_comes_when_its_turn_has_come() -> None:
    def submit(number: int) -> Future[int]:
        future: Future[int] = Future()
        if number == 1:
            future.set_exception(CorruptObject("blobs/ab/abc", "is missing"))
        else:
            future.set_result(number)
        return future

    results = in_order(submit, range(3), ahead=2)
    assert next(results) == 0
    with pytest.raises(CorruptObject, match=r"^blobs/ab/abc: is missing$"):
        next(results)


@dataclass
class Servers:
    """As many servers as there are threads, on a clock of their own: calls end when nothing else is left to happen."""

    threads: int
    seconds: Callable[[int], float]
    clock: float = 0.0
    pending: list[tuple[float, int, Future[int]]] = field(default_factory=list)
    free: list[float] = field(default_factory=list)

    def submit(self, item: int) -> Future[int]:
        """Begins a call when a server is free."""
        self.free = self.free or [0.0] * self.threads
        end = max(self.clock, heapq.heappop(self.free)) + self.seconds(item)
        heapq.heappush(self.free, end)
        heapq.heappush(self.pending, (end, item, future := Future[int]()))
        return future

    def run(self, calls: int, ahead: int) -> list[int]:
        """Returns the items in the order in which they came."""
        results = as_they_end(self.submit, range(calls), ahead)
        found: list[int] = []
        taking = threading.Thread(target=lambda: found.extend(results))
        taking.start()
        for done in range(calls):
            while len(self.pending) < min(ahead, calls - done):
                time.sleep(0)
            self.clock, item, future = heapq.heappop(self.pending)
            future.set_result(item)
        taking.join()
        return found


def test_a_call_that_hangs_holds_up_no_other() -> None:
    """With 5% of the links dead for 20 s, a worker of 256 threads gets over 100 images a second, not 3."""
    draw = random.Random(0)
    took = [20.0 if draw.random() < 0.05 else draw.lognormvariate(-0.35, 0.6) for _ in range(8000)]
    servers = Servers(256, took.__getitem__)
    found = servers.run(len(took), 512)
    assert sorted(found) == list(range(len(took)))
    assert found != sorted(found)
    assert len(took) / servers.clock > 100


def test_calls_stay_within_what_is_ahead_and_wait_for_room() -> None:
    begun: list[Future[int]] = []

    def submit(item: int) -> Future[int]:
        begun.append(Future())
        begun[-1].set_result(item)
        return begun[-1]

    full = False
    results = as_they_end(submit, range(9), 3, lambda: not full)
    assert next(results) == 0
    assert len(begun) == 4  # one was taken
    full = True
    assert [next(results) for _ in range(3)] == [1, 2, 3]
    assert len(begun) == 5  # where none is under way, one begins
    full = False
    assert [*results] == [4, 5, 6, 7, 8]


def test_leaving_waits_for_calls_under_way_and_begins_no_more() -> None:
    started, may_end = threading.Event(), threading.Event()

    def work(item: int) -> int:
        if item:
            started.set()
            assert may_end.wait(10)
        return item

    with ThreadPoolExecutor(2) as pool:
        calls: list[Future[int]] = []
        results = as_they_end(lambda item: calls.append(pool.submit(work, item)) or calls[-1], range(9), 4)
        assert next(results) == 0
        assert started.wait(10)
        threading.Timer(0.1, may_end.set).start()
        results.close()  # type: ignore[attr-defined]
        assert all(call.done() for call in calls)
        assert any(call.cancelled() for call in calls)
        assert len(calls) == 5


def test_a_failure_among_calls_is_raised_in_its_place() -> None:
    def submit(item: int) -> Future[int]:
        future: Future[int] = Future()
        if item == 1:
            future.set_exception(CorruptObject("blobs/ab/abc", "is missing"))
        else:
            future.set_result(item)
        return future

    results = as_they_end(submit, range(3), 1)
    assert next(results) == 0
    with pytest.raises(CorruptObject, match=r"^blobs/ab/abc: is missing$"):
        next(results)
