"""Pairs as a dataset of torch, read where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from models.view import view
from pipeline.data.curation.reading import VECTORS, Pair


class ManyPairs(Protocol):
    """Pairs that are read many at once, as ``unclip.Pairs`` are."""

    def __len__(self) -> int: ...

    def __getitems__(self, places: Sequence[int]) -> list[Pair]: ...


def as_row(pair: Pair, side: int) -> dict[str, Any]:
    """Returns a pair's "caption", with a ``side`` its "image" uint8 [3, side, side], and its embeddings fp32 [d]."""
    row: dict[str, Any] = {"caption": pair.caption}
    if side:
        row["image"] = torch.tensor(view(pair.image, side)).permute(2, 0, 1)
    vectors = {name: getattr(pair, name) for name in VECTORS}
    return row | {name: torch.tensor(vector).float() for name, vector in vectors.items() if vector is not None}


class TorchPairs(Dataset[dict[str, Any]]):
    """Pairs whose rows a DataLoader stacks to batches."""

    def __init__(self, pairs: ManyPairs, side: int):
        self.pairs, self.side = pairs, side

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        return f"{self.pairs!r} for torch, {f'images of {self.side} px' if self.side else 'without images'}"

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.__getitems__([range(len(self))[place]])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        return [as_row(pair, self.side) for pair in self.pairs.__getitems__(places)]
