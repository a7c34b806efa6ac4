"""Makes the random numbers of a training beside it: a loss finds those ready that the losses before it drew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from models.draw import Draw, Part

DrawCall = tuple[str, tuple[int | str, ...]]
"""A method of Draw and its arguments."""
Numbers = Mapping[DrawCall, Tensor]


def make_numbers(streams: Sequence[tuple[int, int]], asked: Iterable[DrawCall]) -> dict[DrawCall, Tensor]:
    """Returns what these calls of a Draw of these streams return, on the CPU."""
    draw = Draw(streams)
    return {call: getattr(draw, call[0])(*call[1]) for call in asked}


class ReadyDraw(Draw):
    """Rows [start, stop) of the draw of a batch, some of whose numbers were made before.

    Others are made when a loss draws them, and the calls are added to ``asked``, so that a feed makes them from then
    on. The numbers are the same either way.

    Args:
        part: Draw of these rows.
        numbers: Numbers of the whole batch that were made before, on the CPU.
        asked: Calls that had to be made here.
    """

    def __init__(self, part: Part, start: int, stop: int, numbers: Numbers, asked: set[DrawCall]):
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
