"""DPM-Solver++(2M): a second-order sampler of the probability-flow ODE, for few steps (Lu et al. 2022, algorithm 2)."""

import torch
from torch import Tensor

from models.diffusion.process import per_row
from models.diffusion.samplers import Callback, Denoise, grid_steps
from models.diffusion.schedules import Schedule


@torch.no_grad()
def dpm_solver(
    denoise: Denoise, noise: Tensor, grid: Tensor, schedule: Schedule, callback: Callback | None = None
) -> Tensor:
    """Returns DPM-Solver++(2M) from ``noise`` [b, ...], which is x at the first timestep of ``grid``, to the data.

    The predicted data is extrapolated along lambda, half the log signal-to-noise ratio, through the last two
    predictions, so that one evaluation a step gives second order on any grid (``log_snr_grid`` suits it). The first
    step has no second prediction, and the one to the data is infinitely long: these two are of first order, that is
    DDIM's. Raises ValueError on a grid that does not fall.
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
        kept = ((1 - level_previous) / (1 - level)).sqrt()
        x = per_row(kept, x) * x + per_row(-level_previous.sqrt() * torch.expm1(-h), x) * data
        earlier = x0, h
        if callback is not None:
            callback(i + 1, x0)
    return x
