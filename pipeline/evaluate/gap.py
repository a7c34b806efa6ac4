"""What it costs a model to be given another row's condition: 0 for one that ignores it, however low its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.draw import Draw, derive_seed
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.metrics import numbered, standard_error
from pipeline.evaluate.paired import whole
from pipeline.evaluate.rows import HeldOut
from pipeline.training.task import Batch

ERRORS = 3.0  # standard errors above zero that a rise must be
BATCH = 32
Loss = Callable[[Batch, Draw], Tensor]


class Rise(NamedTuple):
    """Losses of each row, fp64 [n]: with its own condition, and with another row's."""

    own: Tensor
    other: Tensor


def rise(
    loss: Loss,
    batch: Batch,
    conditions: Sequence[str],
    other: Tensor,
    seed: int,
    draws: int = 1,
    prepare: Callable[[Batch, Draw], Batch] = lambda batch, draw: batch,
) -> Rise:
    """Returns ``loss`` of the rows of ``batch`` with their own ``conditions``, and with those of rows ``other`` [n].

    Noise and timesteps are the same on both sides, and every row has numbers of its own; the mean over
    ``draws`` draws. ``prepare`` adds columns that depend on a draw, which may be conditions.
    """
    n = len(other)
    totals = torch.zeros(2, n, dtype=torch.float64)
    parts = [slice(start, min(start + BATCH, n)) for start in range(0, n, BATCH)]
    for number in range(draws):
        numbers = [
            Draw([(derive_seed(seed, "gap", number, i), 1) for i in range(n)[part]], other.device) for part in parts
        ]
        own = [
            prepare({name: column[part] for name, column in batch.items()}, draw)
            for part, draw in zip(parts, numbers, strict=True)
        ]
        swapped = {name: torch.cat([part[name] for part in own])[other] for name in conditions}
        for part, draw, mine in zip(parts, numbers, own, strict=True):
            theirs = mine | {name: column[part] for name, column in swapped.items()}
            totals[0, part] += loss(mine, draw).double().cpu() / draws
            totals[1, part] += loss(theirs, draw).double().cpu() / draws
    return Rise(totals[0], totals[1])


def gap_figure(model: str, condition: str, rows: HeldOut, found: Rise) -> Figure:
    """Returns line (a): holds if the mean rise is above three standard errors."""
    difference = found.other - found.own
    mean, error = float(difference.mean()), standard_error(difference, numbered(rows.groups))
    says = f"loss with another row's {condition}, above the loss with its own"
    values = float(found.other.mean()), float(found.own.mean())
    holds = mean > ERRORS * error
    return whole("a", model, "condition_gap", says, *values, rows, difference=mean, error=error, holds=holds)
