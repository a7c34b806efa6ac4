"""Which rows a step trains on: a pure function of counts, lanes, window, seed and position.

An epoch's rows, shard after shard in an order drawn for that epoch, form one virtual line. The line is cut into lanes
(data streams) of equal length, a lane into windows, and rows are shuffled inside their window, so that a reader needs
neighbours and not an index of all rows. A step takes as many rows of each lane, lane after lane, and workers cut its
batch into even shares. Lanes belong to the recipe, so the order does not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from models.random_streams import derive_seed


def permutation(length: int, seed: int) -> np.ndarray:
    """Returns a permutation of range(length), int64."""
    # Raw words of the generator, sorted, are the same in every version of numpy.
    return np.argsort(np.random.PCG64(seed).random_raw(length), kind="stable")


def share_of(rank: int, size: int, batch: int) -> range:
    """Returns the rows of a batch that worker ``rank`` of ``size`` trains on. Shares differ by one row at most."""
    return range(rank * batch // size, (rank + 1) * batch // size)


def cut_by_lane(share: range, per_lane: int) -> dict[int, range]:
    """Returns a share by its lanes, of each of which it has some of the ``per_lane`` rows of a step.

    A worker shares its first and its last lane with its neighbours where shares end within them.
    """
    lanes = range(share.start // per_lane, -(-share.stop // per_lane))
    return {
        lane: range(max(share.start - lane * per_lane, 0), min(share.stop - lane * per_lane, per_lane))
        for lane in lanes
    }


class Order:
    """Puts rows in order, epoch after epoch. Lane positions count the rows of a lane since the first epoch.

    A lane has ceil(rows / lanes) positions an epoch. Positions beyond the end of the line wrap to its beginning;
    ``wrapped`` counts them.

    Args:
        counts: Rows of each shard.
        lanes: Number of lanes.
        window: Rows that are shuffled with each other.
        seed: Decides the order of shards and of rows.

    Raises:
        ValueError: ``counts`` has no rows.
    """

    def __init__(self, counts: Sequence[int], lanes: int, window: int, seed: int):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.lanes, self.window, self.seed = lanes, window, seed
        self.total = int(self.counts.sum())
        if self.total == 0:
            raise ValueError("no rows to put in order")
        self.lane_rows = -(-self.total // lanes)
        self.wrapped = self.lane_rows * lanes - self.total
        # Two: rows that are read ahead may be of the next epoch already.
        self._line = lru_cache(maxsize=2)(self._make_line)

    def _make_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the shards in the order of ``epoch``, and where on the line each of them ends."""
        shards = permutation(len(self.counts), derive_seed(self.seed, "shards", epoch))
        return shards, np.cumsum(self.counts[shards])

    def window_at(self, lane_position: int) -> tuple[int, int]:
        """Returns start and stop, in lane positions, of the window that holds a lane position."""
        epoch, offset = divmod(lane_position, self.lane_rows)
        start = offset - offset % self.window
        return epoch * self.lane_rows + start, epoch * self.lane_rows + min(start + self.window, self.lane_rows)

    def rows(self, lane: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Returns a lane's rows at lane positions [start, stop), each as (index into counts, row of that shard)."""
        result: list[tuple[int, int]] = []
        while start < stop:
            first, last = self.window_at(start)
            end = min(stop, last)
            result += self._window(lane, first, last)[start - first : end - first]
            start = end
        return result

    def _window(self, lane: int, first: int, last: int) -> list[tuple[int, int]]:
        epoch, offset = divmod(first, self.lane_rows)
        seed = derive_seed(self.seed, "window", epoch, lane, offset // self.window)
        positions = (lane * self.lane_rows + offset + permutation(last - first, seed)) % self.total
        shards, ends = self._line(epoch)
        found = np.searchsorted(ends, positions, side="right")
        rows = positions - ends[found] + self.counts[shards[found]]
        return list(zip(shards[found].tolist(), rows.tolist(), strict=True))
