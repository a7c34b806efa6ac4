"""Makes calls several at once, in order: for those that wait for a store, a network or another process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

THREADS = 16  # records are small, and each is a request
MOST_BYTES = 64 << 20  # of results that wait to be taken
T = TypeVar("T")
R = TypeVar("R")


def ordered_map(
    work: Callable[[T], R], items: Iterable[T], threads: int = THREADS, size: Callable[[R], int] | None = None
) -> Iterator[R]:
    """Yields what ``work`` makes of each item, in order, by as many threads. See ``in_order``.

    Calls for at most twice as many items as threads are begun ahead. Leaving the iteration waits for calls under way.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        yield from in_order(lambda item: pool.submit(work, item), items, 2 * threads, size)
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(
    submit: Callable[[T], Future[Any]], items: Iterable[T], ahead: int, size: Callable[[Any], int] | None = None
) -> Iterator[Any]:
    """Begins calls now, and returns an iterator of their results in order.

    Args:
        submit: begins the call for an item.
        items: are taken as calls are begun.
        ahead: calls that are under way, or whose results wait to be taken.
        size: function that returns the bytes of a result. While results that wait have more than MOST_BYTES together,
            no call is begun.

    The iterator raises what a call raised in place of its result.
    """
    rest, waiting = iter(items), deque[Future[Any]]()

    def held() -> int:
        done = (future for future in waiting if future.done() and not future.exception())
        return sum(size(future.result()) for future in done) if size else 0

    def fill() -> None:
        while len(waiting) < ahead and held() <= MOST_BYTES:
            try:
                item = next(rest)
            except StopIteration:
                return
            waiting.append(submit(item))

    def results() -> Iterator[Any]:
        while waiting:
            result = waiting.popleft().result()
            fill()  # before the caller works on this one
            yield result

    fill()
    return results()
