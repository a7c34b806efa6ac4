"""Validation figures and pictures that several tasks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from models.draw import Draw
from models.losses import Losses
from pipeline.training.task import Batch, Examples


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """``make()`` with random weights that depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def conditional_figures(
    loss: Callable[[Batch, Draw], Losses], examples: Examples, conditions: Sequence[str]
) -> dict[str, float]:
    """The mean "loss", and what it costs to give every row its neighbour's ``conditions``.

    "condition_gap" is the mean rise of the loss, "condition_gap_error" its standard error. A model that ignores its
    conditions has a gap of 0 however low its loss. Noise and timesteps are the same on both sides.
    """
    true, wrong = [], []
    for batch, draw in examples:
        shifted = batch | {name: batch[name].roll(1, 0) for name in conditions}
        true.append(loss(batch, draw).total)
        wrong.append(loss(shifted, draw).total)
    rise = torch.cat(wrong) - torch.cat(true)
    error = float(rise.std()) / sqrt(len(rise)) if len(rise) > 1 else 0.0
    return {"loss": float(torch.cat(true).mean()), "condition_gap": float(rise.mean()), "condition_gap_error": error}


def grid(*rows: Tensor) -> Tensor:
    """Rows of pictures, uint8 [n, 3, s, s] each, as one picture uint8 [3, h, w], one row below the other."""
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
