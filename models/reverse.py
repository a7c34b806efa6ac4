"""The reverse process of each model of the cascade: sampler, grid and variance."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from models.decoder import Decoder
from models.diffusion.samplers import Denoise, ancestral, ddim, dpm_solver
from models.diffusion.schedules import FEW, fast27_grid, log_snr_grid, make_schedule, strided_grid, trailing_grid
from models.diffusion_prior import DiffusionPrior, diffusion_prior_variance
from models.inpainting import KnownRegion, repaint
from models.random_streams import RandomStreams
from models.sampling_config import UNEVEN, UNEVEN_MODEL
from models.upsampler import Upsampler

Progress = Callable[..., None]
"""Called after every step with the stage's name, the number of steps done and the number of steps.

Stages that make images add the current estimate of the clean images, [b, 3, s, s], after the last step the result.
"""


def silent(stage: str, step: int, steps: int, estimate: Tensor | None = None) -> None:
    """Reports nothing."""


def sampling_grid(
    stage: str, model: DiffusionPrior | Decoder | Upsampler, steps: int, inverted: bool = False
) -> Tensor:
    """Returns the timesteps, int64 [steps] and falling, that a model visits unless its sampler has a grid of its own.

    An ``inverted`` grid is for the noise of an image. Raises ValueError on a number of steps that the model's schedule
    does not have.
    """
    timesteps = model.config.steps
    if stage == UNEVEN_MODEL and steps == UNEVEN:
        return fast27_grid(timesteps)
    # With few steps the last one should start where noise is left to remove, unless a second U-Net is trained for
    # timestep 0. A network that predicts the image draws it again at timestep 0, and worse. An inversion began
    # beside the data, so its way back ends there.
    needs_last = isinstance(model, Upsampler) and model.last_unet is not None
    redraws = isinstance(model, Decoder) and model.config.prediction == "x0"
    ends_early = redraws or (steps < FEW and not needs_last and not inverted)
    return trailing_grid(timesteps, steps) if ends_early else strided_grid(timesteps, steps)


@dataclass(frozen=True)
class ReverseProcess:
    """Samples one model.

    Attributes:
        stage: Name of the model's stage.
        sampler: "ddpm", with the ``variance`` "small" or "learned"; "analytic", the same with the diffusion prior's
            optimal variance; "ddim" with ``eta``; or "dpm", DPM-Solver++ on a grid of its own.
        variance: Variance of "ddpm".
        steps: Number of steps.
        progress: Function that is called after every step.
        eta: Share of DDPM's variance that "ddim" adds.
        inverted: The noise is from an inversion, whose grid is taken.
        known: Region of an image that stays; with one the sampler is RePaint's.
    """

    stage: str
    sampler: str
    variance: str
    steps: int
    progress: Progress
    eta: float = 0.0
    inverted: bool = False
    known: KnownRegion | None = None

    def __call__(
        self, model: DiffusionPrior | Decoder | Upsampler, denoise: Denoise, noise: Tensor, rng: RandomStreams
    ) -> Tensor:
        """Goes from ``noise`` [b, ...] to a sample of the same shape."""
        schedule = make_schedule(model.config.schedule, model.config.steps)
        grid = sampling_grid(self.stage, model, self.steps, self.inverted)

        def report(done: int, estimate: Tensor) -> None:
            shown = () if isinstance(model, DiffusionPrior) else (estimate,)
            self.progress(self.stage, done, self.steps, *shown)

        if self.known is not None:
            return repaint(denoise, noise, self.known, grid, schedule, rng, self.stage == "decoder", report)
        if self.sampler == "dpm":
            return dpm_solver(denoise, noise, log_snr_grid(schedule, self.steps), schedule, report)
        if self.sampler == "ddim":
            return ddim(denoise, noise, grid, schedule, self.eta, rng, report)
        variance: str | Tensor = self.variance
        if self.sampler == "analytic" and isinstance(model, DiffusionPrior):
            variance = diffusion_prior_variance(model, grid)
        return ancestral(denoise, noise, grid, schedule, rng, variance, report)
