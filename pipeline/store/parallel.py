"""Concurrent calls for those that wait for a store, a network or another process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from queue import SimpleQueue
from typing import Any, TypeVar

THREADS = 16  # records are small, and each is a request
T = TypeVar("T")
R = TypeVar("R")


def ordered_map(work: Callable[[T], R], items: Iterable[T], threads: int = THREADS) -> Iterator[R]:
    """Yields the results of ``work`` for each item, in order, by as many threads. See ``in_order``.

    Calls for at most twice as many items as threads are begun ahead. Leaving the iteration waits for running calls.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        yield from in_order(lambda item: pool.submit(work, item), items, 2 * threads)
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(submit: Callable[[T], Future[Any]], items: Iterable[T], ahead: int) -> Iterator[Any]:
    """Begins calls now, and returns an iterator of their results in order.

    Args:
        submit: Function that begins the call for an item.
        items: Items, taken as calls are begun.
        ahead: Number of calls that run, or whose results wait to be taken.

    The iterator raises what a call raised in place of its result.
    """
    rest = iter(items)
    waiting = deque(map(submit, islice(rest, ahead)))  # now, and not at the first next() of the generator

    def results() -> Iterator[Any]:
        while waiting:
            result = waiting.popleft().result()
            # Before the yield, so that the next call runs while the caller works on this result.
            waiting.extend(map(submit, islice(rest, 1)))
            yield result

    return results()


def as_they_end(
    submit: Callable[[T], Future[R]], items: Iterable[T], ahead: int, has_room: Callable[[], bool] = lambda: True
) -> Iterator[R]:
    """Yields the results of calls in the order in which they end, so that a slow one holds up no other.

    Leaving the iteration waits for calls under way.

    Args:
        submit: Function that begins the call for an item.
        items: Items, taken as calls are begun.
        ahead: Number of calls that are under way, or whose results wait to be taken.
        has_room: Function that says whether another call may begin. With none under way, one begins anyway.

    Raises:
        Exception: What a call raised, in place of its result.
    """
    rest, begun, ended = iter(items), set[Future[R]](), SimpleQueue[Future[R]]()

    def fill() -> None:
        while len(begun) < ahead and (not begun or has_room()):
            try:
                item = next(rest)
            except StopIteration:
                return
            future = submit(item)
            begun.add(future)
            future.add_done_callback(ended.put)

    try:
        fill()
        while begun:
            future = ended.get()
            begun.remove(future)
            fill()  # before the caller works on this one
            yield future.result()
    finally:
        for future in begun:
            future.cancel()
        wait(begun)
