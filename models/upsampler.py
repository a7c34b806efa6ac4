"""The upsamplers: diffusion models conditioned on a smaller, slightly damaged image.

Ramesh et al. 2022 (unCLIP), section 2.1: ADM's network without attention, no caption and no guidance. It is
convolutional, so it learns on crops and runs on whole images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.degradation.blur import corruption_blur
from models.degradation.bsr import bsr, bsr_mild
from models.diffusion.process import Prediction, predict, q_sample, squared_error
from models.diffusion.samplers import Denoise
from models.diffusion.schedules import make_schedule
from models.image_configs import UpsamplerConfig
from models.losses import Losses
from models.nn.pixel_correction import PixelCorrection
from models.nn.unet import UNet
from models.pixels import from_uint8, resize
from models.random_streams import RandomStreams
from models.tiling import in_tiles


class Upsampler(nn.Module):
    """Predicts noise (or v, or the image) of a noised image of any size that the U-Net can halve often enough.

    A prediction of the image is the enlarged small image plus the network's output, which starts at zero.
    ``last_unet``, where the configuration has one, takes the rows at timestep 0 (Karlo). Dropout uses PyTorch's global
    generator.
    """

    def __init__(self, config: UpsamplerConfig):
        super().__init__()
        self.config = config

        def unet() -> UNet:
            return UNet(
                in_channels=6 * config.patch**2,
                out_channels=3 * config.patch**2,
                channels=config.channels,
                depth=config.depth,
                multipliers=config.multipliers,
                dropout=config.dropout,
                scale_shift=config.scale_shift,
            )

        self.unet = unet()
        self.last_unet = unet() if config.last_unet else None
        width = self.unet.embedding_width
        self.pixels = PixelCorrection(6, config.pixel_channels, 3, width) if config.pixel_channels else None

    def forward(self, x_t: Tensor, t: Tensor, low: Tensor) -> Tensor:
        """Returns fp32 [b, 3, h, w] for x_t [b, 3, h, w] at timesteps [b], given the small image ``low`` in [-1, 1].

        ``low`` is resized to h x w (antialiased bicubic), if need be, and concatenated to x_t as three more channels.
        """
        enlarged = resize(low, (x_t.shape[2], x_t.shape[3]))
        seen = torch.cat([x_t, enlarged], dim=1)
        patches = F.pixel_unshuffle(seen, self.config.patch)
        output = self.unet(patches, t)
        # In training it runs at every step: DDP waits for a gradient of every parameter.
        if self.last_unet is not None and (self.training or (t == 0).any()):
            output = torch.where((t == 0).view(-1, 1, 1, 1), self.last_unet(patches, t), output)
        output = F.pixel_shuffle(output, self.config.patch)
        if self.config.prediction == "x0":
            output = enlarged + output
        return output if self.pixels is None else self.pixels(output, seen, self.unet.timestep(t))


def random_crop(image: Tensor, size: int, multiple: int, rng: RandomStreams) -> Tensor:
    """Returns one ``size`` x ``size`` crop of each row of [b, 3, h, w], its corner at a multiple of ``multiple``."""
    # The multiple keeps the small image's pixels on the large image's grid.
    places = ((image.shape[2] - size) // multiple + 1, (image.shape[3] - size) // multiple + 1)
    window = torch.arange(size, device=image.device)
    top, left = (rng.integers(f"crop_{axis}", count) * multiple for axis, count in zip("yx", places, strict=True))
    rows = torch.arange(len(image), device=image.device)[:, None, None]
    pixels = image[rows, :, (top[:, None] + window)[:, :, None], (left[:, None] + window)[:, None, :]]
    return pixels.permute(0, 3, 1, 2)


def corrupted_low(config: UpsamplerConfig, crop: Tensor, rng: RandomStreams) -> Tensor:
    """Returns the small, damaged version of a crop [b, 3, c, c] in [-1, 1]: [b, 3, c / scale, c / scale], fp32."""
    with torch.autocast(crop.device.type, enabled=False):  # bf16 cannot tell 256 levels apart
        if config.corruption == "blur":
            side = crop.shape[2] // config.scale
            return corruption_blur(resize(crop, (side, side)))
        # On the CPU: BSR is many small steps of random sizes, and each size would synchronise a GPU.
        return bsr(crop.cpu(), rng.on("cpu"), light=config.corruption == "bsr_light").to(crop.device)


def sampling_low(config: UpsamplerConfig, low: Tensor, rng: RandomStreams) -> Tensor:
    """Returns the condition to sample with, for a small image [b, 3, s, s] in [-1, 1]: the mild end of the corruption.

    Without ``corrupt_at_inference`` it is the image itself.
    """
    # A condition without any corruption is one that training hardly ever showed.
    if not config.corrupt_at_inference:
        return low
    with torch.autocast(low.device.type, enabled=False):
        if config.corruption == "blur":
            return corruption_blur(low)
        return bsr_mild(low.cpu(), rng.on("cpu"), light=config.corruption == "bsr_light").to(low.device)


def training_crop(config: UpsamplerConfig, batch: dict[str, Tensor], rng: RandomStreams) -> Tensor:
    """Returns "crop" or else a random crop of "image", uint8 [b, 3, s, s] both: uint8 [b, 3, c, c]."""
    return batch["crop"] if "crop" in batch else random_crop(batch["image"], config.crop_size, config.scale, rng)


def training_low(config: UpsamplerConfig, batch: dict[str, Tensor], rng: RandomStreams) -> Tensor:
    """Returns "low" or else the small, corrupted version of ``training_crop``, fp32 [b, 3, c / scale, c / scale]."""
    return batch["low"] if "low" in batch else corrupted_low(config, from_uint8(training_crop(config, batch, rng)), rng)


def upsampler_loss(model: Upsampler, batch: dict[str, Tensor], rng: RandomStreams) -> Losses:
    """Returns the squared error on ``training_crop``, [b], given ``training_low``."""
    config = model.config
    schedule = make_schedule(config.schedule, config.steps)
    crop = training_crop(config, batch, rng)
    x0, low = from_uint8(crop), training_low(config, batch | {"crop": crop}, rng)
    t = rng.integers("t", config.steps)
    noise = rng.normal("noise", *x0.shape[1:])
    alpha_bar = schedule.at(t)
    output = model(q_sample(x0, noise, alpha_bar), t, low)
    mse = squared_error(config.prediction, output, x0, noise, alpha_bar, config.max_snr)
    return Losses(mse, {"mse": mse})


def upsampler_denoise(model: Upsampler, low: Tensor, tile: int = 0) -> Denoise:
    """Returns the denoiser for small images [b, 3, h, w] in [-1, 1], as ``sampling_low`` makes them.

    x0 is clipped to [-1, 1]. With ``tile``, the network sees overlapping squares of ``tile`` pixels, one after the
    other, in the memory of one. Raises ValueError on a tile that the network cannot halve often enough.
    """
    schedule = make_schedule(model.config.schedule, model.config.steps)
    height, width = (side * model.config.scale for side in low.shape[2:])
    # Before it is cut into tiles: a bicubic resize of a tile would differ at its edges.
    whole = resize(low, (height, width))
    multiple = model.config.patch * model.unet.multiple
    if tile % multiple:
        raise ValueError(f"tile is {tile}: this upsampler takes multiples of {multiple} px")

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        if 0 < tile < min(height, width):
            output = in_tiles(lambda x, condition: model(x, t, condition), x_t, whole, tile, multiple)
        else:
            output = model(x_t, t, whole)
        return predict(model.config.prediction, output, x_t, schedule.at(t), clip=1.0)

    return denoise
