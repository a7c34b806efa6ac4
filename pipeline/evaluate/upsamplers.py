"""Measures the upsamplers: are their images nearer to the originals than bicubic interpolation?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.pixels import from_uint8, psnr, resize
from models.precision import autocast
from models.random_streams import RandomStreams, derive_seed
from models.reverse import ReverseProcess, silent
from models.sampling_config import UPSAMPLERS, SamplingConfig
from models.upsampler import Upsampler, sampling_low, upsampler_denoise
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.images import BATCH
from pipeline.evaluate.metric import Metric
from pipeline.evaluate.rows import SplitRows, Tick
from pipeline.evaluate.subject import Subject


def busiest_crop(image: Tensor, side: int) -> Tensor:
    """Returns the tile with the largest variance, [n, c, side, side], of each image [n, c, h, w].

    A flat tile would be right by any interpolation.
    """
    n, channels = image.shape[:2]
    down, across = (length // side for length in image.shape[2:])
    whole = image[:, :, : down * side, : across * side]  # a crop's side need not divide the image's
    tiles = whole.reshape(n, channels, down, side, across, side).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(n, -1, channels, side, side)
    best = tiles.double().flatten(3).var(3).sum(2).argmax(1)
    return tiles[torch.arange(n, device=image.device), best]


class UpsampledImages(NamedTuple):
    """Holds the mean of samples and the bicubic enlargement of the same small images, [n, 3, s, s] each in [-1, 1]."""

    mean: Tensor
    bicubic: Tensor


def upsample(
    name: str, model: Upsampler, original: Tensor, sampling: SamplingConfig, count: int, seed: int, tick: Tick
) -> UpsampledImages:
    """Draws ``count`` samples of each image of ``original`` [n, 3, s, s], from its small image as damaged for sampling.

    DDIM as the bundle samples, BATCH at once; the noise of a row does not depend on the others.
    """
    means, enlarged = [], []
    run = ReverseProcess(name, "ddim", "small", getattr(sampling, f"{name}_steps"), silent)
    for start in range(0, len(original), BATCH):
        part = original[start : start + BATCH]
        rows = range(start, start + len(part))
        side = (part.shape[2], part.shape[3])
        rng = RandomStreams([(derive_seed(seed, "low", row), 1) for row in rows], part.device)
        small = resize(part, (side[0] // model.config.scale, side[1] // model.config.scale))
        low = sampling_low(model.config, small, rng)
        denoise = upsampler_denoise(model, low)
        total = torch.zeros_like(part)
        for i in range(count):
            rng = RandomStreams([(derive_seed(seed, name, i, row), 1) for row in rows], low.device)
            with autocast(low.device, sampling.precision):
                drawn = run(model, denoise, rng.normal("x_T", *part.shape[1:]), rng)
            total += drawn.float().clamp(-1, 1) / count
            tick(f"{name} sample {i + 1} of {count} of {rows.stop} of {len(original)} images")
        means.append(total)
        enlarged.append(resize(low, side))
    return UpsampledImages(torch.cat(means), torch.cat(enlarged))


def measure_psnr(subject: Subject, rows: SplitRows) -> list[Figure]:
    """Returns whether the mean of samples is nearer to the original than bicubic interpolation, by PSNR.

    Each image counts by its busiest crop of the side of training crops. Both begin with the same small image.
    """
    # The mean estimates the posterior mean, which has the best PSNR. A single sample with plausible detail would lose
    # to a blur.
    name, recipe = subject.model, subject.recipe
    model = getattr(subject.unclip, name)
    crops = [busiest_crop(part, model.config.crop_size) for part in rows.batch["image"].split(BATCH)]
    original = from_uint8(torch.cat(crops))
    made = upsample(name, model, original, subject.unclip.sampling, recipe.samples, recipe.seed, subject.tick)
    return [subject.compare(rows, psnr(made.mean, original), psnr(made.bicubic, original), says="PSNR in dB")]


PSNR = Metric(
    "psnr",
    "{model} gets closer to the original than bicubic interpolation",
    tuple(UPSAMPLERS),
    ("rows",),
    measure_psnr,
)
