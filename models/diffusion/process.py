"""The diffusion process: forward noising, the three ways to write a prediction, the posterior and the losses.

Levels (``alpha_bar``) are float64 [b], one for each row of x [b, ...]; factors are computed in float64 and then
rounded to x's precision. Sources: Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (improved DDPM), Salimans & Ho 2022
(v). Images are in [-1, 1].
"""

from functools import cache
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from models.diffusion.schedules import Schedule

MOST_SNR = 5.0
"""Bound on the signal-to-noise ratio that weighs an error of x0, the best value in Hang et al. 2023, too.

Their weight is min(SNR, 5). Here it is 1 more, so that an error counts where all is noise: there sampling takes its
first steps, which decide what is where."""


class Prediction(NamedTuple):
    """Holds a network's prediction for x_t.

    Attributes:
        x0: The clean data.
        eps: The noise.
        variance_fraction: Position of the learned variance between the two bounds of ``log_variance_range`` (0 the
            lower, 1 the upper; not clamped); None where the variance is not learned.
    """

    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None = None


def per_row(value: Tensor, x: Tensor) -> Tensor:
    """Returns ``value`` [b] shaped [b, 1, ...] and rounded so that it multiplies x."""
    return value.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def q_sample(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Returns x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise (DDPM, equation 4)."""
    return per_row(alpha_bar.sqrt(), x0) * x0 + per_row((1 - alpha_bar).sqrt(), x0) * noise


def regression_target(kind: str, x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Returns the target of a network of this kind: the noise, the data, or v = sqrt(a) noise - sqrt(1 - a) x0.

    Raises ValueError on another kind.
    """
    if kind == "eps":
        return noise
    if kind == "x0":
        return x0
    if kind == "v":
        return per_row(alpha_bar.sqrt(), x0) * noise - per_row((1 - alpha_bar).sqrt(), x0) * x0
    raise ValueError(f"prediction is {kind!r}: use 'eps', 'v' or 'x0'")


def error_weight(kind: str, alpha_bar: Tensor, max_snr: float | None = None) -> Tensor:
    """Returns the weight of a squared error of this kind at levels [b], float64 [b].

    With SNR = alpha_bar / (1 - alpha_bar), an error of x0 is an error of the noise SNR times as large, and one of v
    1 + SNR times (Salimans & Ho 2022, section 4). ``max_snr`` bounds the SNR in that factor, so that little noise does
    not outweigh all else (Hang et al. 2023, min-SNR): "eps" min(SNR, max_snr) / SNR, "v"
    (1 + min(SNR, max_snr)) / (1 + SNR), "x0" 1 + min(SNR, max_snr). The 1 keeps the weight of v where all is noise,
    where min-SNR alone has none. None is ``MOST_SNR`` for "x0" and no bound for the others, whose weight is then 1.
    """
    snr = alpha_bar / (1 - alpha_bar)
    if kind == "x0":
        return 1 + snr.clamp(max=MOST_SNR if max_snr is None else max_snr)
    if max_snr is None:
        return torch.ones_like(snr)
    bounded = snr.clamp(max=max_snr)
    return bounded / snr if kind == "eps" else (1 + bounded) / (1 + snr)


def squared_error(
    kind: str, output: Tensor, x0: Tensor, noise: Tensor, alpha_bar: Tensor, max_snr: float | None = None
) -> Tensor:
    """Returns the mean squared error of a network's output of this kind times its ``error_weight``, [b].

    Raises ValueError on another kind.
    """
    error = mean_over_row((output - regression_target(kind, x0, noise, alpha_bar)) ** 2)
    return error * error_weight(kind, alpha_bar, max_snr).to(error)


def predict(
    kind: str, output: Tensor, x_t: Tensor, alpha_bar: Tensor, clip: float | None = None, threshold: float = 0.0
) -> Prediction:
    """Reads a network's output for x_t [b, c, ...] as a prediction of kind "eps", "v" or "x0".

    An output with 2c channels holds the learned variance, from -1 to 1, in its second half. ``clip`` bounds x0 to
    [-clip, clip], and the noise is then the one that belongs to the bounded x0. With a ``threshold`` above 0, a row of
    which less than this share lies within these bounds is shrunk until the share does, and then bounded: dynamic
    thresholding (Saharia et al. 2022, Imagen, section 2.3). Raises ValueError on another kind.
    """
    fraction = None
    if output.shape[1] == 2 * x_t.shape[1]:
        output, variance = output.chunk(2, dim=1)
        fraction = (variance + 1) / 2
    signal, sigma = per_row(alpha_bar.sqrt(), x_t), per_row((1 - alpha_bar).sqrt(), x_t)
    if kind == "eps":
        x0, eps = (x_t - sigma * output) / signal, output
    elif kind == "v":
        x0, eps = signal * x_t - sigma * output, sigma * x_t + signal * output
    elif kind == "x0":
        x0, eps = output, (x_t - signal * output) / sigma
    else:
        raise ValueError(f"prediction is {kind!r}: use 'eps', 'v' or 'x0'")
    if clip is not None:
        if threshold:
            # Clipping alone would saturate the colours that strong guidance drives out of the range.
            reach = x0.abs().flatten(1).quantile(threshold, dim=1).clamp(min=clip)
            x0 = x0 * per_row(clip / reach, x0)
        x0 = x0.clamp(-clip, clip)
        # The noise that belongs to the clipped x0: DDIM takes its direction from it.
        eps = (x_t - signal * x0) / sigma
    return Prediction(x0, eps, fraction)


def posterior_mean(x0: Tensor, x_t: Tensor, alpha_bar: Tensor, previous: Tensor) -> Tensor:
    """Returns the mean of q(x_s given x_t, x0), where x_s has level ``previous`` > ``alpha_bar`` (DDPM, equation 7)."""
    ratio = alpha_bar / previous
    of_x0 = previous.sqrt() * (1 - ratio) / (1 - alpha_bar)
    of_x_t = ratio.sqrt() * (1 - previous) / (1 - alpha_bar)
    return per_row(of_x0, x_t) * x0 + per_row(of_x_t, x_t) * x_t


def posterior_variance(alpha_bar: Tensor, previous: Tensor) -> Tensor:
    """Returns the variance of q(x_s given x_t, x0), float64 [b]; zero where x_s is the data (``previous`` is 1)."""
    return (1 - alpha_bar / previous) * (1 - previous) / (1 - alpha_bar)


def log_variance_range(schedule: Schedule, t: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logarithms of the smallest and largest variance of the step from t to ``previous``, float64 [b].

    The posterior variance and beta (improved DDPM, equation 15). The step to the data has no posterior variance, so
    the lower bound is never below the one of step 1, as in that paper's code.
    """
    level, level_previous = schedule.at(t), schedule.at(previous)
    low = posterior_variance(level, level_previous).clamp(min=_smallest_variance(schedule))
    return low.log(), (1 - level / level_previous).log()


@cache
def _smallest_variance(schedule: Schedule) -> float:
    return float(posterior_variance(schedule.alpha_bar[1], schedule.alpha_bar[0]))


def learned_log_variance(fraction: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Returns the log variance, shaped like ``fraction``, between the bounds of ``log_variance_range``, [b] each."""
    return fraction * per_row(high, fraction) + (1 - fraction) * per_row(low, fraction)


def mean_over_row(x: Tensor) -> Tensor:
    """Returns the mean of each row of [b, ...]: [b]."""
    return x.flatten(1).mean(1)


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Returns KL divergence of one normal distribution from another, element by element, in nats."""
    gap = other_log_variance - log_variance
    distance = (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    return 0.5 * (gap - 1 + torch.exp(-gap) + distance)


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Returns the negative log probability, in nats, of the 8-bit value that x [-1, 1] stands for (DDPM, equation 13).

    Each value owns 1/255 to either side; the first and last own everything beyond.
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = torch.special.ndtr((x - mean + 1 / 255) * inverse_std)
    lower = torch.special.ndtr((x - mean - 1 / 255) * inverse_std)
    # 0.999 lies between the last two of 256 levels, so that the level 1 itself is meant whatever its rounding.
    upper = torch.where(x > 0.999, 1.0, upper)
    lower = torch.where(x < -0.999, 0.0, lower)
    return -(upper - lower).clamp(min=1e-12).log()


def variational_bound(prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Returns one term of the variational bound, [b], in bits per dimension (improved DDPM, equations 4 to 7).

    The KL divergence of the predicted from the true posterior, or, at t = 0, the likelihood of the 8-bit image.
    Raises ValueError when the prediction has no learned variance.
    """
    if prediction.variance_fraction is None:
        raise ValueError("the variational bound needs a network that predicts its variance: 2c output channels")
    level, level_previous = schedule.at(t), schedule.at(t - 1)
    low, high = log_variance_range(schedule, t, t - 1)
    log_variance = learned_log_variance(prediction.variance_fraction, low, high)
    mean = posterior_mean(prediction.x0, x_t, level, level_previous)
    true_mean = posterior_mean(x0, x_t, level, level_previous)
    bound = mean_over_row(normal_kl(true_mean, per_row(low, x_t), mean, log_variance))
    # On a GPU it is computed always: to ask whether any t is 0 would synchronise.
    if not t.is_cpu or (t == 0).any():
        nll = mean_over_row(discretized_gaussian_nll(x0, mean, log_variance))
        bound = torch.where(t == 0, nll, bound)
    return bound / log(2)


def hybrid_loss(
    kind: str,
    output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    schedule: Schedule,
    max_snr: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the squared error of the prediction and weighted variational bound, [b] each; the loss is their sum.

    ``output`` [b, 2c, ...]. The bound's weight is T / 1000: one term times T estimates the whole bound, which counts
    1/1000 (improved DDPM, equation 16). ``max_snr`` is ``error_weight``'s.
    """
    alpha_bar = schedule.at(t)
    mean, variance = output.chunk(2, dim=1)
    error = squared_error(kind, mean, x0, noise, alpha_bar, max_snr)
    x_t = q_sample(x0, noise, alpha_bar)
    # Detached: the bound trains the variance alone, as its gradient for the mean is noisy.
    prediction = predict(kind, torch.cat([mean.detach(), variance], dim=1), x_t, alpha_bar)
    bound = variational_bound(prediction, x0, x_t, t, schedule)
    return error, bound * (schedule.steps / 1000)
