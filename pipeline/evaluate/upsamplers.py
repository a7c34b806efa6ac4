"""What the upsamplers have learnt: lines (a) and (e)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.draw import Draw, derive_seed
from models.image_configs import UpsamplerConfig
from models.pixels import from_uint8, resize
from models.reverse import Reverse, ignore
from models.upsampler import (
    Upsampler,
    sampling_low,
    training_low,
    upsampler_denoise,
    upsampler_loss,
)
from pipeline.evaluate import metrics
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.gap import gap_figure, rise
from pipeline.evaluate.paired import paired
from pipeline.evaluate.rows import HeldOut
from pipeline.training.task import Batch

DRAWS = 2  # crops and timesteps a picture
Tick = Callable[[str], None]


def upsampler_gap(name: str, model: Upsampler, rows: HeldOut, seed: int) -> Figure:
    """Line (a) of an upsampler: "image" uint8 [n, 3, s, s], of which crops are judged as in training."""

    def with_low(batch: Batch, draw: Draw) -> Batch:
        return batch | {"low": training_low(model.config, batch, draw)}

    def loss(batch: Batch, draw: Draw) -> Tensor:
        return upsampler_loss(model, batch, draw).total

    pictures = {"image": rows.batch["image"]}
    return gap_figure(
        name, "small picture", rows, rise(loss, pictures, ("low",), rows.other, seed, DRAWS, prepare=with_low)
    )


def busiest_crop(image: Tensor, side: int) -> Tensor:
    """Of the tiles of ``side`` px of each picture [n, c, h, w] the one of the largest variance: [n, c, side, side].

    A flat tile tells nothing: any interpolation has it right.
    """
    n, channels = image.shape[:2]
    down, across = (length // side for length in image.shape[2:])
    whole = image[:, :, : down * side, : across * side]  # a crop's side need not divide the picture's
    tiles = whole.reshape(n, channels, down, side, across, side).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(n, -1, channels, side, side)
    best = tiles.double().flatten(3).var(3).sum(2).argmax(1)
    return tiles[torch.arange(n, device=image.device), best]


def enlarged(config: UpsamplerConfig, crop: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The small picture that a crop [n, 3, c, c] in [-1, 1] is sampled from, damaged as at sampling, and its bicubic
    enlargement [n, 3, c, c]."""
    low = resize(crop, (crop.shape[2] // config.scale, crop.shape[3] // config.scale))
    draw = Draw([(derive_seed(seed, "low", i), 1) for i in range(len(crop))], crop.device)
    low = sampling_low(config, low, draw)
    return low, resize(low, (crop.shape[2], crop.shape[3]))


def psnr_figures(
    name: str, model: Upsampler, rows: HeldOut, steps: int, count: int, seed: int, tick: Tick
) -> list[Figure]:
    """Line (e): PSNR of the mean of ``count`` samples to the original, above that of bicubic interpolation.

    Each picture's busiest crop of the side that training sees; both begin with the same damaged small picture. DDIM
    with so many ``steps``, as the bundle samples.
    """
    original = from_uint8(busiest_crop(rows.batch["image"], model.config.crop_size))
    low, bicubic = enlarged(model.config, original, seed)
    denoise = upsampler_denoise(model, low)
    run = Reverse(name, "ddim", "small", steps, ignore)
    samples = []
    for i in range(count):
        draw = Draw([(derive_seed(seed, name, i, row), 1) for row in range(len(rows))], low.device)
        samples.append(run(model, denoise, draw.normal("x_T", *original.shape[1:]), draw).clamp(-1, 1))
        tick(f"{name} {i + 1} of {count} samples")
    baseline = metrics.psnr(bicubic, original)
    mean, one = metrics.psnr(torch.stack(samples).mean(0), original), metrics.psnr(samples[0], original)
    says = f"PSNR of the mean of {count} samples, above bicubic's (dB)"
    return [
        paired("e", name, "psnr_of_mean", says, mean, baseline, rows, seed, "above"),
        paired("e", name, "psnr_of_one", "PSNR of one sample (dB)", one, baseline, rows, seed, None),
    ]
