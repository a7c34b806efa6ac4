"""How each model of the cascade is sampled: which sampler, on which grid."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from models.decoder import Decoder
from models.diffusion.dpm_solver import dpm_solver
from models.diffusion.samplers import Denoise, ancestral, ddim
from models.diffusion.schedules import fast27_grid, log_snr_grid, make_schedule, strided_grid
from models.diffusion_prior import DiffusionPrior, diffusion_prior_variance
from models.draw import Draw
from models.upsampler import Upsampler

Progress = Callable[[str, int, int], None]
"""Called after every step with the stage's name, the number of steps done and the number of steps."""


def ignore(stage: str, step: int, steps: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Reverse:
    """How one model's reverse diffusion runs.

    ``sampler``: "ddpm", with the ``variance`` "small" or "learned"; "analytic", the same with the diffusion prior's
    optimal variance; "ddim" with ``eta``; or "dpm", DPM-Solver++ on a grid of its own.
    """

    stage: str
    sampler: str
    variance: str
    steps: int
    progress: Progress
    eta: float = 0.0

    def __call__(
        self, model: DiffusionPrior | Decoder | Upsampler, denoise: Denoise, noise: Tensor, draw: Draw
    ) -> Tensor:
        """From ``noise`` [b, ...] to a sample of the same shape."""
        schedule = make_schedule(model.config.schedule, model.config.steps)
        uneven = self.stage == "upsampler_256" and self.steps == 27
        grid = fast27_grid(schedule.steps) if uneven else strided_grid(schedule.steps, self.steps)

        def report(done: int, _: Tensor) -> None:
            self.progress(self.stage, done, self.steps)

        if self.sampler == "dpm":
            return dpm_solver(denoise, noise, log_snr_grid(schedule, self.steps), schedule, report)
        if self.sampler == "ddim":
            return ddim(denoise, noise, grid, schedule, self.eta, draw, report)
        variance: str | Tensor = self.variance
        if self.sampler == "analytic" and isinstance(model, DiffusionPrior):
            variance = diffusion_prior_variance(model, grid)
        return ancestral(denoise, noise, grid, schedule, draw, variance, report)
