"""SplitRows that are made up, for figures whose right answer is known."""

import torch
from torch import Tensor

from pipeline.evaluate.metrics import derangement
from pipeline.evaluate.rows import SplitRows


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(n: int, groups: int = 0, **batch: Tensor) -> SplitRows:
    """Returns n rows, each a group of its own or, with ``groups``, in so many groups of neighbours."""
    names = [f"{i}" for i in range(n)]
    of = [f"group {i * groups // n}" for i in range(n)] if groups else names
    captions = [f"caption {name}" for name in names]
    return SplitRows("test", names, [""] * n, of, captions, [None] * n, batch, derangement(captions))
