"""What a set of rows is summed up in, so that parts of it can be merged: in fp64, and never a mean of means.

Whatever the parts and the order in which they are merged, the whole set's values come out, but for rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CMMD_BANDWIDTH = 10.0  # Jayasumana et al. 2024, "Rethinking FID", and the code that came with it
CMMD_SCALE = 1000.0
BLOCK = 1024  # rows whose pairs are in memory at once


class Gaussian(NamedTuple):
    """Holds the number of rows, their ``mean`` [d] and ``scatter`` [d, d], the sum of outer products about the mean."""

    rows: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """Returns the unbiased covariance [d, d]. Raises ValueError for fewer than two rows."""
        if self.rows < 2:
            raise ValueError(f"{self.rows} rows have no covariance")
        return self.scatter / (self.rows - 1)


def gaussian(x: Tensor) -> Gaussian:
    """Returns the Gaussian of rows [n, d], n at least 1."""
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    return Gaussian(len(x), mean, centred.T @ centred)


def merge(a: Gaussian, b: Gaussian) -> Gaussian:
    """Returns the Gaussian of the rows of both (Chan, Golub and LeVeque 1979)."""
    rows = a.rows + b.rows
    apart = b.mean - a.mean
    scatter = a.scatter + b.scatter + torch.outer(apart, apart) * (a.rows * b.rows / rows)
    return Gaussian(rows, a.mean + apart * (b.rows / rows), scatter)


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Returns the squared Fréchet distance of two Gaussians (Dowson and Landau 1982), as FID takes it.

    |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½). The last trace is the sum of the singular values of R_aᵀ R_b where
    C = R Rᵀ, which needs no root of a nearly singular matrix: with fewer rows than dimensions every C is one. With few
    rows the distance is far above 0 even between halves of one set: compare only values of equally many rows.
    """
    return _between(a.mean - b.mean, _root(a.covariance), _root(b.covariance))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Returns the Fréchet distance of the Gaussians of rows [n, d] and [m, d], n and m at least 2.

    It is much faster where both are below d.
    """
    if max(len(x), len(y)) >= x.shape[1]:
        return frechet(gaussian(x), gaussian(y))
    means = [z.double().mean(0) for z in (x, y)]
    roots = [(z.double() - mean).T / (len(z) - 1) ** 0.5 for z, mean in zip((x, y), means, strict=True)]
    return _between(means[0] - means[1], *roots)


def _between(apart: Tensor, a: Tensor, b: Tensor) -> float:
    """Returns the distance of Gaussians, from the gap of their means [d] and roots [d, r] of their covariances."""
    shared = torch.linalg.svdvals(a.T @ b).sum()
    return float(apart.square().sum() + a.square().sum() + b.square().sum() - 2 * shared)


def _root(covariance: Tensor) -> Tensor:
    """Returns R [d, r] with R Rᵀ = ``covariance``; r leaves out what rounding makes of a variance of 0."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


class PairSum(NamedTuple):
    """Holds the sum of a kernel over pairs of rows, and their number."""

    total: float
    pairs: int

    def merge(self, other: PairSum) -> PairSum:
        """Returns the sum over the pairs of both."""
        return PairSum(self.total + other.total, self.pairs + other.pairs)

    @property
    def mean(self) -> float:
        return self.total / self.pairs


def kernel_sum(x: Tensor, y: Tensor, bandwidth: float) -> PairSum:
    """Returns exp(-|x_i - y_j|² / (2 bandwidth²)) over all pairs of rows [n, d] and [m, d], block by block."""
    found = PairSum(0.0, 0)
    for a in x.double().split(BLOCK):
        for b in y.double().split(BLOCK):
            squared = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
            found = found.merge(PairSum(float(torch.exp(-squared / (2 * bandwidth**2)).sum()), len(a) * len(b)))
    return found


def squared_mmd(xx: PairSum, yy: PairSum, xy: PairSum) -> float:
    """Returns the biased squared MMD (Gretton et al. 2012, equation 5).

    ``xx`` and ``yy`` are the sums over a set's own pairs, each row with itself too, ``xy`` over the pairs of both sets.
    """
    return xx.mean + yy.mean - 2 * xy.mean


def cmmd(x: Tensor, y: Tensor) -> float:
    """Returns CMMD of CLIP embeddings of unit norm, [n, d] and [m, d] (Jayasumana et al. 2024).

    It is 1000 times the biased squared MMD of an RBF kernel of bandwidth 10.
    """
    sums = (kernel_sum(a, b, CMMD_BANDWIDTH) for a, b in ((x, x), (y, y), (x, y)))
    return CMMD_SCALE * squared_mmd(*sums)
