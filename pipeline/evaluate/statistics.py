"""The arithmetic of an evaluation: pure functions of tensors, in fp64."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import nan
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RESAMPLES = 1000  # of the bootstrap
TIE = 1e-9  # cosines of equal rows differ by rounding


class Interval(NamedTuple):
    """Holds a 95% interval; ``by_rows`` if rows were resampled, as all are of one group."""

    low: float
    high: float
    by_rows: bool = False


def interval(x: Tensor, groups: Sequence[Hashable], seed: int) -> Interval:
    """Returns the percentile bootstrap interval of the mean of ``x`` [n] (Efron 1979); nan for fewer than two rows.

    It is a cluster bootstrap (Davison and Hinkley 1997, section 3.8): whole ``groups`` are resampled.
    """
    if len(x) < 2:
        return Interval(nan, nan)
    # Rows of one group, such as drawings of one pair of parts, are alike: resampled one by one they would give too
    # narrow an interval. A single group would give none at all, so then rows are resampled, and the interval says so.
    numbers = numbered(groups)
    by_rows = int(numbers.max()) == 0
    if by_rows:
        numbers = torch.arange(len(x))
    count = int(numbers.max()) + 1
    sums = torch.zeros(2, count, dtype=torch.float64)
    sums.index_add_(1, numbers, torch.stack([x.double().cpu(), torch.ones(len(x), dtype=torch.float64)]))
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    total, rows = sums[:, drawn].sum(2)
    low, high = torch.quantile(total / rows, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(low, high, by_rows)


def numbered(labels: Sequence[Hashable]) -> Tensor:
    """Returns a number for each label, int64 [n], from 0 in order of first occurrence; equal labels share one."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels], dtype=torch.int64)


def derangement(labels: Sequence[Hashable]) -> Tensor:
    """Returns another row for every row, int64 [n]: a roll by about half the rows, never the row itself.

    Of the rolls that pair the fewest rows of equal ``labels`` it is the one nearest to half. Raises ValueError on fewer
    than two rows.
    """
    n = len(labels)
    if n < 2:
        raise ValueError(f"{n} rows are too few: each needs another one to be paired with")
    # Rows of equal captions would have no gap between them.
    known = numbered(labels)
    least, best = n + 1, 0
    for shift in sorted(range(1, n), key=lambda k: abs(k - n // 2)):
        if (shared := int((known == known.roll(-shift)).sum())) < least:
            least, best = shared, shift
        if not least:
            break
    return (torch.arange(n) + best) % n


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Returns cosines of rows [..., d]: fp64 [...]."""
    return F.cosine_similarity(x.double(), y.double(), dim=-1)


def ranks(queries: Tensor, gallery: Tensor) -> Tensor:
    """Returns the rank of row i of ``gallery`` [m, d] by falling cosine to query i of [n, d]: fp64 [n], 1 to m.

    Ties share the mean of their ranks.
    """
    # Or a prior whose samples are all alike would find every row first.
    x, y = (F.normalize(z.double(), dim=1) for z in (queries, gallery))
    scores = x @ y.T
    mine = scores.diagonal()[:, None]
    nearer, equal = scores > mine + TIE, (scores - mine).abs() <= TIE
    return nearer.sum(1).double() + (equal.sum(1).double() + 1) / 2
