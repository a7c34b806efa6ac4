import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from models.diffusion.process import Prediction, predict
from models.diffusion.samplers import ddim, dpm_solver
from models.diffusion.schedules import fast27_grid, log_snr_grid, make_schedule, strided_grid

SCHEDULE = make_schedule("cosine", 1000)
GRIDS = [strided_grid(1000, 25), fast27_grid(1000), log_snr_grid(SCHEDULE, 20), strided_grid(1000, 4)]


def data(x_t: Tensor, t: Tensor) -> Tensor:
    """A fixed prediction of the data, [b, 3, 4, 4]."""
    return torch.tanh(x_t + t.view(-1, 1, 1, 1) / 500)


def denoise(x_t: Tensor, t: Tensor) -> Prediction:
    return predict("x0", data(x_t, t), x_t, SCHEDULE.at(t))


def start(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def peer(grid: Tensor) -> DPMSolverMultistepScheduler:
    """The scheduler of diffusers with our timesteps, and noise levels of float64 like ours."""
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="sample"
    )
    scheduler.set_timesteps(timesteps=grid.tolist())
    level = SCHEDULE.at(grid)
    scheduler.sigmas = torch.cat([((1 - level) / level).sqrt(), torch.zeros(1, dtype=torch.float64)])
    return scheduler


@pytest.mark.parametrize("grid", GRIDS, ids=len)
def test_every_step_equals_that_of_diffusers_in_float32(grid: Tensor) -> None:
    """With their own choice of where a step is of lower order."""
    scheduler, expected = peer(grid), start(torch.float32)
    for t in grid:
        expected = scheduler.step(data(expected, t.expand(2)), int(t), expected).prev_sample
    ours = dpm_solver(denoise, start(torch.float32), grid, SCHEDULE)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_two_steps_are_those_of_ddim() -> None:
    grid = strided_grid(1000, 2)
    ours = dpm_solver(denoise, start(torch.float64), grid, SCHEDULE)
    torch.testing.assert_close(ours, ddim(denoise, start(torch.float64), grid, SCHEDULE), atol=1e-10, rtol=0)
