"""Samplers: functions from noise to data, for images and for vectors.

A step's noise comes from ``rng`` under the purpose "step0", "step1", ..., so a row's sample depends on its own seed
and on nothing else in the batch.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from models.diffusion.process import (
    Prediction,
    learned_log_variance,
    log_variance_range,
    per_row,
    posterior_mean,
    posterior_variance,
)
from models.diffusion.schedules import Schedule
from models.random_streams import RandomStreams

Denoise = Callable[[Tensor, Tensor], Prediction]
"""Function of x_t [b, ...] and t int64 [b] that returns a prediction."""

Callback = Callable[[int, Tensor], None]
"""Called after every step with the number of steps done and the current estimate of the clean data."""


def grid_steps(grid: Tensor, schedule: Schedule, x: Tensor) -> Iterator[tuple[int, Tensor, Tensor, bool]]:
    """Yields the steps down a grid: number of the step, t [b], previous t [b], and whether it leads to the data.

    The last previous t is -1, the data. Timesteps are int64, on the device of x.

    Raises ValueError on a grid that does not fall, or begins beyond the schedule.
    """
    if grid.ndim != 1 or len(grid) == 0 or (grid.diff() >= 0).any() or grid[-1] < 0:
        raise ValueError("a sampling grid must hold timesteps in falling order, down to 0 or more")
    if grid[0] >= schedule.steps:
        raise ValueError(f"timestep {int(grid[0])} is beyond the schedule: it has {schedule.steps}, counted from 0")
    # Whether a step is the last is known on the host: asking a GPU at each step would synchronise.
    visited = grid.tolist()
    for i, (t, previous) in enumerate(zip(visited, [*visited[1:], -1], strict=True)):
        rows = x.new_ones(len(x), dtype=torch.int64)
        yield i, rows * t, rows * previous, previous < 0


@torch.no_grad()
def ancestral(
    denoise: Denoise,
    noise: Tensor,
    grid: Tensor,
    schedule: Schedule,
    rng: RandomStreams,
    variance: str | Tensor = "learned",
    callback: Callback | None = None,
) -> Tensor:
    """Samples by DDPM's reverse steps (Ho et al. 2020, algorithm 2) on a grid that may skip timesteps.

    ``noise`` [b, ...] is x at the first timestep. ``variance`` is "learned" (the prediction's own, kept within its
    bounds), "small" (the posterior's) or one number for each step of the grid, as ``analytic_variance`` makes them.
    Raises ValueError on another variance, a grid that does not fall, or a learned variance that the prediction lacks.
    """
    x = noise
    for i, t, previous, last in grid_steps(grid, schedule, noise):
        prediction = denoise(x, t)
        level, level_previous = schedule.at(t), schedule.at(previous)
        x = posterior_mean(prediction.x0, x, level, level_previous)
        if not last:
            if isinstance(variance, Tensor):
                std = variance[i].sqrt()
            elif variance == "small":
                std = per_row(posterior_variance(level, level_previous).sqrt(), x)
            elif variance == "learned" and prediction.variance_fraction is not None:
                # A small network asks for far more than the upper bound at low noise. Between neighbouring timesteps
                # the bounds are close and that does no harm, but a coarse grid's are far apart.
                fraction = prediction.variance_fraction.clamp(0, 1)
                std = torch.exp(0.5 * learned_log_variance(fraction, *log_variance_range(schedule, t, previous)))
            else:
                raise ValueError(f"variance {variance!r} does not fit: use 'small', or 'learned' if the model has one")
            x = x + std * rng.normal(f"step{i}", *x.shape[1:])
        if callback is not None:
            callback(i + 1, prediction.x0)
    return x


@torch.no_grad()
def ddim(
    denoise: Denoise,
    noise: Tensor,
    grid: Tensor,
    schedule: Schedule,
    eta: float = 0.0,
    rng: RandomStreams | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Samples by DDIM (Song et al. 2021, equation 12) on any grid.

    ``noise`` [b, ...] is x at the first timestep. ``eta`` 0 is deterministic and needs no ``rng``, 1 has DDPM's
    variance. Raises ValueError on a grid that does not fall, or an eta above 0 without ``rng``.
    """
    if eta > 0 and rng is None:
        raise ValueError(f"DDIM with eta {eta} adds noise: pass rng, or use eta 0")
    x = noise
    for i, t, previous, last in grid_steps(grid, schedule, noise):
        prediction = denoise(x, t)
        level, level_previous = schedule.at(t), schedule.at(previous)
        added = eta**2 * posterior_variance(level, level_previous)
        # Rounding may leave the square just below 0 where eta is 1.
        direction = per_row((1 - level_previous - added).clamp(min=0).sqrt(), x)
        x = per_row(level_previous.sqrt(), x) * prediction.x0 + direction * prediction.eps
        if rng is not None and eta > 0 and not last:
            x = x + per_row(added.sqrt(), x) * rng.normal(f"step{i}", *x.shape[1:])
        if callback is not None:
            callback(i + 1, prediction.x0)
    return x


@torch.no_grad()
def dpm_solver(
    denoise: Denoise, noise: Tensor, grid: Tensor, schedule: Schedule, callback: Callback | None = None
) -> Tensor:
    """Samples by DPM-Solver++(2M), a second-order solver of the probability-flow ODE (Lu et al. 2022, algorithm 2).

    ``noise`` [b, ...] is x at the first timestep of ``grid``. The predicted data is extrapolated along lambda, half the
    log signal-to-noise ratio, through the last two predictions, so that one evaluation a step gives second order on any
    grid (``log_snr_grid`` suits it). The first step has no second prediction, and the one to the data is infinitely
    long: these two are of first order, that is DDIM's. Raises ValueError on a grid that does not fall.
    """
    x = noise
    earlier: tuple[Tensor, Tensor] | None = None  # the last prediction and step
    for i, t, previous, last in grid_steps(grid, schedule, noise):
        x0 = denoise(x, t).x0
        level, level_previous = schedule.at(t), schedule.at(previous)
        h = (torch.logit(level_previous) - torch.logit(level)) / 2
        data = x0
        if earlier is not None and not last:
            x0_before, h_before = earlier
            data = x0 + per_row(h / (2 * h_before), x) * (x0 - x0_before)
        # At the last step h is infinite and level_previous 1: expm1 gives -1, and x becomes the predicted data.
        kept = ((1 - level_previous) / (1 - level)).sqrt()
        x = per_row(kept, x) * x + per_row(-level_previous.sqrt() * torch.expm1(-h), x) * data
        earlier = x0, h
        if callback is not None:
            callback(i + 1, x0)
    return x


@torch.no_grad()
def ddim_inversion(
    denoise: Denoise, x0: Tensor, grid: Tensor, schedule: Schedule, callback: Callback | None = None
) -> Tensor:
    """Returns the noise at the first timestep of ``grid`` from which ``ddim`` with eta 0 leads to ``x0`` [b, ...].

    It takes DDIM's steps upwards, each with the prediction at the timestep that it leaves (Song et al. 2021, section
    4.3; Dhariwal & Nichol 2021, appendix F), and is the inverse up to an error of first order in the steps. Raises
    ValueError on a grid that does not fall.
    """
    x = x0
    for i, (_, t, previous, _) in enumerate(reversed(list(grid_steps(grid, schedule, x0)))):
        # The data has no timestep, so the first step up takes the prediction at the grid's last.
        prediction = denoise(x, t if i == 0 else previous)
        estimate = x if i == 0 else prediction.x0
        level = schedule.at(t)
        x = per_row(level.sqrt(), x) * estimate + per_row((1 - level).sqrt(), x) * prediction.eps
        if callback is not None:
            callback(i + 1, estimate)
    return x
