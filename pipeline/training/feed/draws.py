"""Makes the random numbers of a training beside it: a loss finds those ready that the losses before it drew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from models.random_streams import RandomStreams, StreamsSlice

StreamCall = tuple[str, tuple[int | str, ...]]
"""A method of RandomStreams and its arguments."""
Numbers = Mapping[StreamCall, Tensor]


def make_numbers(streams: Sequence[tuple[int, int]], asked: Iterable[StreamCall]) -> dict[StreamCall, Tensor]:
    """Returns what these calls of RandomStreams of these streams return, on the CPU."""
    rng = RandomStreams(streams)
    return {call: getattr(rng, call[0])(*call[1]) for call in asked}


class PrecomputedStreams(RandomStreams):
    """Rows [start, stop) of the streams of a batch, some of whose numbers were made before.

    Others are made when a loss draws them, and the calls are added to ``asked``, so that a feed makes them from then
    on. The numbers are the same either way.

    Args:
        part: Streams of these rows.
        numbers: Numbers of the whole batch that were made before, on the CPU.
        asked: Calls that had to be made here.
    """

    def __init__(self, part: StreamsSlice, start: int, stop: int, numbers: Numbers, asked: set[StreamCall]):
        super().__init__(part.streams, part.device)
        self.part, self.place, self.numbers, self.asked = part, slice(start, stop), numbers, asked
        self.rows = part.rows

    def on(self, device: torch.device | str) -> Self:
        other = super().on(device)
        other.part = self.part.on(device)
        return other

    def normal(self, purpose: str, *shape: int) -> Tensor:
        return self._take("normal", purpose, *shape)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        return self._take("uniform", purpose, *shape)

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        return self._take("integers", purpose, high, *shape)

    def _take(self, kind: str, *arguments: int | str) -> Tensor:
        found = self.numbers.get((kind, arguments))
        if found is None:
            self.asked.add((kind, arguments))
            return getattr(self.part, kind)(*arguments)
        return found[self.place].to(self.device, non_blocking=True)


def use_one_thread() -> None:
    """Computes on one thread in the thread that calls it, and in no other.

    A feed has threads of its own, and OpenMP would give each of them a team as large as the training's.
    """
    torch.get_num_threads()  # sets the number of a new thread, which would undo the next line later
    threadpool_limits(1, user_api="openmp")
