"""Sums that merge: any parts in any order give the whole set's values, and those are what others compute."""

import math
from functools import reduce
from itertools import product

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.evaluate import statistics
from pipeline.evaluate.statistics import PairSum, cmmd, frechet, frechet_distance, gaussian, kernel_sum, merge


def rows(n: int, d: int, seed: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix * scale + offset


@st.composite
def parts(draw: st.DrawFn) -> tuple[Tensor, list[Tensor]]:
    """Rows, and the same rows cut into shards of any size in any order."""
    n, d = draw(st.integers(4, 60)), draw(st.integers(1, 6))
    x = rows(n, d, draw(st.integers(0, 2**20)), draw(st.sampled_from([1e-3, 1.0, 1e3])), draw(st.sampled_from([0, 50])))
    cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=8)))
    shards = [x[a:b] for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    return x, draw(st.permutations(shards))


def close(found: Tensor, expected: Tensor) -> bool:
    """Within 1e-9 of the largest value."""
    return float((found - expected).abs().max()) <= 1e-9 * max(1.0, float(expected.abs().max()))


@settings(deadline=None, max_examples=40)
@given(parts(), st.booleans())
def test_any_sharding_and_order_gives_the_whole_sets_moments(cut: tuple[Tensor, list[Tensor]], backwards: bool) -> None:
    x, shards = cut
    single = [gaussian(shard) for shard in shards]
    if backwards and len(single) > 2:  # a tree instead of a chain
        half = len(single) // 2
        found = merge(reduce(merge, single[half:]), reduce(merge, single[:half]))
    else:
        found = reduce(merge, single)
    assert found.rows == len(x)
    assert close(found.mean, x.mean(0))
    assert close(found.covariance, torch.from_numpy(np.cov(x.numpy().T).reshape(x.shape[1], x.shape[1])))


@settings(deadline=None, max_examples=20)
@given(parts(), st.integers(0, 2**20))
def test_any_sharding_gives_the_whole_sets_frechet_distance(cut: tuple[Tensor, list[Tensor]], seed: int) -> None:
    x, shards = cut
    other = gaussian(rows(40, x.shape[1], seed))
    whole, merged = frechet(gaussian(x), other), frechet(reduce(merge, map(gaussian, shards)), other)
    assert merged == pytest.approx(whole, rel=1e-9, abs=1e-9)


def test_sharded_embeddings_of_a_real_size_agree_to_1e_9() -> None:
    """Fewer rows than dimensions, as in every small evaluation: both covariances are singular."""
    x, y = (torch.nn.functional.normalize(rows(48, 256, seed), dim=1) for seed in (0, 1))
    merged = [reduce(merge, [gaussian(part) for part in z.split(7)]) for z in (x, y)]
    assert frechet(*merged) == pytest.approx(frechet_distance(x, y), abs=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(parts(), parts())
def test_any_blocks_of_pairs_give_the_whole_kernel_sum(
    a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]
) -> None:
    d = min(a[0].shape[1], b[0].shape[1])
    whole = kernel_sum(a[0][:, :d], b[0][:, :d], 2.0)
    blocks = [kernel_sum(x[:, :d], y[:, :d], 2.0) for x, y in product(a[1], b[1])]
    merged = reduce(PairSum.merge, blocks)
    assert merged.pairs == whole.pairs == len(a[0]) * len(b[0])
    assert merged.total == pytest.approx(whole.total, rel=1e-9, abs=1e-9)


def test_large_sets_are_summed_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(50, 8, 0), rows(33, 8, 1)
    whole = cmmd(x, y)
    monkeypatch.setattr(statistics, "BLOCK", 7)
    assert cmmd(x, y) == pytest.approx(whole, rel=1e-9)


def test_the_frechet_distance_is_that_of_a_matrix_square_root() -> None:
    x, y = rows(200, 12, 2), rows(150, 12, 3, offset=0.3)
    means, covariances = [z.numpy().mean(0) for z in (x, y)], [np.cov(z.numpy().T) for z in (x, y)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_few_rows_is_that_of_eigenvalues() -> None:
    """The formula of torchmetrics, which sums the roots of the eigenvalues of the product of covariances."""
    x, y = rows(10, 24, 4), rows(12, 24, 5)
    means, covariances = [z.numpy().mean(0) for z in (x, y)], [np.cov(z.numpy().T) for z in (x, y)]
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1])
    expected -= 2 * np.sqrt(eigenvalues).real.sum()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)


def test_the_frechet_distance_of_diagonal_gaussians_has_a_closed_form() -> None:
    deviations, means = rows(2, 5, 6).abs(), rows(2, 5, 7)
    a, b = (
        statistics.Gaussian(11, mean, 10 * torch.diag(deviation**2))
        for mean, deviation in zip(means, deviations, strict=True)
    )
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet(a, b) == pytest.approx(float(expected), rel=1e-9)
    with pytest.raises(ValueError, match="1 rows have no covariance"):
        _ = gaussian(means[:1]).covariance


def test_cmmd_is_the_published_formula() -> None:
    """As the paper's code has it: a mean over all pairs, bandwidth 10, scaled by 1000."""
    x, y = (torch.nn.functional.normalize(rows(n, 16, n), dim=1).numpy() for n in (20, 31))
    gamma = 1 / (2 * 10**2)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[math.exp(-gamma * ((p - q) ** 2).sum()) for q in b] for p in a]))

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert cmmd(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-9)
    assert cmmd(torch.from_numpy(x), torch.from_numpy(x)) == pytest.approx(0, abs=1e-9)
