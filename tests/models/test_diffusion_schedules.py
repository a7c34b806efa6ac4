from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UnCLIPScheduler
from diffusers.schedulers.scheduling_unclip import betas_for_alpha_bar
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.diffusion.schedules import (
    NOISIEST,
    Schedule,
    fast27_grid,
    log_snr_grid,
    make_schedule,
    strided_grid,
    trailing_grid,
)


def betas(schedule: Schedule) -> torch.Tensor:
    before = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bar[:-1]])
    return 1 - schedule.alpha_bar / before


def test_a_schedule_is_kept_on_the_cpu_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        made = [make_schedule(name, 7) for name in ("cosine", "linear")]
    assert [schedule.alpha_bar.device.type for schedule in made] == ["cpu", "cpu"]
    assert make_schedule("cosine", 7) is made[0]


@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_cosine_betas_equal_those_of_diffusers(steps: int) -> None:
    torch.testing.assert_close(
        betas(make_schedule("cosine", steps)).float(), betas_for_alpha_bar(steps), atol=1e-6, rtol=0
    )


def test_linear_betas_equal_those_of_diffusers() -> None:
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").betas
    torch.testing.assert_close(betas(make_schedule("linear", 1000)).float(), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [10, 64, 1000])
def test_alpha_bar_falls_from_almost_one_to_almost_zero(name: str, steps: int) -> None:
    alpha_bar = make_schedule(name, steps).alpha_bar
    assert alpha_bar.dtype == torch.float64
    assert (alpha_bar.diff() < 0).all()
    assert alpha_bar[0] > 0.97 * (1 - 1 / steps)
    assert 0 < alpha_bar[-1] < 1e-3


def test_the_data_is_timestep_minus_one() -> None:
    schedule = make_schedule("cosine", 10)
    levels = schedule.at(torch.tensor([[-1, 0], [9, 3]]))
    assert levels[0, 0] == 1
    torch.testing.assert_close(levels.flatten()[1:], schedule.alpha_bar[[0, 9, 3]], rtol=0, atol=0)


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match=r"'sigmoid'.*'cosine' or 'linear'"):
        make_schedule("sigmoid", 10)


@pytest.mark.parametrize("steps", [1000, 100])
def test_strided_grids_equal_those_of_diffusers(steps: int) -> None:
    scheduler = UnCLIPScheduler(num_train_timesteps=steps)
    for count in (7, 15, 25, 27, 50, 64, *range(2, steps + 1, 7), *(250,) * (steps >= 250)):
        scheduler.set_timesteps(count)
        assert torch.equal(strided_grid(steps, count), scheduler.timesteps)


@pytest.mark.parametrize("steps", [1000, 100])
def test_trailing_grids_equal_those_of_diffusers(steps: int) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=steps, timestep_spacing="trailing")
    for count in (*range(2, 16), 25, 50, steps):
        scheduler.set_timesteps(count)
        assert torch.equal(trailing_grid(steps, count), scheduler.timesteps)
        assert trailing_grid(steps, count)[-1] == max(round(steps / count) - 1, 0)


def log_snr(steps: int, count: int) -> Tensor:
    return log_snr_grid(make_schedule("cosine", steps), count)


@pytest.mark.parametrize("grid", [strided_grid, trailing_grid, log_snr])
@pytest.mark.parametrize("count", [0, 1, 11])
def test_a_grid_of_more_steps_than_there_are_is_refused(grid: Callable[[int, int], Tensor], count: int) -> None:
    with pytest.raises(ValueError, match="use 2 to 10"):
        grid(10, count)


def test_the_27_steps_are_10_10_3_2_2_in_five_sections() -> None:
    grid = fast27_grid(1000)
    assert torch.histc(grid.float(), 5, 0, 1000).tolist() == [10, 10, 3, 2, 2]
    assert grid[:7].tolist() == [997, 800, 799, 600, 599, 500, 400]
    assert grid[-3:].tolist() == [44, 22, 0]


@pytest.mark.parametrize("steps", [50, 51, 64, 333, 1000])
def test_the_27_steps_fall_whatever_the_number_of_diffusion_steps(steps: int) -> None:
    grid = fast27_grid(steps)
    assert len(grid) == 27
    assert (grid.diff() < 0).all()
    assert grid[0] == steps - 3
    assert grid[-1] == 0


def test_too_few_diffusion_steps_for_27() -> None:
    with pytest.raises(ValueError, match="50 or more"):
        fast27_grid(49)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_log_snr_grids_are_even_after_the_first_step_as_far_as_timesteps_allow(name: str) -> None:
    schedule = make_schedule(name, 1000)
    half_log_snr = torch.logit(schedule.alpha_bar) / 2
    grid = log_snr_grid(schedule, 25)
    visited = half_log_snr[grid]
    assert visited[1].item() == pytest.approx(NOISIEST, abs=0.02)
    step = (visited[-1] - visited[1]) / 23
    coarse = half_log_snr[grid - (grid > 0).long()] - half_log_snr[grid + (grid < 999).long()]
    assert ((visited[1:].diff() - step).abs() <= coarse[2:] + coarse[1:-1]).all()
    assert (visited[1:12].diff() / step - 1).abs().max() < 0.03


@given(name=st.sampled_from(["cosine", "linear"]), steps=st.integers(2, 300), data=st.data())
def test_log_snr_grids_fall_from_the_last_timestep_to_the_first(name: str, steps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, steps))
    grid = log_snr_grid(make_schedule(name, steps), count)
    assert len(grid) == count
    assert (grid[0], grid[-1]) == (steps - 1, 0)
    assert (grid.diff() < 0).all()
