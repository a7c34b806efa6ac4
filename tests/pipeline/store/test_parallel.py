"""Several calls at once, in order, and never more ahead than is said."""

import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from pipeline.errors import CorruptObject
from pipeline.store.parallel import in_order, ordered_map


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


def test_large_bodies_wait_for_those_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many threads there are, no more is asked for than memory holds."""
    monkeypatch.setattr("pipeline.store.parallel.MOST_BYTES", 250)
    finished: list[int] = []
    ahead: list[int] = []

    def items() -> Iterator[int]:
        for i in range(60):
            while len(finished) < i:
                time.sleep(0.001)
            ahead.append(i - taken)
            yield i

    def work(item: int) -> bytes:
        finished.append(item)
        return bytes(100)

    taken = 0
    for result in ordered_map(work, items(), 16, len):
        assert len(result) == 100
        taken += 1
    assert taken == 60
    assert max(ahead) <= 5
