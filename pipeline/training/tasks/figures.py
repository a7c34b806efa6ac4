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


def by_timestep(losses: Tensor, draws: Sequence[Draw], steps: int) -> dict[str, float]:
    """The mean of ``losses`` [rows] of each quarter of the timesteps, "loss_quarter_1" having the least noise.

    ``draws`` are those that the losses were computed with, batch after batch. A quarter that no row fell into has none.
    """
    quarters = torch.cat([draw.integers("t", steps) for draw in draws]) * 4 // steps
    found = {int(quarter) for quarter in quarters.unique()}
    return {f"loss_quarter_{i + 1}": float(losses[quarters == i].mean()) for i in sorted(found)}


def conditional_figures(
    loss: Callable[[Batch, Draw], Losses], examples: Examples, conditions: Sequence[str], steps: int | None = None
) -> dict[str, float]:
    """The mean "loss", also by timestep where a model has ``steps``, and what it costs to give every row its
    neighbour's ``conditions``.

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
    figures = {"loss": float(torch.cat(true).mean())}
    if steps is not None:
        figures |= by_timestep(torch.cat(true), [draw for _, draw in examples], steps)
    return figures | {"condition_gap": float(rise.mean()), "condition_gap_error": error}


def grid(*rows: Tensor) -> Tensor:
    """Rows of pictures, uint8 [n, 3, s, s] each, as one picture uint8 [3, h, w], one row below the other."""
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
