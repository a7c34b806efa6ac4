"""Random numbers by row: the same for any number of workers, micro-batches and devices."""

import hashlib
from collections.abc import Callable, Sequence
from copy import copy
from operator import index
from typing import Self, SupportsIndex

import torch
from torch import Tensor


def derive_seed(*parts: str | SupportsIndex) -> int:
    """Returns a 63-bit seed that depends on every part, a text or a whole number, in order, and on nothing else.

    Raises TypeError for another number: 7 in a tensor is 7, and 7.0 is none.
    """
    # Not hash(): Python salts it differently in each process.
    texts = (part if isinstance(part, str) else str(index(part)) for part in parts)
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits fit a signed 64-bit integer


def check_seeds(seeds: Sequence[SupportsIndex]) -> None:
    """Raises TypeError for a seed that is not a whole number, ValueError for one below 0."""
    for seed in seeds:
        try:
            number = index(seed)
        except TypeError:
            raise TypeError(f"a seed is {seed!r}: use a whole number, 0 or more") from None
        if number < 0:
            raise ValueError(f"a seed is {number}: use a whole number, 0 or more")


class RandomStreams:
    """Random numbers of one batch, with the methods of ``numpy.random.Generator`` and a leading dimension of rows.

    ``streams`` is a list of (seed, rows): the batch is the concatenation of these blocks, and every block has a
    ``torch.Generator`` of its own for each purpose. A block therefore gets the same numbers whichever worker holds it
    and whatever else is in the batch.
    """

    def __init__(self, streams: Sequence[tuple[int, int]], device: torch.device | str = "cpu"):
        self.streams = tuple(streams)
        self.rows = sum(rows for _, rows in self.streams)
        self.device = torch.device(device)
        self.cut = slice(None)

    def on(self, device: torch.device | str) -> Self:
        """Returns the same streams, whose numbers are on another device."""
        other = copy(self)
        other.device = torch.device(device)
        return other

    def _made(self, purpose: str, make: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        # On the CPU and then moved: each device has another generator, and images would depend on where they are drawn.
        blocks = [make(rows, torch.Generator().manual_seed(derive_seed(seed, purpose))) for seed, rows in self.streams]
        return sent(torch.cat(blocks)[self.cut], self.device)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Returns standard normal numbers, [rows, *shape], fp32."""
        return self._made(purpose, lambda rows, generator: torch.randn(rows, *shape, generator=generator))

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Returns numbers in [0, 1), [rows, *shape], fp32."""
        return self._made(purpose, lambda rows, generator: torch.rand(rows, *shape, generator=generator))

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        """Returns integers in [0, high), [rows, *shape], int64."""
        return self._made(purpose, lambda rows, generator: torch.randint(high, (rows, *shape), generator=generator))

    def keep(self, purpose: str, drop: float) -> Tensor:
        """Returns booleans, [rows]: False with probability ``drop``."""
        return self.uniform(purpose) >= drop


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the CPU on ``device``; the copy to a GPU is asynchronous."""
    # Only a copy from pinned memory is asynchronous.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class StreamsSlice(RandomStreams):
    """Rows [start, stop) of other streams: a micro-batch gets the numbers that it has in the whole batch."""

    def __init__(self, rng: RandomStreams, start: int, stop: int):
        first, streams, skipped = 0, [], 0
        for seed, rows in rng.streams:
            if first + rows <= start:
                skipped += rows
            elif first < stop:
                streams.append((seed, rows))
            first += rows
        super().__init__(streams, rng.device)
        self.cut = slice(start - skipped, stop - skipped)
        self.rows = stop - start
