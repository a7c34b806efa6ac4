"""Are images made, or remembered? Drawn images' distances to the nearest training image, and real ones'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluate.figure import Figure
from pipeline.evaluate.metrics import Interval, numbered, percentiles, resample
from pipeline.evaluate.paired import paired, whole
from pipeline.evaluate.rows import HeldOut
from pipeline.evaluate.statistics import BLOCK

LINE = "m"  # no claim of the table


class Nearest(NamedTuple):
    """For every row the distance to the nearest training image, 1 - cosine, fp64 [n], and which it is, int64 [n]."""

    distance: Tensor
    place: Tensor


def nearest(images: Tensor, training: Tensor) -> Nearest:
    """Returns the nearest training image, of embeddings [m, d], for each of ``images`` [n, d]."""
    x, y = (F.normalize(z.double(), dim=1) for z in (images, training))
    cosine, place = (x @ y.T).max(1)
    return Nearest((1 - cosine).clamp(min=0), place)


def share_nearer(drawn: Tensor, real: Tensor, groups: Tensor, seed: int) -> tuple[float, Interval]:
    """Returns how often a distance of ``drawn`` [n] is below one of ``real`` [n], with a bootstrap interval.

    The interval is over ``groups`` [n]. All pairs count, ties by half (the area under the ROC curve): 0.5 for equal
    distributions, 1 where all is copied.
    """
    weights, pairs = resample(groups, seed), len(drawn) ** 2
    total, resampled = 0.0, torch.zeros(len(weights), dtype=torch.float64)
    for part, counted in zip(real.split(BLOCK), weights.split(BLOCK, 1), strict=True):
        below = (drawn[:, None] < part).double() + (drawn[:, None] == part).double() / 2
        total += float(below.sum())
        resampled += ((weights @ below) * counted).sum(1)
    return total / pairs, percentiles(resampled / weights.sum(1).square())


def closest(distance: Tensor, count: int) -> list[int]:
    """Returns the rows of the ``count`` smallest distances, the smallest first, earlier rows first among equal ones."""
    return torch.argsort(distance, stable=True)[:count].tolist()


def memorisation_figures(
    drawn: Mapping[str, Tensor], real: Tensor, training: Tensor, rows: HeldOut, seed: int
) -> list[Figure]:
    """Returns, for information, figures of how near drawn images lie to training images, beside held-out ones.

    Args:
        drawn: Embeddings [m, d] by model, m at least 2.
        real: Embeddings [n, d] of the real images of the same rows, on which no model was trained.
        training: Embeddings [t, d] of training images.
        rows: The held-out rows.
        seed: Of the bootstrap.
    """
    of_real, figures = nearest(real, training).distance, []
    for model, seen in drawn.items():
        ours, theirs = nearest(seen, training).distance, of_real[: len(seen)]
        part = rows.first(len(seen))
        says = "distance of drawn images to the nearest training image; baseline: held-out images"
        figures.append(paired(LINE, model, "nearest_training", says, ours, theirs, part, seed, None))
        share, interval = share_nearer(ours, theirs, numbered(part.groups), seed)
        says = "share of pairs in which the drawn image is nearer to training than the held-out one"
        around = (interval.low - 0.5, interval.high - 0.5)
        figures.append(whole(LINE, model, "share_nearer", says, share, 0.5, part, interval=around))
    return figures
