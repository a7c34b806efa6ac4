"""Are pictures made, or remembered? Drawn pictures' distances to the nearest training picture, and real ones'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluate.figure import Figure
from pipeline.evaluate.metrics import Interval, percentiles, resample
from pipeline.evaluate.paired import paired, whole
from pipeline.evaluate.rows import HeldOut

LINE = "m"  # no claim of the table


class Nearest(NamedTuple):
    """For every row the distance to the nearest training picture, 1 - cosine, fp64 [n], and which it is, int64 [n]."""

    distance: Tensor
    place: Tensor


def nearest(pictures: Tensor, training: Tensor) -> Nearest:
    """Of embeddings [n, d] among those of training pictures [m, d]."""
    x, y = (F.normalize(z.double(), dim=1) for z in (pictures, training))
    cosine, place = (x @ y.T).max(1)
    return Nearest((1 - cosine).clamp(min=0), place)


def share_nearer(drawn: Tensor, real: Tensor, seed: int) -> tuple[float, Interval]:
    """How often a distance of ``drawn`` [n] is below one of ``real`` [n], over all pairs, ties by half (the area under
    the ROC curve), with its bootstrap interval over rows: 0.5 for equal distributions, 1 where all is copied."""
    below = (drawn[:, None] < real).double() + (drawn[:, None] == real).double() / 2
    weights = resample(len(drawn), seed)
    resampled = ((weights @ below) * weights).sum(1) / len(drawn) ** 2
    return float(below.mean()), percentiles(resampled)


def closest(distance: Tensor, count: int) -> list[int]:
    """The rows of the ``count`` smallest distances, the smallest first, earlier rows first among equal ones."""
    return torch.argsort(distance, stable=True)[:count].tolist()


def memorisation_figures(
    drawn: Mapping[str, Tensor], real: Tensor, training: Tensor, rows: HeldOut, seed: int
) -> list[Figure]:
    """For information: how near the ``drawn`` embeddings [m, d] of each model, m at least 2, lie to ``training`` [t, d]
    beside the real held-out pictures ``real`` [n, d] of the same rows, which nobody has learnt."""
    of_real, figures = nearest(real, training).distance, []
    for model, seen in drawn.items():
        ours, theirs = nearest(seen, training).distance, of_real[: len(seen)]
        part = rows.first(len(seen))
        says = "distance of drawn pictures to the nearest training picture; baseline: held-out pictures"
        figures.append(paired(LINE, model, "nearest_training", says, ours, theirs, part, seed, None))
        share, interval = share_nearer(ours, theirs, seed)
        says = "share of pairs in which the drawn picture is nearer to training than the held-out one"
        around = (interval.low - 0.5, interval.high - 0.5)
        figures.append(whole(LINE, model, "share_nearer", says, share, 0.5, part, interval=around))
    return figures
