"""Fits the codec of the autoregressive prior to training rows, with scikit-learn's PCA and quantiles.

The rows lie in memory as fp64, 8 bytes a value; coordinates are made a few components at a time. The same rows in the
same order give the same bits for one number of BLAS threads.
"""

from typing import NamedTuple

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import QuantileTransformer
from torch import Tensor

from models.codec import Codec

RANK_TOLERANCE = 1e-12  # share of the mean squared norm; a variance below it is rounding, not data
COLUMNS = 16  # components whose coordinates are in memory at once


class FittedCodec(NamedTuple):
    """A codec and what it loses on the rows that it was fitted to.

    Attributes:
        codec: The codec.
        explained: Share of the variance that each component holds.
        reconstruction_error: Mean squared distance of a row to its projection.
        round_trip_error: Mean squared distance of a row to its decoded codes.
        warning: Message that the components were lowered to the rank, or None.
    """

    codec: Codec
    explained: list[float]
    reconstruction_error: float
    round_trip_error: float
    warning: str | None


class Buckets(NamedTuple):
    """Quantile buckets of one column, fp64: ``edges`` [buckets - 1], ``values`` and ``counts`` [buckets].

    ``error`` is the sum of squared distances of the rows to the values of their buckets.
    """

    edges: np.ndarray
    values: np.ndarray
    counts: np.ndarray
    error: float


def fit_codec(
    image: Tensor, dots: Tensor, components: int = 319, buckets: int = 1024, variance_target: float | None = None
) -> FittedCodec:
    """Fits a codec.

    Args:
        image: Image embeddings of training rows, [n, d].
        dots: Dot products z_i . z_t of their pairs, [n].
        components: Number k of components; a k above the rank of the rows is lowered to the rank, with a warning.
        buckets: Quantile buckets of each component and of the dot products.
        variance_target: Share of the variance in (0, 1]; the fewest components that hold it replace ``components``.

    Raises:
        ValueError: There are fewer than two different rows.
    """
    rows = image.double().numpy()
    pca, rank = _fit_pca(rows)
    variance = pca.explained_variance_
    total = variance[:rank].sum()
    if variance_target is not None:
        components = min(int((variance[:rank].cumsum() / total < variance_target).sum()) + 1, rank)
    k = min(components, rank)
    warning = f"k lowered from {components} to {k}, the rank of {len(rows)} embeddings" if components > rank else None
    fitted: list[Buckets] = []
    for start in range(0, k, COLUMNS):
        axes = pca.components_[start : min(start + COLUMNS, k)].T
        # The mean is subtracted after the projection: (rows - mean) would copy all rows.
        fitted += fit_buckets(rows @ axes - pca.mean_ @ axes, buckets)
    [dot] = fit_buckets(dots.double().numpy()[:, None], buckets)
    arrays = {
        "mean": pca.mean_,
        "components": pca.components_[:k],
        "variance": variance[:k],
        "edges": np.stack([column.edges for column in fitted]),
        "values": np.stack([column.values for column in fitted]),
        "dot_edges": dot.edges,
        "dot_counts": dot.counts,
    }
    codec = Codec(**{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})
    # scikit-learn's variances are sums over n - 1; an error is a mean over n rows.
    lost = float(total - variance[:k].sum()) * (len(rows) - 1) / len(rows)
    # The components are orthonormal, so the error of the buckets adds to that of the projection.
    round_trip = lost + sum(column.error for column in fitted) / len(rows)
    return FittedCodec(codec, (variance[:k] / total).tolist(), lost, round_trip, warning)


def _fit_pca(rows: np.ndarray) -> tuple[PCA, int]:
    """Returns all principal components of rows [n, d], by falling variance (n - 1), and the rank of the rows."""
    count = len(rows)
    if count < 2:
        raise ValueError(f"a codec needs 2 or more embeddings, got {count}")
    with np.errstate(invalid="ignore"):  # equal rows have no variance to take shares of
        # Exact, from the d x d covariance. The largest entry of a component is positive, so signs are fixed, too.
        pca = PCA(svd_solver="covariance_eigh").fit(rows)
    least = RANK_TOLERANCE * np.einsum("nd,nd->", rows, rows) / count
    rank = min(int((pca.explained_variance_ > least).sum()), count - 1)
    if rank == 0:
        raise ValueError(f"all {count} embeddings are equal: there is nothing to fit a codec to")
    return pca, rank


def fit_buckets(columns: np.ndarray, buckets: int) -> list[Buckets]:
    """Returns the quantile buckets of each column of ``columns`` fp64 [n, k].

    Edges are quantiles with linear interpolation. Defined cases: equal rows never part, so ties leave a bucket
    over-full and others empty; with at most as many rows as buckets every different row has a bucket of its own; a
    constant column puts all rows in its last bucket. An empty bucket stands for the middle of its edges.
    """
    count = len(columns)
    # Not KBinsDiscretizer: it removes equal edges, and with them the border between a tie and the rows above it.
    quantiles = QuantileTransformer(n_quantiles=min(buckets + 1, count), subsample=None).fit(columns)
    shares = np.linspace(0, 1, buckets + 1)
    if count <= buckets:  # edges in the middle between two rows: rounding puts no row beyond one
        shares[1:-1] = (np.floor(shares[1:-1] * (count - 1)) + 0.5) / (count - 1)
    fitted = []
    for column, known in zip(columns.T, quantiles.quantiles_.T, strict=True):
        # Interpolation rounds, and edges that fall by a rounding would break searchsorted.
        ends = np.maximum.accumulate(np.interp(shares, quantiles.references_, known))
        edges = ends[1:-1]
        codes = np.searchsorted(edges, column, side="right")
        counts = np.bincount(codes, minlength=buckets)
        sums = np.bincount(codes, column, buckets)
        values = np.where(counts, sums / np.maximum(counts, 1), (ends[:-1] + ends[1:]) / 2)
        fitted.append(Buckets(edges, values, counts, float(np.square(column - values[codes]).sum())))
    return fitted
