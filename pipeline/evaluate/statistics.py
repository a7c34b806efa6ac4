"""Distances of sets of rows, as FID and CMMD take them, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

CMMD_BANDWIDTH = 10.0  # Jayasumana et al. 2024, "Rethinking FID", and the code that came with it
CMMD_SCALE = 1000.0
BLOCK = 1024  # rows whose pairs are in memory at once


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Returns the squared Fréchet distance of the Gaussians of rows [n, d] and [m, d] (Dowson and Landau 1982).

    |m_x - m_y|² + tr(C_x + C_y - 2 (C_x C_y)^½). The last trace is the sum of the singular values of R_xᵀ R_y where
    C = R Rᵀ, which needs no root of a nearly singular matrix: with fewer rows than dimensions every C is one. With few
    rows the distance is far above 0 even between halves of one set: compare only values of equally many rows. Raises
    ValueError for fewer than two rows.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{min(len(x), len(y))} rows have no covariance")
    few = max(len(x), len(y)) < x.shape[1]
    means = [z.double().mean(0) for z in (x, y)]
    centred = [z.double() - mean for z, mean in zip((x, y), means, strict=True)]
    # Few rows are a root by themselves, and a much smaller one than that of their covariance.
    a, b = (z.T / (len(z) - 1) ** 0.5 if few else _root(z.T @ z / (len(z) - 1)) for z in centred)
    shared = torch.linalg.svdvals(a.T @ b).sum()
    apart = means[0] - means[1]
    return float(apart.square().sum() + a.square().sum() + b.square().sum() - 2 * shared)


def _root(covariance: Tensor) -> Tensor:
    """Returns R [d, r] with R Rᵀ = ``covariance``; r leaves out what rounding makes of a variance of 0."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def mean_kernel(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Returns the mean of exp(-|x_i - y_j|² / (2 bandwidth²)) over all pairs of rows [n, d] and [m, d]."""
    total = 0.0
    for a in x.double().split(BLOCK):
        for b in y.double().split(BLOCK):
            squared = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
            total += float(torch.exp(-squared / (2 * bandwidth**2)).sum())
    return total / (len(x) * len(y))


def cmmd(x: Tensor, y: Tensor) -> float:
    """Returns CMMD of CLIP embeddings of unit norm, [n, d] and [m, d] (Jayasumana et al. 2024).

    It is 1000 times the biased squared MMD (Gretton et al. 2012, equation 5) of an RBF kernel of bandwidth 10.
    """
    xx, yy, xy = (mean_kernel(a, b, CMMD_BANDWIDTH) for a, b in ((x, x), (y, y), (x, y)))
    return CMMD_SCALE * (xx + yy - 2 * xy)
