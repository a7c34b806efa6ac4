"""Every sampler on Gaussian data whose score is known: the error falls with the steps at the sampler's order.

With the best prediction a step is affine in x and in its noise. So the moments of the samples are not estimated from
many of them: one row carries the mean, and one more for every dimension of the start and of each step's noise carries
the deviation that it causes.
"""

from collections.abc import Callable
from math import log2

import pytest
import torch
from torch import Tensor

from models.diffusion.analytic import analytic_variance
from models.diffusion.samplers import ancestral, ddim, dpm_solver
from models.diffusion.schedules import Schedule
from models.random_streams import RandomStreams
from tests.models.closed_form import Gaussian, anisotropic, even_log_snr, uneven

SCHEDULE = even_log_snr(769)
Sampler = Callable[[Gaussian, Tensor, Tensor, RandomStreams], Tensor]


class Deviations(RandomStreams):
    """The mean's row, then one row for each dimension of the start, then of each step's noise: 1 there, else 0."""

    def __init__(self, steps: int, dimensions: int):
        super().__init__([(0, 1 + dimensions * (1 + steps))])

    def normal(self, purpose: str, *shape: int) -> Tensor:
        first = 1 + shape[0] * (1 + int(purpose.removeprefix("step")))
        noise = torch.zeros(self.rows, *shape, dtype=torch.float64)
        noise[first : first + shape[0]] = torch.eye(shape[0], dtype=torch.float64)
        return noise


def moments(data: Gaussian, grid: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the samples, exactly, from x that is distributed as the noised data are."""
    rng = Deviations(len(grid), len(data.mean))
    mean, root = data.start(grid)
    x = mean.repeat(rng.rows, 1)
    x[1 : 1 + len(root)] += root
    samples = sampler(data, x, grid, rng)
    deviations = samples[1:] - samples[0]
    return samples[0], deviations.T @ deviations


def even(schedule: Schedule, count: int) -> Tensor:
    return torch.arange(0, schedule.steps, (schedule.steps - 1) // count).flip(0)


def analytic(data: Gaussian, x: Tensor, grid: Tensor, rng: RandomStreams) -> Tensor:
    return ancestral(data, x, grid, SCHEDULE, rng, analytic_variance(data.gamma(), SCHEDULE, grid))


SAMPLERS: dict[str, Sampler] = {
    "ancestral, small": lambda data, x, grid, rng: ancestral(data, x, grid, SCHEDULE, rng, "small"),
    "ancestral, learned": lambda data, x, grid, rng: ancestral(data, x, grid, SCHEDULE, rng, "learned"),
    "ancestral, analytic": analytic,
    "ddim, eta 0": lambda data, x, grid, rng: ddim(data, x, grid, SCHEDULE),
    "ddim, eta 0.5": lambda data, x, grid, rng: ddim(data, x, grid, SCHEDULE, 0.5, rng),
    "ddim, eta 1": lambda data, x, grid, rng: ddim(data, x, grid, SCHEDULE, 1.0, rng),
    "dpm": lambda data, x, grid, rng: dpm_solver(data, x, grid, SCHEDULE),
}


@pytest.mark.parametrize("make_grid", [even, uneven])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_converges_at_its_order(name: str, make_grid: Callable[[Schedule, int], Tensor]) -> None:
    data = anisotropic(SCHEDULE, fraction=0.5)
    errors = []
    for count in (64, 128):
        mean, covariance = moments(data, make_grid(SCHEDULE, count), SAMPLERS[name])
        torch.testing.assert_close(mean, data.mean, atol=1e-8, rtol=0)
        errors.append((covariance - data.covariance).norm().item())
    assert errors[1] < 0.1
    assert log2(errors[0] / errors[1]) == pytest.approx(2 if name == "dpm" else 1, abs=0.15)


def test_dpm_solver_is_of_second_order_sample_by_sample_on_an_uneven_grid() -> None:
    """Against the exact solution of the probability-flow ODE."""
    data = anisotropic(SCHEDULE)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = data.flow(x, SCHEDULE.alpha_bar[-1], torch.tensor(1.0, dtype=torch.float64))
    errors = [(dpm_solver(data, x, uneven(SCHEDULE, n), SCHEDULE) - exact).norm().item() for n in (64, 128)]
    assert log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)
