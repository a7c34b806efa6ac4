"""Two views of a batch's random numbers: without dropped conditions, and of a part of its rows."""

from __future__ import annotations

from torch import Tensor

from models.draw import Draw


class Undropped(Draw):
    """A draw that drops no condition: validation asks how good the conditional model is."""

    def keep(self, purpose: str, drop: float) -> Tensor:
        """Booleans, [rows]: all True."""
        return super().keep(purpose, 0.0)


class Part(Draw):
    """Rows [start, stop) of another draw: a micro-batch gets the numbers that it has in the whole batch."""

    def __init__(self, draw: Draw, start: int, stop: int):
        first, streams, skipped = 0, [], 0
        for seed, rows in draw.streams:
            if first + rows <= start:
                skipped += rows
            elif first < stop:
                streams.append((seed, rows))
            first += rows
        super().__init__(streams, draw.device)
        self.cut = slice(start - skipped, stop - skipped)
        self.rows = stop - start

    def normal(self, purpose: str, *shape: int) -> Tensor:
        return super().normal(purpose, *shape)[self.cut]

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        return super().uniform(purpose, *shape)[self.cut]

    def integers(self, purpose: str, high: int, *shape: int) -> Tensor:
        return super().integers(purpose, high, *shape)[self.cut]
