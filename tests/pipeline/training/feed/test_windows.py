"""Windows are read before they are needed, and batches are made ahead."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import CorruptObject
from pipeline.training.feed.feed import Window, Windows, read_ahead
from pipeline.training.feed.views import at_once


@given(lanes=st.integers(1, 9), length=st.integers(1, 20), first=st.integers(0, 40))
@settings(max_examples=50)
def test_windows_are_read_in_turn_before_they_are_needed(lanes: int, length: int, first: int) -> None:
    """Every window once; what lanes have read and not used is at most five quarters of a window each, and one."""
    read: list[tuple[int, int]] = []

    def window(lane: int, position: int) -> Window:
        start = position - position % length
        read.append((lane, start))
        return Window(start, start + length, [], {})

    own = range(3, 3 + lanes)
    pool: Any = SimpleNamespace(submit=at_once)
    windows = Windows(window, own, pool, first)
    for position in range(first, first + 3 * length):
        for lane in own:
            found = windows.at(lane, position)
            assert found.start <= position < found.stop
        assert len(set(read)) == len(read)
        used = lanes * (position + 1 - (first - first % length))
        assert len(read) * length - used <= lanes * (1.25 * length + 1) + length
    assert len(read) >= 3 * lanes


def test_a_window_that_cannot_be_read_is_told_when_it_is_needed() -> None:
    def window(lane: int, position: int) -> Window:
        if position:
            raise CorruptObject("blobs/00/00", "is missing")
        return Window(0, 2, [], {})

    with ThreadPoolExecutor(1) as pool:
        windows = Windows(window, range(1), pool, 0)
        assert windows.at(0, 0) is windows.at(0, 1)
        with pytest.raises(CorruptObject, match="blobs/00/00: is missing"):
            windows.at(0, 2)


def test_reading_ahead_passes_items_then_the_error() -> None:
    def source() -> Any:
        yield 1
        yield 2
        raise OSError("the disk is gone")

    items = read_ahead(source())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="disk is gone"):
        next(items)


def test_reading_ahead_stops_when_closed() -> None:
    made = []

    def source() -> Any:
        for i in range(1_000_000):
            made.append(i)
            yield i

    ahead = source()
    before = threading.active_count()
    items = read_ahead(ahead)
    next(items)
    items.close()
    assert len(made) <= 5
    assert ahead.gi_frame is None  # it is closed, too
    assert threading.active_count() == before
