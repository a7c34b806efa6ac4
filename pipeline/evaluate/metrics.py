"""The arithmetic of an evaluation: pure functions of tensors, in fp64."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import nan, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
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

    known = numbered(labels)
    least, best = n + 1, 0
    for shift in sorted(range(1, n), key=lambda k: abs(k - n // 2)):
        if (shared := int((known == known.roll(-shift)).sum())) < least:
            least, best = shared, shift
        if not least:
            break
    return (torch.arange(n) + best) % n


def numbered(labels: Sequence[Hashable]) -> Tensor:
    """Returns the number of each label, int64 [n]: equal ones have the same, from 0 in the order of their first."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels], dtype=torch.int64)


def standard_error(x: Tensor, groups: Tensor) -> float:
    """Returns the standard error of the mean of ``x`` [n], whose rows are independent between ``groups`` [n].

    It is the cluster-robust one (Liang and Zeger 1986), that of independent rows where each is a group of its own; nan
    for one group.
    """
    x, count = x.double().cpu(), int(groups.max()) + 1
    if count < 2:
        return nan
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, x - x.mean())
    return sqrt(count / (count - 1) * float(sums.square().sum())) / len(x)


def resample(groups: Tensor, seed: int) -> Tensor:
    """Returns how often each row is in each bootstrap sample, which draws whole ``groups`` [n]: fp64 [RESAMPLES, n].

    Rows of one group, such as the two styles of an emoji, are alike: drawn one by one they would count as more than is
    known (Davison and Hinkley 1997, section 3.8). Groups have the numbers of ``numbered``; of unequal ones samples have
    unequal sizes.
    """
    count = int(groups.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    times = torch.zeros(RESAMPLES, count, dtype=torch.float64)
    return times.scatter_add_(1, drawn, torch.ones_like(drawn).double())[:, groups]


def percentiles(values: Tensor) -> Interval:
    """Returns the middle 95% of ``values`` [m]."""
    low, high = torch.quantile(values.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(low, high)


def bootstrap(x: Tensor, groups: Tensor, seed: int) -> Interval:
    """Returns the percentile bootstrap interval of the mean of ``x`` [n] over ``groups`` [n] (Efron 1979)."""
    if int(groups.max()) < 1:
        return Interval(nan, nan)
    weights = resample(groups, seed)
    return percentiles(weights @ x.double().cpu() / weights.sum(1))


def total_variance(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the trace of the unbiased covariance of rows [n, d].

    With ``weights`` [m, n], how often each row counts, it is [m], else [].
    """
    x = x.double()
    weights = torch.ones(1, len(x), dtype=torch.float64) if weights is None else weights
    n = weights.sum(1)
    mean = weights @ x / n[:, None]
    variance = (weights @ x.square().sum(1) - n * mean.square().sum(1)) / (n - 1)
    return variance[0] if len(variance) == 1 else variance


def variance_ratio(samples: Tensor, data: Tensor, groups: Tensor, seed: int) -> tuple[float, Interval]:
    """Returns the total variance of ``samples`` [k, n, d], one a row and averaged over k, over that of ``data`` [n, d].

    With a bootstrap interval over ``groups`` [n].
    """

    def ratio(weights: Tensor | None) -> Tensor:
        return torch.stack([total_variance(s, weights) for s in samples]).mean(0) / total_variance(data, weights)

    return float(ratio(None)), percentiles(ratio(resample(groups, seed)))


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


def u_statistic(terms: Tensor, groups: Tensor) -> tuple[float, float]:
    """Returns the mean of symmetric ``terms`` [n, n] over i != j, and its standard error.

    That is the jackknife's, which leaves out one of ``groups`` [n] at a time; nan where fewer than two rows are left.
    """
    n = len(terms)
    total = terms.sum()
    value = float(total / (n * (n - 1)))
    member = F.one_hot(groups).double()
    rest = n - member.sum(0)
    if len(rest) < 2 or int(rest.min()) < 2:
        return value, nan
    ours = terms @ member
    left_out = (total - 2 * ours.sum(0) + (member * ours).sum(0)) / (rest * (rest - 1))
    g = len(rest)
    return value, float(((g - 1) / g * (left_out - left_out.mean()).square().sum()).sqrt())


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Returns cosines of rows [..., d]: fp64 [...]."""
    return F.cosine_similarity(x.double(), y.double(), dim=-1)


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
