"""Analytic-DPM (Bao et al. 2022): the optimal variance of each reverse step, in closed form.

It rests on one statistic of the data, Gamma: at timestep t the mean square of a component of the predicted noise,
E ||eps(x_t, t)||^2 / d. The less of the noise (variance 1) a model can tell from x_t, the less it knows of x0.
"""

from collections.abc import Sequence
from math import inf

import numpy as np
import torch
from torch import Tensor

from models.diffusion.process import mean_over_row, posterior_mean, posterior_variance, q_sample
from models.diffusion.samplers import Denoise
from models.diffusion.schedules import Schedule
from models.random_streams import RandomStreams


@torch.no_grad()
def squared_noise(denoise: Denoise, x0: Tensor, times: Sequence[int], schedule: Schedule, rng: RandomStreams) -> Tensor:
    """Returns an estimate of Gamma from each row of x0 [b, ...] at each of ``times``, float64 [b, times].

    Their mean over rows is Gamma. Every row and timestep has noise of its own.
    """
    # A control variate: the true noise's mean square is 1 on average, and where there is much noise nearly that of the
    # predicted noise. Their difference varies far less than either.
    columns = []
    for time in times:
        t = torch.full((len(x0),), time, device=x0.device)
        noise = rng.normal(f"gamma{time}", *x0.shape[1:])
        predicted = denoise(q_sample(x0, noise, schedule.at(t)), t).eps
        columns.append(1 + mean_over_row(predicted.double() ** 2 - noise.double() ** 2))
    return torch.stack(columns, dim=1)


def fill_in(gamma: Tensor, times: Sequence[int], steps: int) -> Tensor:
    """Returns Gamma at all timesteps, float64 [steps], from Gamma at rising ``times``.

    It is linear in between, and constant outside.
    """
    return torch.from_numpy(np.interp(np.arange(steps), times, gamma.double().cpu().numpy()))


def analytic_variance(gamma: Tensor, schedule: Schedule, grid: Tensor, data_variance: float = inf) -> Tensor:
    """Returns the optimal variance of each step down ``grid``, float64 [len(grid)] (theorem 1).

    It is the posterior's variance, plus the variance of x0 given x_t as the posterior's mean passes it on. ``gamma``
    [T]; ``data_variance`` is a bound on the mean square of a component of x0.
    """
    # The bounds of section 3.2, which a model's errors may break: Gamma is from 0 to 1, and x0 varies no more given x_t
    # than without it. At the noisy end of a cosine schedule the second decides: there 1 - Gamma is multiplied by 10^8.
    level, previous = schedule.at(grid), schedule.at(torch.cat([grid[1:], grid.new_tensor([-1])]))
    known = gamma.to(level)[grid].clamp(0, 1)
    unknown = ((1 - level) / level * (1 - known)).clamp(max=data_variance)
    passed_on = posterior_mean(torch.ones_like(level), torch.zeros_like(level), level, previous)
    return posterior_variance(level, previous) + passed_on**2 * unknown
