from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.diffusion.analytic import analytic_variance, fill_in, squared_noise
from models.diffusion.process import posterior_variance
from models.diffusion.schedules import Schedule, fast27_grid, log_snr_grid, make_schedule, strided_grid
from models.random_streams import RandomStreams
from tests.models.closed_form import Gaussian, anisotropic

SCHEDULE = make_schedule("cosine", 1000)


def levels(grid: Tensor, schedule: Schedule = SCHEDULE) -> tuple[Tensor, Tensor]:
    """alpha_bar where each step begins and where it ends."""
    return schedule.at(grid), schedule.at(torch.cat([grid[1:], torch.tensor([-1])]))


def optimal(data: Gaussian, grid: Tensor) -> Tensor:
    """The mean over dimensions of the variance of q(x_s given x_t), by conditioning the joint normal of x_s and x_t."""
    level, previous = levels(grid)
    at_t, at_s = data.covariance_at(level), data.covariance_at(previous)
    between = (level / previous).sqrt()[:, None, None] * at_s  # x_t is the scaled x_s and noise of its own
    conditional = at_s - between @ torch.linalg.inv(at_t) @ between.mT
    return conditional.diagonal(dim1=1, dim2=2).mean(1)


@pytest.mark.parametrize(
    "grid", [strided_grid(1000, 64), fast27_grid(1000), log_snr_grid(SCHEDULE, 20), strided_grid(1000, 1000)], ids=len
)
def test_it_is_the_variance_of_x_s_given_x_t_for_gaussian_data(grid: Tensor) -> None:
    data = anisotropic(SCHEDULE)
    ours = analytic_variance(data.gamma(), SCHEDULE, grid)
    torch.testing.assert_close(ours, optimal(data, grid), atol=1e-9, rtol=0)


def test_measured_on_data_it_is_the_optimum_within_what_sampling_allows() -> None:
    """From 64 timesteps and their noise, on the grid of the paper."""
    data, times = anisotropic(SCHEDULE), strided_grid(1000, 64).flip(0).tolist()
    rng = RandomStreams([(seed, 500) for seed in range(40)])
    x0 = data.mean + rng.normal("x0", 3).double() @ torch.linalg.cholesky(data.covariance).T
    gamma = fill_in(squared_noise(data, x0, times, SCHEDULE, rng).mean(0), times, 1000)
    torch.testing.assert_close(gamma, data.gamma(), atol=0.02, rtol=0)
    grid, mean_square = strided_grid(1000, 64), (data.covariance.diagonal() + data.mean**2).mean().item()
    ours, best = analytic_variance(gamma, SCHEDULE, grid, mean_square), optimal(data, grid)
    torch.testing.assert_close(ours, best, atol=1e-4, rtol=1e-3)


def test_every_row_and_timestep_has_its_own_noise_and_rows_do_not_depend_on_the_batch() -> None:
    data, times = anisotropic(SCHEDULE), [3, 400, 900]
    x0 = data.mean.expand(3, 3)
    together = squared_noise(data, x0, times, SCHEDULE, RandomStreams([(1, 1), (2, 2)]))
    assert together.shape == (3, 3)
    assert len(together.unique()) == 9
    alone = squared_noise(data, x0[1:], times, SCHEDULE, RandomStreams([(2, 2)]))
    torch.testing.assert_close(together[1:], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", [strided_grid(1000, 64), fast27_grid(1000)], ids=len)
def test_whatever_gamma_is_the_variance_stays_within_its_bounds(grid: Tensor) -> None:
    level, previous = levels(grid)
    small = posterior_variance(level, previous)
    gamma = torch.linspace(-1, 2, 1000, dtype=torch.float64)
    passed_on = previous.sqrt() * (1 - level / previous) / (1 - level)
    ours = analytic_variance(gamma, SCHEDULE, grid, data_variance=0.3)
    assert (ours >= small).all()
    assert (ours <= small + passed_on**2 * 0.3 + 1e-12).all()
    unbounded = analytic_variance(gamma, SCHEDULE, grid)
    assert (unbounded <= small + passed_on**2 * (1 - level) / level * (1 + 1e-9)).all()
    torch.testing.assert_close(analytic_variance(torch.full((1000,), 5.0), SCHEDULE, grid), small, atol=0, rtol=0)


@pytest.mark.parametrize("make", [lambda t: 2 * t + 1, lambda t: t**0])
def test_gamma_is_straight_between_the_timesteps_where_it_was_measured(make: Callable[[Tensor], Tensor]) -> None:
    times = [0, 3, 10, 19]
    filled = fill_in(make(torch.tensor(times, dtype=torch.float64)), times, 20)
    torch.testing.assert_close(filled, make(torch.arange(20, dtype=torch.float64)), atol=1e-12, rtol=0)
