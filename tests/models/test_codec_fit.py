"""The fit of the codec against the same computed by hand, and its defined cases."""

import numpy as np
import pytest
import torch
from torch import Tensor

from models.codec_fit import Buckets, FittedCodec, fit_buckets, fit_codec
from tests.models.small_models import rows


def fit(z: Tensor, k: int = 319, buckets: int = 64, variance_target: float | None = None) -> FittedCodec:
    dots = (z.double() * z.flip(0).double()).sum(-1)
    return fit_codec(z, dots, k, buckets, variance_target)


def buckets_of(values: Tensor | list[float], buckets: int) -> tuple[Buckets, np.ndarray]:
    """The buckets of one column, and the code of each row."""
    column = np.asarray(values, np.float64)
    [fitted] = fit_buckets(column[:, None], buckets)
    return fitted, np.digitize(column, fitted.edges)


def test_it_equals_eigenvectors_and_sorted_columns() -> None:
    """The exact codec: eigenvectors of the covariance, edges in the middle of the two rows that they part."""
    z = rows(n=5000).double()
    ours, loss, buckets = fit(z, 10).codec, fit(z, 10), 64
    variance, vectors = np.linalg.eigh(np.cov(z.numpy().T))
    variance, vectors = variance[::-1], vectors[:, ::-1].T[:10]
    vectors *= np.sign(vectors[np.arange(10), np.abs(vectors).argmax(1)])[:, None]
    np.testing.assert_allclose(ours.mean, z.numpy().mean(0), atol=1e-12)
    np.testing.assert_allclose(ours.variance, variance[:10], rtol=1e-9)
    np.testing.assert_allclose(ours.components, vectors, atol=1e-8)
    np.testing.assert_allclose(loss.explained, variance[:10] / variance.sum(), rtol=1e-9)
    coordinates = (z.numpy() - z.numpy().mean(0)) @ vectors.T
    ordered = np.sort(coordinates, 0)
    cuts = np.round(np.arange(1, buckets) * len(z) / buckets).astype(int)
    edges = (ordered[cuts - 1] + ordered[cuts]) / 2
    codes = ours.encode(z).numpy()
    exact = np.stack([np.digitize(u, e) for u, e in zip(coordinates.T, edges.T, strict=True)], 1)
    assert (codes == exact).mean() > 0.99
    assert np.abs(codes - exact).max() == 1
    error = (z - ours.decode(ours.encode(z))).square().sum(1).mean()
    assert loss.round_trip_error == pytest.approx(float(error), rel=1e-5)
    residual = (z - ours.mean - ours.project(z) @ ours.components).square().sum(1).mean()
    assert loss.reconstruction_error == pytest.approx(float(residual), rel=1e-9)
    assert loss.warning is None


def test_k_above_the_rank_is_lowered_with_a_warning() -> None:
    low = fit(rows(rank=5), 24)
    assert low.codec.codes == 5
    assert low.warning == "k lowered from 24 to 5, the rank of 500 embeddings"
    assert fit(rows(n=4)).codec.codes == 3  # n rows span n - 1 directions about their mean


def test_variance_target_takes_the_fewest_components_that_hold_it() -> None:
    z = rows()
    share = np.cumsum(fit(z, 24).explained)
    chosen = fit(z, variance_target=0.9).codec.codes
    assert share[chosen - 1] >= 0.9 > share[chosen - 2]
    assert fit(z, variance_target=1.0).codec.codes == 24


@pytest.mark.parametrize(
    ("z", "message"), [(torch.ones(5, 3), "all 5 embeddings are equal"), (torch.ones(1, 3), "needs 2 or more")]
)
def test_what_cannot_be_fitted_is_refused(z: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(z)


def test_buckets_are_equally_full_and_mean_their_rows() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    fitted, codes = buckets_of(x, 8)
    assert (fitted.counts == 125).all()
    for bucket in range(8):
        assert fitted.values[bucket] == pytest.approx(x[codes == bucket].mean(), abs=1e-13)
    np.testing.assert_allclose(fitted.edges, np.quantile(x, np.arange(1, 8) / 8), atol=1e-12)
    assert fitted.error == pytest.approx(((x - fitted.values[codes]) ** 2).sum(), rel=1e-12)


def test_ties_never_part_and_never_join_other_rows() -> None:
    x = [0.0] * 70 + [1.0] * 30
    fitted, codes = buckets_of(x, 4)
    assert len(set(codes[:70])) == len(set(codes[70:])) == 1
    np.testing.assert_allclose(fitted.values[codes], x, atol=1e-15)
    assert fitted.counts.sum() == 100


def test_a_constant_column_is_kept_exactly() -> None:
    fitted, codes = buckets_of([0.3] * 10, 4)
    assert codes.tolist() == [3] * 10
    assert fitted.counts.tolist() == [0, 0, 0, 10]
    np.testing.assert_allclose(fitted.values, 0.3, atol=1e-15)


@pytest.mark.parametrize("n", [2, 5, 33, 63, 64])
def test_fewer_rows_than_buckets_come_back_exactly(n: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fitted, codes = buckets_of(x, 64)
    np.testing.assert_allclose(fitted.values[codes], x, atol=1e-15)
    assert fitted.counts.max() == 1
    assert np.isfinite(fitted.values).all()


@pytest.mark.parametrize("x", [torch.randn(500), torch.randn(9), torch.randint(3, (100,)).double()])
def test_edges_and_values_rise(x: Tensor) -> None:
    fitted, _ = buckets_of(x, 32)
    assert (np.diff(fitted.edges) >= 0).all()
    assert (np.diff(fitted.values) >= 0).all()


def test_columns_are_the_same_alone_and_together() -> None:
    """Of more components than have their coordinates in memory at once."""
    z = rows()
    with pytest.MonkeyPatch.context() as patch:
        whole = fit(z, 24)
        patch.setattr("models.codec_fit.COLUMNS", 5)
        parts = fit(z, 24)
    for name, tensor in whole.codec.tensors().items():
        torch.testing.assert_close(parts.codec.tensors()[name], tensor, rtol=1e-9, atol=1e-12)
