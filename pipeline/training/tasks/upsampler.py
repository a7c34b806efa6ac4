"""The upsamplers: 64 to 256 px and 256 to 1024 px."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from models.diffusion.samplers import ddim
from models.diffusion.schedules import make_schedule, strided_grid
from models.image_configs import UpsamplerConfig
from models.losses import Losses
from models.pixels import from_uint8, resize, to_uint8
from models.random_streams import RandomStreams
from models.upsampler import Upsampler, sampling_low, training_crop, training_low, upsampler_denoise, upsampler_loss
from pipeline.graph.stages import Context
from pipeline.training.task import Batch, Examples
from pipeline.training.tasks.figures import FolderTask, conditional_figures, grid

_PREVIEW_STEPS = 15
PREVIEW_WIDTH = 1024  # pixels


class UpsamplerTask(FolderTask):
    """Trains by squared error on crops of images that are at least as large as the upsampler's output."""

    columns: tuple[str, ...] = ("image",)
    validation_rows = 32
    validation_batch = 8

    def __init__(self, config: UpsamplerConfig):
        self.config = config
        self.min_side = self.image_size = config.image_size
        self.preview_rows = max(1, PREVIEW_WIDTH // config.image_size)

    def network(self) -> Upsampler:
        return Upsampler(self.config)

    def loss(self, model: Upsampler, batch: Batch, rng: RandomStreams) -> Losses:
        return upsampler_loss(model, batch, rng)

    def prepare(self, batch: Batch, rng: RandomStreams) -> Batch:
        """Returns the "crop" of each image, and the "low" that is damaged: BSR is many small steps, none for a GPU."""
        crop = {"crop": training_crop(self.config, batch, rng)}
        return crop | {"low": training_low(self.config, crop, rng)}

    def validate(self, model: Upsampler, examples: Examples) -> dict[str, float]:
        """Returns the "loss" on a crop of each image, and its rise with another row's small image."""
        given = [(batch | {"low": training_low(self.config, batch, rng)}, rng) for batch, rng in examples]
        return conditional_figures(partial(self.loss, model), given, ("low",), self.config.steps)

    def preview(self, model: Upsampler, batch: Batch, rng: RandomStreams) -> Tensor:
        """Returns, from above: small images enlarged by bicubic interpolation, upsampled, and the large images."""
        config = self.config
        small = resize(from_uint8(batch["image"]), (config.low_size, config.low_size))
        denoise = upsampler_denoise(model, sampling_low(config, small, rng))
        noise = rng.normal("preview", 3, config.image_size, config.image_size)
        steps = strided_grid(config.steps, min(config.steps, _PREVIEW_STEPS))
        large = ddim(denoise, noise, steps, make_schedule(config.schedule, config.steps))
        enlarged = resize(small, (config.image_size, config.image_size))
        return grid(to_uint8(enlarged), to_uint8(large), batch["image"])


def make(ctx: Context) -> UpsamplerTask:
    """Returns the task of a training stage."""
    return UpsamplerTask(ctx.recipe.model)
