"""The codec of the autoregressive prior: image embeddings to codes and back.

unCLIP section 2.2 and Algorithm 2, lines 3 to 6 and 11: PCA, components by falling variance, each coordinate put into
one of ``buckets`` quantile buckets. Fitting takes two passes over the training rows: moments, merged in any order of
batches; then the quantiles of the coordinates. All arithmetic is fp64, also under autocast (which leaves fp64 alone),
so that a coordinate falls into the same bucket whatever the batch, the device or the precision of training.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from models.draw import Draw

# A variance below this share of the mean squared norm is rounding of the moments, not data.
RANK_TOLERANCE = 1e-12
CHUNK_VALUES = 1 << 20  # that are put into buckets at once, so that this takes little memory beside the columns


class Moments(NamedTuple):
    """What PCA needs of its rows, fp64: their number, their sum [d] and the sum of their outer products [d, d]."""

    rows: int
    total: Tensor
    gram: Tensor

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows together."""
        return Moments(self.rows + other.rows, self.total + other.total, self.gram + other.gram)


def moments(batch: Tensor) -> Moments:
    """The moments of ``batch`` [n, d]."""
    z = batch.double()
    return Moments(len(z), z.sum(0), z.T @ z)


class PCA(NamedTuple):
    """Principal components, fp64: ``mean`` [d], orthonormal ``components`` [k, d] by falling ``variance`` [k].

    ``total_variance`` is that of all d dimensions; ``warning`` says that k was lowered to the rank, or is None.
    """

    mean: Tensor
    components: Tensor
    variance: Tensor
    total_variance: float
    warning: str | None


def fit_pca(rows: int, total: Tensor, gram: Tensor, k: int = 319, variance_target: float | None = None) -> PCA:
    """The first ``k`` principal components of rows with these moments.

    ``variance_target``, a share in (0, 1], replaces ``k`` by the smallest number of components that hold this share
    of the variance. A k above the rank is lowered to it, with a warning. The variance is the unbiased one (n - 1). A
    component's sign is set by its largest entry, which is positive. Raises ValueError on fewer than two different
    rows, and on a k or a target out of range.
    """
    if k < 1 or (variance_target is not None and not 0 < variance_target <= 1):
        raise ValueError(f"k is {k} and variance_target {variance_target}: use 1 or more, and a share in (0, 1]")
    if rows < 2:
        raise ValueError(f"a codec needs 2 or more embeddings, got {rows}")
    mean = total / rows
    covariance = (gram - rows * torch.outer(mean, mean)) / (rows - 1)
    variance, vectors = (x.flip(-1) for x in torch.linalg.eigh(covariance))
    rank = min(int((variance > RANK_TOLERANCE * gram.trace() / rows).sum()), rows - 1)
    if rank == 0:
        raise ValueError(f"all {rows} embeddings are equal: there is nothing to fit a codec to")
    total_variance = float(variance[:rank].sum())
    if variance_target is not None:
        share = variance[:rank].cumsum(0) / total_variance
        k = min(int((share < variance_target).sum()) + 1, rank)
    warning = f"k lowered from {k} to {rank}, the rank of {rows} embeddings" if k > rank else None
    k = min(k, rank)
    components = vectors.T[:k]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return PCA(mean, components * largest.sign(), variance[:k], total_variance, warning)


def digitize(x: Tensor, edges: Tensor) -> Tensor:
    """How many inner ``edges`` [k, buckets - 1] are at or below ``x`` [n, k], per column: int64 [n, k].

    So values outside all edges clamp to the first or last bucket. Equal to numpy.digitize column by column.
    """
    return torch.searchsorted(edges, x.T.contiguous(), right=True).T


def fit_buckets(coordinates: Tensor, buckets: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """Quantile buckets of each column of ``coordinates`` [n, k]; as ``cut_buckets``."""
    return cut_buckets(coordinates.double().T.contiguous().sort(-1).values, buckets)


def cut_buckets(ordered: Tensor, buckets: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantile buckets of columns that are sorted already, ``ordered`` fp64 [k, n].

    Returns inner edges [k, buckets - 1], the mean of every bucket [k, buckets], both fp64, and how many rows it holds,
    int64 [k, buckets]. An edge is the middle of the two neighbouring rows it parts. Defined cases: equal rows never
    part, so ties leave a bucket over-full and others empty; with fewer rows than buckets every different row has a
    bucket of its own and the rest are empty; a constant column puts all rows in its last bucket. An empty bucket
    means the middle of its two edges. Raises ValueError on fewer than 2 rows or buckets.
    """
    k, n = ordered.shape
    if n < 2 or buckets < 2:
        raise ValueError(f"quantiles need 2 or more rows and buckets, got {n} rows and {buckets} buckets")
    cuts = (torch.arange(1, buckets, device=ordered.device) * n / buckets).round().long().clamp(1, n - 1)
    edges = (ordered[:, cuts - 1] + ordered[:, cuts]) / 2
    counts = torch.zeros(k, buckets, dtype=torch.int64, device=ordered.device)
    sums = torch.zeros(k, buckets, dtype=torch.float64, device=ordered.device)
    for part in ordered.split(_rows_at_once(k), dim=1):  # each goes on where the one before has ended
        codes = torch.searchsorted(edges, part.contiguous(), right=True)
        counts.scatter_add_(1, codes, torch.ones_like(codes))
        sums.scatter_add_(1, codes, part)
    ends = torch.cat([ordered[:, :1], edges, ordered[:, -1:]], dim=1)
    values = torch.where(counts > 0, sums / counts, (ends[:, :-1] + ends[:, 1:]) / 2)
    return edges, values, counts


def bucket_errors(columns: Tensor, edges: Tensor, values: Tensor) -> Tensor:
    """The sum of squared distances of each of ``columns`` [k, n] to the values of its buckets: fp64 [k]."""
    error = torch.zeros(len(columns), dtype=torch.float64, device=columns.device)
    for part in columns.split(_rows_at_once(len(columns)), dim=1):
        codes = torch.searchsorted(edges, part.contiguous(), right=True)
        error += (part - values.gather(1, codes)).square().sum(1)
    return error


def _rows_at_once(columns: int) -> int:
    return max(1, CHUNK_VALUES // columns)


@dataclass(frozen=True)
class Codec:
    """PCA and quantile buckets of image embeddings, and of their dot products with text embeddings.

    mean [d]; components [k, d]; variance [k], explained per component; edges [k, buckets - 1], the inner ones; values
    [k, buckets], the mean of each bucket; dot_edges [buckets - 1]; dot_counts [buckets], training rows per bucket.
    fp64, but for the counts.
    """

    mean: Tensor
    components: Tensor
    variance: Tensor
    edges: Tensor
    values: Tensor
    dot_edges: Tensor
    dot_counts: Tensor

    @property
    def codes(self) -> int:
        """Codes per embedding, k."""
        return len(self.components)

    @property
    def buckets(self) -> int:
        """Buckets per code."""
        return self.values.shape[1]

    def to(self, device: torch.device | str) -> "Codec":
        """The same on another device, which must know fp64."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """What to save; ``Codec(**tensors)`` is the way back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def project(self, z: Tensor) -> Tensor:
        """PCA coordinates of embeddings [b, d]: fp64 [b, k]."""
        return (z.double() - self.mean) @ self.components.T

    def encode(self, z: Tensor) -> Tensor:
        """Codes of embeddings [b, d]: int64 [b, k] in [0, buckets). Values never seen in training clamp."""
        return digitize(self.project(z), self.edges)

    def decode(self, codes: Tensor) -> Tensor:
        """Embeddings of codes int64 [b, k]: fp32 [b, d], each code standing for the mean of its bucket.

        Not renormalised: the norm is below 1 by what PCA cut off. Normalise before use as a CLIP embedding.
        """
        coordinates = self.values.gather(1, codes.T).T
        return (self.mean + coordinates @ self.components).float()

    def encode_dot(self, s: Tensor) -> Tensor:
        """The dot-product token of s = z_i . z_t, [b]: int64 [b] in [0, buckets)."""
        return torch.searchsorted(self.dot_edges, s.double(), right=True)

    def sample_upper_dot(self, draw: Draw) -> Tensor:
        """Dot-product tokens from the upper half of their training distribution, int64 [rows] (section 2.2)."""
        cdf = self.dot_counts.cumsum(0).double() / self.dot_counts.sum()
        upper = 0.5 + 0.5 * draw.uniform("dot").double()
        return torch.searchsorted(cdf, upper.to(cdf.device), right=True)


def fit_codec(pca: PCA, coordinates: Tensor, dots: Tensor, buckets: int = 1024) -> Codec:
    """The codec of training rows: their PCA, its coordinates of them [n, k], and z_i . z_t [n] of their pairs."""
    edges, values, _ = fit_buckets(coordinates, buckets)
    dot_edges, _, dot_counts = fit_buckets(dots[:, None], buckets)
    return Codec(pca.mean, pca.components, pca.variance, edges, values, dot_edges[0], dot_counts[0])
