"""The order: every row once an epoch, whatever the lanes, windows and workers."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.training.feed.order import Order, cut_by_lane, permutation, share_of

SHAPES = st.tuples(
    st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    st.integers(1, 12),
    st.integers(1, 7),
    st.integers(0, 5),
)


@settings(max_examples=200)
@given(SHAPES, st.integers(0, 3))
def test_an_epoch_gives_every_row_once_and_the_wrapped_ones_once_more(
    shape: tuple[list[int], int, int, int], epoch: int
) -> None:
    counts, lanes, window, seed = shape
    order = Order(counts, lanes, window, seed)
    n = order.lane_rows
    seen = Counter(row for lane in range(lanes) for row in order.rows(lane, epoch * n, (epoch + 1) * n))
    everything = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    assert set(seen) == everything
    assert sum(seen.values()) == order.total + order.wrapped
    assert max(seen.values()) - min(seen.values()) <= 1


@settings(max_examples=100)
@given(SHAPES, st.integers(0, 40), st.integers(0, 20), st.integers(0, 20))
def test_rows_can_be_read_in_any_pieces(
    shape: tuple[list[int], int, int, int], start: int, first: int, second: int
) -> None:
    counts, lanes, window, seed = shape
    order = Order(counts, lanes, window, seed)
    whole = order.rows(0, start, start + first + second)
    assert whole == order.rows(0, start, start + first) + order.rows(0, start + first, start + first + second)
    assert whole == Order(counts, lanes, window, seed).rows(0, start, start + first + second)


@given(lanes=st.integers(1, 20), per_lane=st.integers(1, 9), world=st.integers(1, 70))
def test_every_row_of_a_batch_has_one_worker_and_shares_differ_by_one_at_most(
    lanes: int, per_lane: int, world: int
) -> None:
    shares = [share_of(rank, world, lanes * per_lane) for rank in range(world)]
    cuts = [(lane, row) for share in shares for lane, own in cut_by_lane(share, per_lane).items() for row in own]
    assert cuts == [(lane, row) for lane in range(lanes) for row in range(per_lane)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_of_64_workers_that_is_lost_costs_little_more_than_itself() -> None:
    """A step takes as long as the largest share."""
    for batch, rate in ((32_768, 0.98), (4096, 0.969), (2048, 0.969)):
        largest = [max(len(share_of(rank, world, batch)) for rank in range(world)) for world in (64, 63)]
        assert rate < largest[0] / largest[1] < 63 / 64


def test_a_window_is_a_run_of_neighbours_in_another_order() -> None:
    order = Order([1000], lanes=2, window=50, seed=3)
    for start in (0, 50, 450, 500, 950):
        rows = [row for _, row in order.rows(1, start, start + 50)]
        assert max(rows) - min(rows) == 49
        assert rows != sorted(rows)
        assert order.window_at(start + 17) == (start, start + 50)


def test_epochs_lanes_and_seeds_shuffle_differently() -> None:
    order = Order([40, 40, 40], lanes=3, window=8, seed=0)
    first, second = order.rows(0, 0, 40), order.rows(0, 40, 80)
    assert first != second
    assert first != Order([40, 40, 40], lanes=3, window=8, seed=1).rows(0, 0, 40)
    shards = {tuple(dict.fromkeys(shard for shard, _ in order.rows(0, e * 40, e * 40 + 40))) for e in range(12)}
    assert len(shards) > 1  # shards come in another order too


def test_the_last_short_window_does_not_reach_into_the_next_epoch() -> None:
    order = Order([10], lanes=1, window=4, seed=0)
    assert [order.window_at(p) for p in (0, 3, 4, 8, 9, 10)] == [(0, 4), (0, 4), (4, 8), (8, 10), (8, 10), (10, 14)]


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        Order([0, 0], lanes=2, window=4, seed=0)


def test_a_permutation_is_pinned() -> None:
    """Its numbers are part of every trajectory, so they must never change."""
    assert permutation(8, 1).tolist() == [2, 4, 7, 5, 0, 6, 3, 1]
