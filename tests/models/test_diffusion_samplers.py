from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, SchedulerMixin, UnCLIPScheduler
from torch import Tensor

from models.diffusion.process import Prediction, predict
from models.diffusion.samplers import Denoise, ancestral, ddim, dpm_solver
from models.diffusion.schedules import fast27_grid, make_schedule, strided_grid
from models.random_streams import RandomStreams
from tests.models.closed_form import Gaussian

SCHEDULE = make_schedule("cosine", 1000)


class SharedNoise(RandomStreams):
    """Noise in the order in which a scheduler of diffusers asks its generator for it."""

    def __init__(self, rows: int):
        super().__init__([(0, rows)])
        self.generator = torch.Generator().manual_seed(7)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        return torch.randn(self.rows, *shape, generator=self.generator, dtype=torch.float64)


def widen(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Give a scheduler of diffusers float64 tables: its own are too coarse for 1 - alpha_bar near the data."""
    scheduler.alphas_cumprod = SCHEDULE.alpha_bar
    scheduler.betas = 1 - SCHEDULE.alpha_bar / SCHEDULE.at(torch.arange(1000) - 1)
    scheduler.alphas = 1 - scheduler.betas
    return scheduler


def network(x_t: Tensor, t: Tensor) -> Tensor:
    """A fixed function with a learned variance, [b, 3, h, w] to [b, 6, h, w]."""
    phase = t.view(-1, 1, 1, 1) / 500
    return torch.cat([torch.tanh(x_t + phase), torch.sin(3 * x_t - phase)], dim=1)


def denoise_network(clip: float | None = None) -> Denoise:
    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return predict("eps", network(x_t, t), x_t, SCHEDULE.at(t), clip)

    return denoise


def start(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("grid", [strided_grid(1000, 25), strided_grid(1000, 250), fast27_grid(1000)], ids=len)
def test_ancestral_sampling_equals_diffusers(grid: Tensor) -> None:
    for variance, kind in (("learned", "learned_range"), ("small", "fixed_small_log")):
        scheduler, generator = widen(UnCLIPScheduler(variance_type=kind)), torch.Generator().manual_seed(7)
        expected = start()
        for t, previous in zip(grid.tolist(), [*grid.tolist()[1:], -1], strict=True):
            output = network(expected, torch.full((2,), t))
            output = output if variance == "learned" else output[:, :3]
            expected = scheduler.step(output, t, expected, prev_timestep=previous, generator=generator).prev_sample
        ours = ancestral(denoise_network(clip=1.0), start(), grid, SCHEDULE, SharedNoise(2), variance)
        torch.testing.assert_close(ours, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("asked", "bound"), [(7.0, 1.0), (-3.0, 0.0)])
def test_a_learned_variance_beyond_its_bounds_is_the_bound(asked: float, bound: float) -> None:
    """As trained networks ask for it: unbounded, a coarse grid turned their images into noise."""
    grid = strided_grid(1000, 50)
    data = (Gaussian(SCHEDULE, torch.zeros(4).double(), torch.eye(4).double(), f) for f in (asked, bound))
    ours, wanted = (ancestral(one, start()[:, 0, 0], grid, SCHEDULE, SharedNoise(2)) for one in data)
    torch.testing.assert_close(ours, wanted, atol=0, rtol=0)


def test_ddim_equals_diffusers() -> None:
    scheduler = widen(DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, set_alpha_to_one=True))
    scheduler.set_timesteps(50)
    for eta in (0.0, 0.5, 1.0):
        expected, generator = start(), torch.Generator().manual_seed(7)
        for t in scheduler.timesteps:
            output = network(expected, t.expand(2))[:, :3]
            last = t == scheduler.timesteps[-1]  # diffusers adds noise to the finished image; we do not
            expected = scheduler.step(output, t, expected, 0.0 if last else eta, generator=generator).prev_sample
        ours = ddim(denoise_network(), start(), scheduler.timesteps, SCHEDULE, eta, SharedNoise(2))
        torch.testing.assert_close(ours, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpm"])
def test_the_last_step_is_the_predicted_image_and_every_step_is_reported(sampler: str) -> None:
    reported: list[tuple[int, Tensor]] = []
    image = torch.linspace(-1, 1, 96, dtype=torch.float64).view(2, 3, 4, 4)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return predict("x0", image, x_t, SCHEDULE.at(t))

    grid, rng = strided_grid(1000, 4), RandomStreams([(0, 2)])
    run: dict[str, Callable[..., Tensor]] = {
        "ancestral": partial(ancestral, rng=rng, variance="small"), "ddim": ddim, "dpm": dpm_solver
    }  # fmt: skip
    out = run[sampler](denoise, start(), grid, SCHEDULE, callback=lambda i, x: reported.append((i, x)))
    torch.testing.assert_close(out, image, atol=1e-6, rtol=0)
    assert [i for i, _ in reported] == [1, 2, 3, 4]
    assert torch.equal(reported[-1][1], image)


def test_a_wrong_use_of_a_sampler_is_refused() -> None:
    grid, rng = strided_grid(1000, 4), RandomStreams([(0, 2)])
    with pytest.raises(ValueError, match="falling order"):
        ddim(denoise_network(), start(), grid.flip(0), SCHEDULE)
    with pytest.raises(ValueError, match="timestep 1000 is beyond the schedule: it has 1000"):
        ddim(denoise_network(), start(), grid + 1, SCHEDULE)
    with pytest.raises(ValueError, match="pass rng"):
        ddim(denoise_network(), start(), grid, SCHEDULE, eta=0.5)
    with pytest.raises(ValueError, match="'huge'"):
        ancestral(denoise_network(), start(), grid, SCHEDULE, rng, "huge")

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return predict("eps", x_t, x_t, SCHEDULE.at(t))

    with pytest.raises(ValueError, match="'learned' if the model has one"):
        ancestral(denoise, start(), grid, SCHEDULE, rng, "learned")
