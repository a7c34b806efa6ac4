"""How each model of the cascade is sampled: which sampler, on which grid."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from models.decoder import Decoder
from models.diffusion.dpm_solver import dpm_solver
from models.diffusion.samplers import Denoise, ancestral, ddim
from models.diffusion.schedules import FEW, fast27_grid, log_snr_grid, make_schedule, strided_grid, trailing_grid
from models.diffusion_prior import DiffusionPrior, diffusion_prior_variance
from models.draw import Draw
from models.inpainting import Kept, repaint
from models.sampling_config import UNEVEN, UNEVEN_MODEL
from models.upsampler import Upsampler

Progress = Callable[..., None]
"""Called after every step with the stage's name, the number of steps done and the number of steps.

Stages that make images add the current estimate of the clean images, [b, 3, s, s], after the last step the result.
"""


def ignore(stage: str, step: int, steps: int, estimate: Tensor | None = None) -> None:
    """Progress that nobody watches."""


def sampling_grid(
    stage: str, model: DiffusionPrior | Decoder | Upsampler, steps: int, inverted: bool = False
) -> Tensor:
    """Returns the timesteps, int64 [steps] and falling, that a model visits unless its sampler has a grid of its own.

    The first upsampler's 27 are GLIDE's. Fewer than ``FEW`` stop before timestep 0, where next to nothing is left to
    do, but for a network with another one for that very timestep. So do all of a decoder that predicts the image, which
    there draws once more what is finished, only worse. An ``inverted`` one, from the noise of an
    image, ends next to the data otherwise, however few its steps. Raises ValueError on a number of steps that the
    model's schedule does not have.
    """
    timesteps = model.config.steps
    if stage == UNEVEN_MODEL and steps == UNEVEN:
        return fast27_grid(timesteps)
    needs_last = isinstance(model, Upsampler) and model.last_unet is not None
    redraws = isinstance(model, Decoder) and model.config.prediction == "x0"
    ends_early = redraws or (steps < FEW and not needs_last and not inverted)
    return trailing_grid(timesteps, steps) if ends_early else strided_grid(timesteps, steps)


@dataclass(frozen=True)
class Reverse:
    """How one model's reverse diffusion runs.

    ``sampler``: "ddpm", with the ``variance`` "small" or "learned"; "analytic", the same with the diffusion prior's
    optimal variance; "ddim" with ``eta``; or "dpm", DPM-Solver++ on a grid of its own. ``inverted``: the noise is from
    an inversion, whose grid it takes. ``kept``: the part of an image that stays, whatever the sampler.
    """

    stage: str
    sampler: str
    variance: str
    steps: int
    progress: Progress
    eta: float = 0.0
    inverted: bool = False
    kept: Kept | None = None

    def __call__(
        self, model: DiffusionPrior | Decoder | Upsampler, denoise: Denoise, noise: Tensor, draw: Draw
    ) -> Tensor:
        """Goes from ``noise`` [b, ...] to a sample of the same shape."""
        schedule = make_schedule(model.config.schedule, model.config.steps)
        grid = sampling_grid(self.stage, model, self.steps, self.inverted)

        def report(done: int, estimate: Tensor) -> None:
            shown = () if isinstance(model, DiffusionPrior) else (estimate,)
            self.progress(self.stage, done, self.steps, *shown)

        if self.kept is not None:
            return repaint(denoise, noise, self.kept, grid, schedule, draw, self.stage == "decoder", report)
        if self.sampler == "dpm":
            return dpm_solver(denoise, noise, log_snr_grid(schedule, self.steps), schedule, report)
        if self.sampler == "ddim":
            return ddim(denoise, noise, grid, schedule, self.eta, draw, report)
        variance: str | Tensor = self.variance
        if self.sampler == "analytic" and isinstance(model, DiffusionPrior):
            variance = diffusion_prior_variance(model, grid)
        return ancestral(denoise, noise, grid, schedule, draw, variance, report)
