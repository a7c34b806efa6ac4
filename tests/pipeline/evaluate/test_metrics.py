"""The arithmetic against loops, numpy and known cases."""

import math
import random

import numpy as np
import pytest
import torch

from pipeline.evaluate import metrics
from pipeline.evaluate.memorisation import share_nearer
from pipeline.evaluate.retrieval import median_interval
from pipeline.evaluate.upsamplers import psnr


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alone(x: torch.Tensor) -> torch.Tensor:
    """Every row a group of its own."""
    return torch.arange(len(x))


@pytest.mark.parametrize("n", [2, 3, 8, 21])
def test_a_derangement_moves_every_row_by_half(n: int) -> None:
    other = metrics.derangement(list(range(n)))
    assert sorted(other.tolist()) == list(range(n))
    assert ((other - torch.arange(n)) % n).tolist() == [n // 2] * n


def test_of_equal_derangements_the_nearest_to_half_is_taken() -> None:
    """As by counting all of them."""
    generator = random.Random(0)
    for n in range(2, 30):
        labels = [generator.randrange(4) for _ in range(n)]

        def shared(shift: int, labels: list[int] = labels) -> int:
            return sum(label == labels[(i + shift) % len(labels)] for i, label in enumerate(labels))

        best = min(range(1, n), key=lambda k: (shared(k), abs(k - n // 2)))
        assert metrics.derangement(labels).tolist() == [(i + best) % n for i in range(n)]


def test_a_derangement_avoids_equal_labels() -> None:
    labels = ["a", "b", "c", "a", "b", "c"]  # half the rows away is the same label
    other = metrics.derangement(labels)
    assert all(labels[i] != labels[j] for i, j in enumerate(other.tolist()))
    assert (other != torch.arange(6)).all()
    assert (metrics.derangement(["x"] * 5) != torch.arange(5)).all()
    with pytest.raises(ValueError, match="1 rows have no other row"):
        metrics.derangement(["x"])


def test_the_bootstrap_agrees_with_normal_theory_and_repeats() -> None:
    x = normal(400, seed=1) * 3 + 5
    low, high = metrics.bootstrap(x, alone(x), seed=0)
    error = metrics.standard_error(x, alone(x))
    assert error == pytest.approx(float(np.std(x.numpy(), ddof=1)) / 20)
    assert low == pytest.approx(float(x.mean()) - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(float(x.mean()) + 1.96 * error, abs=0.3 * error)
    assert metrics.bootstrap(x, alone(x), seed=0) == (low, high)
    assert metrics.bootstrap(x, alone(x), seed=1) != (low, high)
    assert metrics.bootstrap(torch.full((9,), 2.0), torch.arange(9), seed=0) == pytest.approx((2.0, 2.0))
    one = torch.zeros(3, dtype=torch.int64)  # group, of which nothing is known however many rows it has
    assert all(map(math.isnan, (*metrics.bootstrap(x[:3], one, 0), metrics.standard_error(x[:3], one))))


def test_resampling_draws_rows_with_replacement() -> None:
    weights = metrics.resample(torch.arange(7), seed=3)
    assert weights.shape == (metrics.RESAMPLES, 7)
    assert (weights.sum(1) == 7).all()
    assert weights.mean() == pytest.approx(1)
    assert (weights > 1).any()


def test_labels_are_numbered_in_the_order_of_their_first() -> None:
    assert metrics.numbered(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]


def test_rows_of_a_group_are_drawn_together() -> None:
    groups = torch.tensor([0, 1, 0, 2, 1])
    weights = metrics.resample(groups, seed=3)
    assert torch.equal(weights[:, 0], weights[:, 2])
    assert torch.equal(weights[:, 1], weights[:, 4])
    assert torch.equal(weights[:, [0, 1, 3]], metrics.resample(torch.arange(3), seed=3))


def test_copies_of_rows_in_groups_add_no_certainty() -> None:
    """Every interval and error is that of the rows without their copies; one by one they would be narrower."""
    x, y = normal(40, seed=1), normal(40, seed=2)
    twice, groups, once = x.repeat(2), torch.arange(40).repeat(2), torch.arange(40)
    assert metrics.bootstrap(twice, groups, 0) == pytest.approx(metrics.bootstrap(x, once, 0))
    error = metrics.standard_error(x, once)
    assert metrics.standard_error(twice, groups) == pytest.approx(error)
    assert metrics.standard_error(twice, alone(twice)) == pytest.approx(error / 2**0.5, rel=0.02)
    assert median_interval(twice, y.repeat(2), groups, 0) == median_interval(x, y, once, 0)
    share, interval = share_nearer(twice, y.repeat(2), groups, 0)
    assert (share, *interval) == pytest.approx((share_nearer(x, y, once, 0)[0], *share_nearer(x, y, once, 0)[1]))
    samples, data = normal(3, 40, 5, seed=3), normal(40, 5, seed=4)
    whole = metrics.variance_ratio(samples.repeat(1, 2, 1), data.repeat(2, 1), groups, 0)[1]
    assert whole == pytest.approx(metrics.variance_ratio(samples, data, once, 0)[1])


def test_the_jackknife_leaves_out_whole_groups() -> None:
    terms = metrics.mmd_terms(normal(9, 4, seed=1), normal(9, 4, seed=2) + 0.5, 1.3)
    groups = torch.tensor([0, 1, 2, 0, 1, 3, 3, 3, 4])
    kept = [(groups != group).nonzero()[:, 0] for group in range(5)]
    left_out = np.array([metrics.u_statistic(terms[rows][:, rows], torch.arange(len(rows)))[0] for rows in kept])
    expected = math.sqrt(4 / 5 * ((left_out - left_out.mean()) ** 2).sum())
    assert metrics.u_statistic(terms, groups)[1] == pytest.approx(expected)
    assert math.isnan(metrics.u_statistic(terms, torch.zeros(9, dtype=torch.int64))[1])


def test_total_variance_is_the_trace_of_numpys_covariance() -> None:
    x = normal(30, 5, seed=2)
    assert float(metrics.total_variance(x)) == pytest.approx(np.trace(np.cov(x.numpy().T)))
    weights = metrics.resample(torch.arange(30), seed=4)[:3]
    rows = [np.repeat(x.numpy(), w.astype(int), axis=0) for w in weights.numpy()]
    expected = [np.trace(np.cov(r.T)) for r in rows]
    assert metrics.total_variance(x, weights).tolist() == pytest.approx(expected)


def test_the_variance_ratio_knows_the_scale() -> None:
    data = normal(200, 6, seed=5)
    samples = torch.stack([2 * normal(200, 6, seed=6 + i) for i in range(4)])
    ratio, interval = metrics.variance_ratio(samples, data, alone(data), seed=0)
    assert interval.low < 4 < interval.high
    assert interval.low < ratio < interval.high


def test_mmd_is_the_loop() -> None:
    x, y, bandwidth = normal(9, 4, seed=1), normal(9, 4, seed=2) + 0.5, 1.3

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.exp(-float(((a - b) ** 2).sum()) / (2 * bandwidth**2))

    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) - 2 * k(x[i], y[j]) for i, j in pairs) / len(pairs)
    terms = metrics.mmd_terms(x, y, bandwidth)
    value, error = metrics.u_statistic(terms, alone(terms))
    assert value == pytest.approx(expected)
    kept = [[j for j in range(9) if j != i] for i in range(9)]
    left_out = np.array([metrics.u_statistic(terms[rows][:, rows], torch.arange(8))[0] for rows in kept])
    assert error == pytest.approx(math.sqrt(8 / 9 * ((left_out - left_out.mean()) ** 2).sum()))


def test_mmd_is_unbiased_and_sees_a_shift() -> None:
    values = []
    for seed in range(60):
        x, y = normal(20, 3, seed=seed), normal(20, 3, seed=1000 + seed)
        values.append(metrics.u_statistic(metrics.mmd_terms(x, y, 1.0), alone(x))[0])
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(60)
    assert min(values) < 0
    terms = metrics.mmd_terms(normal(60, 3, seed=1), normal(60, 3, seed=2) + 2, 1.0)
    shifted, error = metrics.u_statistic(terms, alone(terms))
    assert shifted > 5 * error
    assert math.isnan(metrics.u_statistic(metrics.mmd_terms(x[:2], y[:2], 1.0), torch.arange(2))[1])


def test_the_median_distance() -> None:
    x = torch.tensor([[0.0], [1.0], [3.0]])
    assert metrics.median_distance(x) == 2.0


def test_psnr_of_known_errors() -> None:
    reference = torch.zeros(3, 3, 4, 4)
    image = torch.stack([reference[0], reference[0] + 0.2, reference[0] + 2])
    assert psnr(image, reference).tolist() == pytest.approx([100.0, 20.0, 0.0], abs=1e-5)


def test_frequencies_of_codes() -> None:
    codes = torch.tensor([[0, 2], [0, 1], [1, 2], [0, 2]])
    counts = metrics.bucket_counts(codes, 3)
    assert counts.tolist() == [[3, 1, 0], [0, 1, 3]]
    nats = metrics.marginal_nats(torch.tensor([[0, 2], [2, 1]]), counts)
    assert nats.flatten().tolist() == pytest.approx(
        [-math.log(3 / 4), -math.log(3 / 4), -math.log(1 / 12), math.log(4)]
    )
    own = metrics.marginal_nats(codes, counts).mean(0)  # of the very rows that were counted: the entropy
    assert own.tolist() == pytest.approx([-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))] * 2)
