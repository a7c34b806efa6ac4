import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UnCLIPScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from models.diffusion.process import (
    MOST_SNR,
    Prediction,
    discretized_gaussian_nll,
    error_weight,
    hybrid_loss,
    learned_log_variance,
    log_variance_range,
    posterior_mean,
    posterior_variance,
    predict,
    q_sample,
    regression_target,
    squared_error,
    variational_bound,
)
from models.diffusion.schedules import make_schedule

SCHEDULE = make_schedule("cosine", 1000)
TIMES = torch.tensor([0, 1, 2, 50, 500, 900, 998])


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(len(TIMES), *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "theirs"), [("cosine", "squaredcos_cap_v2"), ("linear", "linear")])
def test_q_sample_equals_diffusers_at_every_timestep(name: str, theirs: str) -> None:
    t, g = torch.arange(1000), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1000, 8, generator=g).unbind()
    expected = DDPMScheduler(beta_schedule=theirs).add_noise(x0, noise, t)
    ours = q_sample(x0, noise, make_schedule(name, 1000).at(t))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_a_perfect_prediction_gives_back_data_and_noise() -> None:
    x0, noise = rows(5).double(), rows(5, seed=1).double()
    alpha_bar = SCHEDULE.at(TIMES)
    x_t = q_sample(x0, noise, alpha_bar)
    for kind in ("eps", "v", "x0"):
        prediction = predict(kind, regression_target(kind, x0, noise, alpha_bar), x_t, alpha_bar)
        torch.testing.assert_close(prediction.x0, x0, atol=1e-7, rtol=0)
        torch.testing.assert_close(prediction.eps, noise, atol=1e-7, rtol=0)
        assert prediction.variance_fraction is None


def test_the_v_target_equals_diffusers() -> None:
    x0, noise = rows(3, 4, 4), rows(3, 4, 4, seed=1)
    expected = DDPMScheduler(beta_schedule="squaredcos_cap_v2").get_velocity(x0, noise, TIMES)
    torch.testing.assert_close(regression_target("v", x0, noise, SCHEDULE.at(TIMES)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_snr", [0.5, 20.0])
def test_weights_equal_their_closed_forms(max_snr: float) -> None:
    alpha_bar = make_schedule("cosine", 1000).at(torch.arange(1000))
    snr = [a / (1 - a) for a in alpha_bar.tolist()]
    for kind, weight in {
        "eps": [min(r, max_snr) / r for r in snr],
        "v": [(1 + min(r, max_snr)) / (1 + r) for r in snr],
        "x0": [1 + min(r, max_snr) for r in snr],
    }.items():
        assert error_weight(kind, alpha_bar, max_snr).tolist() == weight
    for kind in ("eps", "v"):
        assert error_weight(kind, alpha_bar).tolist() == [1.0] * 1000
    assert error_weight("x0", alpha_bar).tolist() == [1 + min(r, MOST_SNR) for r in snr]


def test_a_bounded_error_is_the_error_of_x0_with_a_bounded_weight() -> None:
    """However the network says it: min-SNR for the noise (Hang et al. 2023), and 1 more for v and x0."""
    x0, noise, output = (rows(5, seed=seed).double() for seed in range(3))
    alpha_bar = SCHEDULE.at(TIMES)
    x_t = q_sample(x0, noise, alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    for kind, more in (("eps", 0), ("v", 1), ("x0", 1)):
        error = ((predict(kind, output, x_t, alpha_bar).x0 - x0) ** 2).mean(1)
        bounded = squared_error(kind, output, x0, noise, alpha_bar, max_snr=5.0)
        torch.testing.assert_close(bounded, (more + snr.clamp(max=5)) * error, rtol=1e-9, atol=0)
        mse, _ = hybrid_loss(kind, torch.cat([output, output], dim=1), x0, noise, TIMES, SCHEDULE, 5.0)
        assert torch.equal(mse, bounded)


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_dynamic_thresholding_equals_diffusers_and_the_papers_formula(kind: str) -> None:
    alpha_bar = SCHEDULE.at(TIMES)
    scale = torch.linspace(0.2, 2, len(TIMES))[:, None, None, None]  # rows within the range, and rows beyond it
    x_t, output = 0.3 * rows(3, 8, 8), scale * rows(3, 8, 8, seed=1)
    plain = predict(kind, output, x_t, alpha_bar)
    bounded = predict(kind, output, x_t, alpha_bar, clip=1.0, threshold=0.9)
    theirs = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9)
    torch.testing.assert_close(bounded.x0, theirs._threshold_sample(plain.x0), atol=1e-6, rtol=0)
    for given, found in zip(plain.x0.numpy(), bounded.x0.numpy(), strict=True):
        s = max(1.0, float(np.percentile(abs(given), 90)))
        np.testing.assert_allclose(found, given.clip(-s, s) / s, atol=1e-6)
    torch.testing.assert_close(
        q_sample(bounded.x0.double(), bounded.eps.double(), alpha_bar), x_t.double(), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_clipping_keeps_data_and_noise_consistent(kind: str) -> None:
    alpha_bar = SCHEDULE.at(TIMES)
    x_t, output = rows(5).double(), 3 * rows(5, seed=1).double()
    prediction = predict(kind, output, x_t, alpha_bar, clip=1.0)
    assert prediction.x0.abs().max() == 1
    torch.testing.assert_close(q_sample(prediction.x0, prediction.eps, alpha_bar), x_t, atol=1e-9, rtol=0)


def test_an_unknown_kind_is_named() -> None:
    x, alpha_bar = rows(5), SCHEDULE.at(TIMES)
    with pytest.raises(ValueError, match="'score'"):
        predict("score", x, x, alpha_bar)
    with pytest.raises(ValueError, match="'score'"):
        regression_target("score", x, x, alpha_bar)


def test_the_posterior_is_bayes_rule() -> None:
    """q(x_s given x_t, x0) from the product of the two Gaussians q(x_s given x0) and q(x_t given x_s)."""
    t, s = torch.tensor([1, 50, 500, 999]), torch.tensor([0, 20, 499, 700])
    a_t, a_s = SCHEDULE.at(t), SCHEDULE.at(s)
    x0, x_t = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ratio = a_t / a_s
    precision = 1 / (1 - a_s) + ratio / (1 - ratio)
    mean = (a_s.sqrt() * x0 / (1 - a_s) + ratio.sqrt() * x_t / (1 - ratio)) / precision
    torch.testing.assert_close(posterior_mean(x0, x_t, a_t, a_s), mean, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(posterior_variance(a_t, a_s), 1 / precision, atol=1e-12, rtol=1e-8)


@pytest.mark.parametrize(("t", "s"), [(1, 0), (5, 3), (500, 499), (700, 300), (998, 0)])
def test_the_learned_variance_equals_diffusers(t: int, s: int) -> None:
    scheduler = UnCLIPScheduler(variance_type="learned_range")
    scheduler.alphas_cumprod = SCHEDULE.alpha_bar  # its own are float32, too coarse for 1 - alpha_bar near the data
    scheduler.betas = 1 - SCHEDULE.alpha_bar / SCHEDULE.at(torch.arange(1000) - 1)
    raw = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = scheduler._get_variance(t, prev_timestep=s, predicted_variance=raw)
    bounds = log_variance_range(SCHEDULE, torch.tensor([t, t]), torch.tensor([s, s]))
    ours = learned_log_variance((raw + 1) / 2, *bounds)
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


def test_the_variance_range_at_the_last_step_starts_at_that_of_step_one() -> None:
    low, high = log_variance_range(SCHEDULE, torch.tensor([0, 1, 2]), torch.tensor([-1, 0, 1]))
    assert low[0] == low[1]
    assert torch.isfinite(low).all()
    assert torch.isfinite(high).all()
    assert (low <= high).all()


def test_the_probabilities_of_all_256_values_sum_to_one() -> None:
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None]
    mean = torch.tensor([-1.3, -1.0, 0.0, 0.3, 1.0], dtype=torch.float64)
    for std in (0.005, 0.1, 2.0):
        probability = torch.exp(-discretized_gaussian_nll(values, mean, torch.full_like(mean, 2 * math.log(std))))
        torch.testing.assert_close(probability.sum(0), torch.ones_like(mean), atol=1e-9, rtol=0)


def bound_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0 on 8-bit levels, noise, x_t, and the level, for TIMES, float64"""
    x0 = (rows(3, 4, 4).double().clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    noise = rows(3, 4, 4, seed=1).double()
    return x0, noise, q_sample(x0, noise, SCHEDULE.at(TIMES)), SCHEDULE.at(TIMES)


def test_the_bound_equals_torch_distributions() -> None:
    """At every step but the last a KL divergence, at the last the probability of the 8-bit values."""
    x0, _, x_t, level = bound_inputs()
    guess, fraction = x0 + 0.01, torch.full_like(x0, 0.3)
    ours = variational_bound(Prediction(guess, x_t, fraction), x0, x_t, TIMES, SCHEDULE)
    previous = SCHEDULE.at(TIMES - 1)
    variance = posterior_variance(level, previous).view(-1, 1, 1, 1)[1:]
    beta = (1 - level / previous).view(-1, 1, 1, 1)[1:]
    truth = Normal(posterior_mean(x0, x_t, level, previous)[1:], variance.sqrt())
    model = Normal(posterior_mean(guess, x_t, level, previous)[1:], (beta**0.3 * variance**0.7).sqrt())
    expected = kl_divergence(truth, model).mean(dim=(1, 2, 3)) / math.log(2)
    torch.testing.assert_close(ours[1:], expected, atol=1e-9, rtol=1e-9)
    last = Normal(guess[0], ((1 - SCHEDULE.at(TIMES[0])) ** 0.3 * variance[0] ** 0.7).sqrt())
    inf = torch.tensor(math.inf, dtype=torch.float64)
    upper = last.cdf(torch.where(x0[0] == 1, inf, x0[0] + 1 / 255))
    lower = last.cdf(torch.where(x0[0] == -1, -inf, x0[0] - 1 / 255))
    torch.testing.assert_close(ours[0], -(upper - lower).log2().mean(), atol=1e-6, rtol=0)


def test_the_bound_needs_a_variance() -> None:
    x0, noise, x_t, _ = bound_inputs()
    with pytest.raises(ValueError, match="2c output channels"):
        variational_bound(Prediction(x0, noise), x0, x_t, TIMES, SCHEDULE)


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_the_bound_trains_the_variance_only(kind: str) -> None:
    x0, noise, _, level = bound_inputs()
    output = (0.1 * rows(6, 4, 4, seed=2)).double().requires_grad_()
    mse, vb = hybrid_loss(kind, output, x0, noise, TIMES, SCHEDULE)
    of_bound = torch.autograd.grad(vb.sum(), output, retain_graph=True)[0]
    of_mse = torch.autograd.grad(mse.sum(), output)[0]
    assert (of_bound[:, :3] == 0).all()
    assert (of_bound[:, 3:] != 0).any(dim=(1, 2, 3)).all()
    assert (of_mse[:, 3:] == 0).all()
    error = ((output[:, :3] - regression_target(kind, x0, noise, level)) ** 2).mean(dim=(1, 2, 3))
    weight = 1 + (level / (1 - level)).clamp(max=5) if kind == "x0" else 1.0
    torch.testing.assert_close(mse, weight * error)


def test_the_bound_weighs_a_thousandth_of_its_sum_over_the_steps() -> None:
    schedule = make_schedule("cosine", 40)
    x0, noise = torch.randn(2, 40, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    output, t = torch.zeros(40, 6, 4, 4), torch.arange(40)
    x_t = q_sample(x0, noise, schedule.at(t))
    whole = variational_bound(predict("eps", output, x_t, schedule.at(t)), x0, x_t, t, schedule).sum()
    _, vb = hybrid_loss("eps", output, x0, noise, t, schedule)
    torch.testing.assert_close(vb.mean(), whole / 1000)
