import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as PeerPCA
from torch import Tensor

from models.codec import Codec, bucket_errors, cut_buckets, digitize, fit_buckets, fit_codec, fit_pca, moments
from models.draw import Draw
from tests.models.mutations import fails_under


def rows(n: int = 500, d: int = 24, rank: int = 24, seed: int = 0) -> Tensor:
    """Unit-norm rows with an offset, a falling spectrum and at most ``rank`` directions."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(1, 0.05, rank) * torch.randn(n, rank, generator=generator)
    z = spread @ torch.randn(rank, d, generator=generator) / d**0.5 + torch.ones(d) / d**0.5
    return (z / z.norm(dim=-1, keepdim=True)) if rank == d else z


def make_codec(z: Tensor, k: int, buckets: int = 64) -> Codec:
    pca = fit_pca(*moments(z), k=k)
    coordinates = (z.double() - pca.mean) @ pca.components.T
    text = z.flip(0)
    return fit_codec(pca, coordinates, (z.double() * text.double()).sum(-1), buckets)


@fails_under(
    (fit_pca, "/ (rows - 1)", "/ rows"),
    (fit_pca, "gram - rows * torch.outer(mean, mean)", "gram"),
    (fit_pca, "x.flip(-1) for x", "x for x"),
    (moments, "z.T @ z", "z.T @ z + 1e-6"),
)
def test_pca_equals_scikit_learn() -> None:
    z = rows()
    pca = fit_pca(*moments(z), k=10)
    peer = PeerPCA(10, svd_solver="full").fit(z.double().numpy())
    signs = np.sign((peer.components_ * pca.components.numpy()).sum(1, keepdims=True))
    np.testing.assert_allclose(pca.mean, peer.mean_, atol=1e-12)
    np.testing.assert_allclose(pca.variance, peer.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(pca.components, signs * peer.components_, atol=1e-8)
    np.testing.assert_allclose(pca.variance / pca.total_variance, peer.explained_variance_ratio_, rtol=1e-9)
    assert pca.warning is None


def test_moments_merge_to_those_of_all_rows() -> None:
    z = rows()
    merged = moments(z[:77]).merge(moments(z[77:401])).merge(moments(z[401:]))
    assert merged.rows == 500
    torch.testing.assert_close(merged.total, moments(z).total, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(merged.gram, moments(z).gram, rtol=1e-13, atol=1e-12)


def test_k_above_the_rank_is_lowered_with_a_warning() -> None:
    low = fit_pca(*moments(rows(rank=5)), k=24)
    assert len(low.components) == 5
    assert low.warning == "k lowered from 24 to 5, the rank of 500 embeddings"
    few = fit_pca(*moments(rows(n=4)), k=319)
    assert len(few.components) == 3  # n rows span n - 1 directions about their mean


def test_variance_target_takes_the_fewest_components_that_hold_it() -> None:
    z = rows()
    share = fit_pca(*moments(z), k=24).variance.cumsum(0) / fit_pca(*moments(z)).total_variance
    chosen = len(fit_pca(*moments(z), variance_target=0.9).components)
    assert share[chosen - 1] >= 0.9 > share[chosen - 2]
    assert len(fit_pca(*moments(z), variance_target=1.0).components) == 24


@pytest.mark.parametrize(
    ("z", "options", "message"),
    [
        (torch.ones(5, 3), {}, "all 5 embeddings are equal"),
        (torch.ones(1, 3), {}, "needs 2 or more"),
        (torch.eye(3), {"k": 0}, "use 1 or more"),
        (torch.eye(3), {"variance_target": 1.5}, "a share in"),
    ],
)
def test_what_cannot_be_fitted_is_refused(z: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_pca(*moments(z), **options)


@fails_under((digitize, "right=True", "right=False"))
def test_digitize_equals_numpy_also_on_edges_and_outside() -> None:
    generator = torch.Generator().manual_seed(1)
    edges = torch.randn(3, 31, generator=generator, dtype=torch.float64).sort(-1).values
    edges[1, 4:9] = edges[1, 4]
    x = torch.cat([torch.randn(200, 3, generator=generator, dtype=torch.float64) * 2, edges.T, torch.full((1, 3), 99)])
    ours = digitize(x, edges)
    for column in range(3):
        assert np.array_equal(ours[:, column], np.digitize(x[:, column], edges[column]))
    assert ours.min() == 0
    assert ours.max() == 31


def test_buckets_are_equally_full_and_mean_their_rows() -> None:
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    edges, values, counts = fit_buckets(x, 8)
    assert (counts == 125).all()
    codes = digitize(x, edges)
    for column in range(2):
        for bucket in range(8):
            mean = x[codes[:, column] == bucket, column].mean()
            torch.testing.assert_close(values[column, bucket], mean, rtol=0, atol=1e-13)
    assert (np.quantile(x[:, 0], np.arange(1, 8) / 8) - edges[0].numpy()).max() < 0.02


@fails_under((bucket_errors, "error +=", "error ="))
def test_columns_are_put_into_buckets_piece_by_piece() -> None:
    """With the bits of all at once, whatever the pieces; and ties across their seams."""
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round(decimals=1)
    ordered = x.sort(dim=1).values
    edges, values, counts = whole = cut_buckets(ordered, 16)
    codes = torch.stack([torch.from_numpy(np.digitize(column, e)) for column, e in zip(x, edges, strict=True)])
    assert all(torch.equal(row.bincount(minlength=16), n) for row, n in zip(codes, counts, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.codec.CHUNK_VALUES", 21)  # seven rows of three columns
        assert all(torch.equal(a, b) for a, b in zip(whole, cut_buckets(ordered, 16), strict=True))
        error = bucket_errors(x, edges, values)
    naive = (x - values.gather(1, codes)).square().sum(1)
    torch.testing.assert_close(error, naive, rtol=1e-12, atol=0)


def test_ties_never_part() -> None:
    x = torch.tensor([0.0] * 70 + [1.0] * 30, dtype=torch.float64)[:, None]
    edges, values, counts = fit_buckets(x, 4)
    codes = digitize(x, edges)[:, 0]
    assert len(codes[:70].unique()) == len(codes[70:].unique()) == 1
    torch.testing.assert_close(values.gather(1, codes[None])[0], x[:, 0], rtol=0, atol=1e-15)
    assert counts.sum() == 100


def test_a_constant_column_is_kept_exactly() -> None:
    x = torch.full((10, 1), 0.3, dtype=torch.float64)
    edges, values, counts = fit_buckets(x, 4)
    assert digitize(x, edges)[:, 0].tolist() == [3] * 10
    assert counts[0].tolist() == [0, 0, 0, 10]
    torch.testing.assert_close(values, torch.full((1, 4), 0.3, dtype=torch.float64), rtol=0, atol=1e-15)


def test_fewer_rows_than_buckets_come_back_exactly() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    edges, values, counts = fit_buckets(x, 64)
    codes = digitize(x, edges)
    torch.testing.assert_close(values.gather(1, codes.T).T, x, rtol=0, atol=1e-15)
    assert counts.max() == 1
    assert torch.isfinite(values).all()
    with pytest.raises(ValueError, match="2 or more rows"):
        fit_buckets(x[:1], 64)


def test_values_rise_with_the_bucket() -> None:
    for x in (torch.randn(500, 1), torch.randn(9, 1), torch.randint(3, (100, 1)).double()):
        _, values, _ = fit_buckets(x, 32)
        assert (values[0].diff() >= 0).all()


def projection_error(codec: Codec, z: torch.Tensor) -> torch.Tensor:
    """Squared error of PCA alone, [n]."""
    return (z.double() - codec.mean - codec.project(z) @ codec.components).square().sum(-1)


def test_round_trip() -> None:
    z = rows()
    codec = make_codec(z, k=24)
    assert projection_error(codec, z).max() < 1e-20  # all components: PCA alone is exact
    error = (z - codec.decode(codec.encode(z))).double().square().sum(-1).mean()
    assert 0 < error < 0.01 * codec.variance.sum()
    finer = make_codec(z, k=24, buckets=128)
    assert (z - finer.decode(finer.encode(z))).double().square().sum(-1).mean() < error / 2


def test_few_components_lose_the_variance_of_the_rest() -> None:
    z = rows()
    lost = projection_error(make_codec(z, k=10), z).sum() / (len(z) - 1)
    full = fit_pca(*moments(z), k=24)
    torch.testing.assert_close(lost, full.variance[10:].sum(), rtol=1e-9, atol=0)


def test_codes_do_not_depend_on_the_batch_or_on_autocast() -> None:
    z = rows()
    codec = make_codec(z, k=24, buckets=1024)
    codes = codec.encode(z)
    assert torch.equal(codes, torch.cat([codec.encode(row[None]) for row in z]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codec.encode(z), codes)
        assert codec.decode(codes).dtype == torch.float32


def test_unseen_values_clamp() -> None:
    codec = make_codec(rows(), k=5)
    far = codec.mean + 100 * codec.components[:1]
    assert codec.encode(far)[0, 0] == 63
    assert codec.encode(codec.mean - 100 * codec.components[:1])[0, 0] == 0
    assert codec.encode_dot(torch.tensor([-1e9, 1e9])).tolist() == [0, 63]


def test_upper_dots_have_the_distribution_of_the_upper_half() -> None:
    codec = make_codec(rows(), k=5, buckets=8)
    drawn = codec.sample_upper_dot(Draw([(0, 40_000)]))
    upper = torch.bincount(drawn, minlength=8).double() / 40_000
    cdf = codec.dot_counts.cumsum(0).double() / codec.dot_counts.sum()
    expected = torch.cat([torch.zeros(1), 2 * (cdf - 0.5).clamp(min=0)]).diff()
    torch.testing.assert_close(upper, expected, rtol=0, atol=0.01)


def test_tensors_are_the_whole_codec() -> None:
    codec = make_codec(rows(), k=5)
    again = Codec(**codec.tensors())
    assert torch.equal(again.encode(rows(seed=1)), codec.encode(rows(seed=1)))
    assert (codec.codes, codec.buckets) == (5, 64)
