"""The arithmetic of an evaluation: pure functions of tensors, in fp64."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import nan, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 1000


class Interval(NamedTuple):
    """A 95% interval; nan where there are too few rows for one."""

    low: float
    high: float


def derangement(labels: Sequence[Hashable]) -> Tensor:
    """Returns another row for every row, int64 [n]: a roll by about half the rows, never the row itself.

    Of all rolls it is one that pairs the fewest rows of equal ``labels``, the nearest to half. Raises ValueError on
    fewer than two rows.
    """
    n = len(labels)
    if n < 2:
        raise ValueError(f"{n} rows have no other row among them")

    numbers: dict[Hashable, int] = {}
    numbered = torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels])
    least, best = n + 1, 0
    for shift in sorted(range(1, n), key=lambda k: abs(k - n // 2)):
        if (shared := int((numbered == numbered.roll(-shift)).sum())) < least:
            least, best = shared, shift
        if not least:
            break
    return (torch.arange(n) + best) % n


def standard_error(x: Tensor) -> float:
    """Returns the standard error of the mean of ``x`` [n]; nan for one row."""
    return float(x.double().std()) / sqrt(len(x)) if len(x) > 1 else nan


def resample(n: int, seed: int) -> Tensor:
    """Returns how often each of ``n`` rows is in each bootstrap sample: fp64 [RESAMPLES, n], rows that sum to n."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
    return torch.zeros(RESAMPLES, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def percentiles(values: Tensor) -> Interval:
    """Returns the middle 95% of ``values`` [m]."""
    low, high = torch.quantile(values.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(low, high)


def bootstrap(x: Tensor, seed: int) -> Interval:
    """Returns the percentile bootstrap interval of the mean of ``x`` [n] over rows (Efron 1979)."""
    if len(x) < 2:
        return Interval(nan, nan)
    return percentiles(resample(len(x), seed) @ x.double().cpu() / len(x))


def total_variance(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the trace of the unbiased covariance of rows [n, d].

    With ``weights`` [m, n], each of which sums to n, it is [m], else [].
    """
    x = x.double()
    n = len(x)
    weights = torch.ones(1, n, dtype=torch.float64) if weights is None else weights
    mean = weights @ x / n
    variance = (weights @ x.square().sum(1) - n * mean.square().sum(1)) / (n - 1)
    return variance[0] if len(variance) == 1 else variance


def variance_ratio(samples: Tensor, data: Tensor, seed: int) -> tuple[float, Interval]:
    """Returns the total variance of ``samples`` [k, n, d], one a row and averaged over k, over that of ``data`` [n, d].

    With a bootstrap interval over rows.
    """

    def ratio(weights: Tensor | None) -> Tensor:
        return torch.stack([total_variance(s, weights) for s in samples]).mean(0) / total_variance(data, weights)

    return float(ratio(None)), percentiles(ratio(resample(len(data), seed)))


def median_distance(x: Tensor) -> float:
    """Returns the median distance between two different rows of [n, d]: the usual bandwidth of a kernel."""
    return float(torch.pdist(x.double()).median())


def mmd_terms(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """Returns h(i, j) of the unbiased squared MMD between pairs (x_i, y_i), [n, d] each, as fp64 [n, n], 0 at i = j.

    k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i) with an RBF kernel (Gretton et al. 2012, equation 4). x_i and
    y_i belong to one caption, so the cross terms leave i = j out as the others do.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * bandwidth**2))

    x, y = x.double(), y.double()
    cross = kernel(x, y)
    return (kernel(x, x) + kernel(y, y) - cross - cross.T).fill_diagonal_(0)


def u_statistic(terms: Tensor) -> tuple[float, float]:
    """Returns the mean of symmetric ``terms`` [n, n] over i != j, and its jackknife standard error over rows."""
    n = len(terms)
    total = terms.sum()
    value = float(total / (n * (n - 1)))
    if n < 3:
        return value, nan
    left_out = (total - 2 * terms.sum(1)) / ((n - 1) * (n - 2))
    return value, float(((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt())


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Returns cosines of rows [..., d]: fp64 [...]."""
    return torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)


def bucket_counts(codes: Tensor, buckets: int) -> Tensor:
    """Returns how often each bucket occurs at each position of ``codes`` int64 [n, k]: fp64 [k, buckets]."""
    counts = torch.zeros(codes.shape[1], buckets, dtype=torch.float64, device=codes.device)
    return counts.scatter_add_(1, codes.T, torch.ones_like(codes.T, dtype=torch.float64))


def marginal_nats(codes: Tensor, counts: Tensor) -> Tensor:
    """Returns -log of each code's share in ``counts`` [k, buckets] at its position: fp64 [n, k] for codes int64 [n, k].

    A bucket that no row fell into counts as 1 / buckets of a row, so that what it costs stays finite.
    """
    buckets = counts.shape[1]
    shares = counts.clamp(min=1 / buckets) / counts.sum(1, keepdim=True)
    return -shares.log().gather(1, codes.T).T
