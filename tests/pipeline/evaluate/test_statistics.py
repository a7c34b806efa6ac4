"""Distances of sets of rows are what others compute."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from pipeline.evaluate import statistics
from pipeline.evaluate.statistics import cmmd, frechet_distance


def rows(n: int, d: int, seed: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix * scale + offset


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


def test_the_frechet_distance_of_a_set_to_itself_moved_is_how_far_it_was_moved() -> None:
    for x in (rows(48, 256, 0), rows(60, 8, 1)):
        assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
        assert frechet_distance(x, x + 0.5) == pytest.approx(0.25 * x.shape[1], rel=1e-6)
    with pytest.raises(ValueError, match="1 rows have no covariance"):
        frechet_distance(x, x[:1])


def test_cmmd_is_the_published_formula() -> None:
    """As the paper's code has it: a mean over all pairs, bandwidth 10, scaled by 1000."""
    x, y = (torch.nn.functional.normalize(rows(n, 16, n), dim=1).numpy() for n in (20, 31))
    gamma = 1 / (2 * 10**2)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[math.exp(-gamma * ((p - q) ** 2).sum()) for q in b] for p in a]))

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert cmmd(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-9)
    assert cmmd(torch.from_numpy(x), torch.from_numpy(x)) == pytest.approx(0, abs=1e-9)
