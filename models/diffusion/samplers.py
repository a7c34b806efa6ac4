"""Samplers: plain functions from noise to data, for images and for vectors.

A step's noise comes from the draw under the purpose "step0", "step1", ..., so a row's sample depends on its own seed
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
from models.draw import Draw

Denoise = Callable[[Tensor, Tensor], Prediction]
"""(x_t [b, ...], t int64 [b]) to a prediction."""

Callback = Callable[[int, Tensor], None]
"""Called after every step with the number of steps done and the current estimate of the clean data."""


def grid_steps(grid: Tensor, schedule: Schedule, x: Tensor) -> Iterator[tuple[int, Tensor, Tensor, bool]]:
    """Yields the steps down a grid: number of the step, t [b], previous t [b], and whether it leads to the data.

    The last previous t is -1, the data. Timesteps are int64, on the device of x, and not read from there.

    Raises ValueError on a grid that does not fall, or begins beyond the schedule.
    """
    if grid.ndim != 1 or len(grid) == 0 or (grid.diff() >= 0).any() or grid[-1] < 0:
        raise ValueError("a sampling grid must hold timesteps in falling order, down to 0 or more")
    if grid[0] >= schedule.steps:
        raise ValueError(f"timestep {int(grid[0])} is beyond the schedule: it has {schedule.steps}, counted from 0")
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
    draw: Draw,
    variance: str | Tensor = "learned",
    callback: Callback | None = None,
) -> Tensor:
    """Returns DDPM's reverse steps (Ho et al. 2020, algorithm 2) on a grid that may skip timesteps.

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
                # A small network that cannot draw what little noise hides asks for far more than the upper bound there,
                # and so everywhere. From one timestep to the next the bounds are close, but not on a coarse grid.
                fraction = prediction.variance_fraction.clamp(0, 1)
                std = torch.exp(0.5 * learned_log_variance(fraction, *log_variance_range(schedule, t, previous)))
            else:
                raise ValueError(f"variance {variance!r} does not fit: use 'small', or 'learned' if the model has one")
            x = x + std * draw.normal(f"step{i}", *x.shape[1:])
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
    draw: Draw | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Returns DDIM (Song et al. 2021, equation 12) on any grid.

    ``noise`` [b, ...] is x at the first timestep. ``eta`` 0 is deterministic and needs no draw, 1 has DDPM's
    variance. Raises ValueError on a grid that does not fall, or an eta above 0 without a draw.
    """
    if eta > 0 and draw is None:
        raise ValueError(f"DDIM with eta {eta} adds noise: pass a draw, or use eta 0")
    x = noise
    for i, t, previous, last in grid_steps(grid, schedule, noise):
        prediction = denoise(x, t)
        level, level_previous = schedule.at(t), schedule.at(previous)
        added = eta**2 * posterior_variance(level, level_previous)
        direction = per_row((1 - level_previous - added).clamp(min=0).sqrt(), x)
        x = per_row(level_previous.sqrt(), x) * prediction.x0 + direction * prediction.eps
        if draw is not None and eta > 0 and not last:
            x = x + per_row(added.sqrt(), x) * draw.normal(f"step{i}", *x.shape[1:])
        if callback is not None:
            callback(i + 1, prediction.x0)
    return x


@torch.no_grad()
def ddim_inversion(
    denoise: Denoise, x0: Tensor, grid: Tensor, schedule: Schedule, callback: Callback | None = None
) -> Tensor:
    """Returns the noise at the first timestep of ``grid`` from which ``ddim`` with eta 0 leads to ``x0`` [b, ...].

    DDIM's steps upwards, each with the prediction at the timestep that it leaves (Song et al. 2021, section 4.3;
    Dhariwal & Nichol 2021, appendix F). The data has no timestep: there the noise is the one predicted at the last of
    the grid. Inverse up to an error of first order in the steps. Raises ValueError on a grid that does not fall.
    """
    x = x0
    for i, (_, t, previous, _) in enumerate(reversed(list(grid_steps(grid, schedule, x0)))):
        prediction = denoise(x, t if i == 0 else previous)
        estimate = x if i == 0 else prediction.x0
        level = schedule.at(t)
        x = per_row(level.sqrt(), x) * estimate + per_row((1 - level).sqrt(), x) * prediction.eps
        if callback is not None:
            callback(i + 1, estimate)
    return x
