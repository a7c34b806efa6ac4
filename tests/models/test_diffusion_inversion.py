from math import log2

import pytest
import torch
from diffusers import DDIMInverseScheduler
from torch import Tensor

from models.diffusion.process import Prediction, predict
from models.diffusion.samplers import ddim, ddim_inversion
from models.diffusion.schedules import fast27_grid, make_schedule
from tests.models.closed_form import anisotropic, even_log_snr, uneven

SCHEDULE = make_schedule("cosine", 1000)


def noise_in(x_t: Tensor, t: Tensor) -> Tensor:
    """A fixed prediction of the noise, [b, 3, 4, 4]."""
    return torch.tanh(x_t + t.view(-1, 1, 1, 1) / 500)


def denoise(x_t: Tensor, t: Tensor) -> Prediction:
    return predict("eps", noise_in(x_t, t), x_t, SCHEDULE.at(t))


def images() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("count", [10, 50])
def test_it_equals_diffusers(count: int) -> None:
    """Their pipelines ask the network about the timestep that a step leads to; we ask about the one that it leaves."""
    scheduler = DDIMInverseScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, set_alpha_to_one=True)
    scheduler.alphas_cumprod = SCHEDULE.alpha_bar  # its own are float32
    scheduler.set_timesteps(count)
    expected = images()
    for t in scheduler.timesteps:
        asked = (t - 1000 // count).clamp(min=0)
        expected = scheduler.step(noise_in(expected, asked.expand(2)), t, expected).prev_sample
    ours = ddim_inversion(denoise, images(), scheduler.timesteps.flip(0), SCHEDULE)
    torch.testing.assert_close(ours, expected, atol=1e-8, rtol=1e-8)


def test_inverted_and_sampled_again_data_come_back_ever_closer() -> None:
    """On an uneven grid: the noise is that of the exact flow, and the way back leads to the start, at first order."""
    schedule = even_log_snr(769)
    data = anisotropic(schedule)
    x0 = data.mean + torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = data.flow(x0, torch.tensor(1.0, dtype=torch.float64), schedule.alpha_bar[-1])
    forth, back = [], []
    for count in (64, 128, 256):
        grid = uneven(schedule, count)
        noise = ddim_inversion(data, x0, grid, schedule)
        forth.append((noise - exact).norm().item())
        back.append((ddim(data, noise, grid, schedule) - x0).norm().item())
    for errors in (forth, back):
        assert log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.2)
        assert log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.15)


def test_every_step_is_reported() -> None:
    reported: list[tuple[int, Tensor]] = []
    x0 = images()
    ddim_inversion(denoise, x0, fast27_grid(1000), SCHEDULE, lambda i, x: reported.append((i, x)))
    assert [i for i, _ in reported] == list(range(1, 28))
    assert torch.equal(reported[0][1], x0)
