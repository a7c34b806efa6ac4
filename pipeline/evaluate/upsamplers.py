"""Measures the upsamplers: lines (a) and (e), and how near their images are to the originals."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from models.draw import Draw, derive_seed
from models.pixels import from_uint8, resize
from models.precision import autocast
from models.reverse import Reverse, ignore
from models.sampling_config import SamplingConfig
from models.upsampler import (
    Upsampler,
    sampling_low,
    training_low,
    upsampler_denoise,
    upsampler_loss,
)
from pipeline.evaluate.figure import Figure
from pipeline.evaluate.gap import gap_figure, rise
from pipeline.evaluate.images import IMAGES
from pipeline.evaluate.paired import paired
from pipeline.evaluate.rows import HeldOut, Tick
from pipeline.training.task import Batch

DRAWS = 2  # crops and timesteps an image
OTHER_ROWS = 8  # at most, that are sampled without the damage to the small image, too
RANGE = 2.0  # of pixels, from -1 to 1
MOST_DB = 100.0
REACH = 5  # pixels from the middle of SSIM's window to its edge


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Returns the PSNR of images in [-1, 1], [b, c, h, w], in dB: fp64 [b], at most MOST_DB."""
    values = peak_signal_noise_ratio(image.double(), reference.double(), RANGE, reduction="none", dim=(1, 2, 3))
    return values.clamp(max=MOST_DB)


def ssim(image: Tensor, reference: Tensor) -> Tensor:
    """Returns the SSIM of images in [-1, 1], [b, c, h, w] (Wang et al. 2004): fp64 [b], 1 for equal images.

    torchmetrics mirrors images at their edges; here a window counts only if it lies within the image. Raises
    ValueError for an image that is smaller than the window.
    """
    if min(image.shape[2:]) <= 2 * REACH:
        raise ValueError(f"an image of {tuple(image.shape[2:])} px is smaller than SSIM's window of {2 * REACH + 1} px")
    pair = image.double(), reference.double()
    _, places = structural_similarity_index_measure(*pair, data_range=RANGE, return_full_image=True)
    return places[..., REACH:-REACH, REACH:-REACH].flatten(1).mean(1)


def upsampler_gap(name: str, model: Upsampler, rows: HeldOut, seed: int) -> Figure:
    """Returns line (a) of an upsampler: "image" uint8 [n, 3, s, s], of which crops are judged as in training."""

    def with_low(batch: Batch, draw: Draw) -> Batch:
        return batch | {"low": training_low(model.config, batch, draw)}

    def loss(batch: Batch, draw: Draw) -> Tensor:
        return upsampler_loss(model, batch, draw).total

    images = {"image": rows.batch["image"]}
    return gap_figure(
        name, "small image", rows, rise(loss, images, ("low",), rows.other, seed, DRAWS, prepare=with_low)
    )


def busiest_crop(image: Tensor, side: int) -> Tensor:
    """Returns the tile with the largest variance, [n, c, side, side], of each image [n, c, h, w].

    A flat tile tells nothing: any interpolation has it right.
    """
    n, channels = image.shape[:2]
    down, across = (length // side for length in image.shape[2:])
    whole = image[:, :, : down * side, : across * side]  # a crop's side need not divide the image's
    tiles = whole.reshape(n, channels, down, side, across, side).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(n, -1, channels, side, side)
    best = tiles.double().flatten(3).var(3).sum(2).argmax(1)
    return tiles[torch.arange(n, device=image.device), best]


class Upsampled(NamedTuple):
    """Holds what an upsampler made of small images; all values are in [-1, 1].

    Attributes:
        original: [n, 3, c, c].
        clean: The small images, [n, 3, c / scale, c / scale].
        low: The same, as damaged for sampling.
        bicubic: ``low`` enlarged, [n, 3, c, c].
        samples: [k, n, 3, c, c].
    """

    original: Tensor
    clean: Tensor
    low: Tensor
    bicubic: Tensor
    samples: Tensor


def upsample(
    name: str,
    model: Upsampler,
    original: Tensor,
    sampling: SamplingConfig,
    count: int,
    seed: int,
    tick: Tick,
    damaged: bool,
) -> Upsampled:
    """Draws ``count`` samples of each image of ``original`` [n, 3, c, c], from its small image, ``damaged`` or not.

    DDIM as the bundle samples, IMAGES at once; the same noise for the same row, either way.
    """
    made = []
    run = Reverse(name, "ddim", "small", getattr(sampling, f"{name}_steps"), ignore)
    for start in range(0, len(original), IMAGES):
        part = original[start : start + IMAGES]
        rows = range(start, start + len(part))
        side = (part.shape[2], part.shape[3])
        clean = resize(part, (side[0] // model.config.scale, side[1] // model.config.scale))
        draw = Draw([(derive_seed(seed, "low", row), 1) for row in rows], part.device)
        low = sampling_low(replace(model.config, corrupt_at_inference=damaged), clean, draw)
        denoise = upsampler_denoise(model, low)
        samples = []
        for i in range(count):
            draw = Draw([(derive_seed(seed, name, i, row), 1) for row in rows], low.device)
            with autocast(low.device, sampling.precision):
                drawn = run(model, denoise, draw.normal("x_T", *part.shape[1:]), draw)
            samples.append(drawn.float().clamp(-1, 1))
            also = "" if damaged == model.config.corrupt_at_inference else ", too"
            tick(f"{name} sample {i + 1} of {count} of {rows.stop} of {len(original)} images{also}")
        made.append(Upsampled(part, clean, low, resize(low, side), torch.stack(samples, dim=1)))
    whole = Upsampled(*(torch.cat(column) for column in zip(*made, strict=True)))
    return whole._replace(samples=whole.samples.transpose(0, 1))


def upsampler_figures(
    name: str, model: Upsampler, rows: HeldOut, sampling: SamplingConfig, count: int, seed: int, tick: Tick
) -> list[Figure]:
    """Returns line (e): PSNR of the mean of ``count`` samples to the original, above that of bicubic interpolation.

    And, for information, that of one sample, SSIM, consistency, and the first rows with the damage of the small image
    left out, or put in where the model samples without.

    Each image's busiest crop of the side that training sees; all begin with the same small image.
    """
    crops = [busiest_crop(part, model.config.crop_size) for part in rows.batch["image"].split(IMAGES)]
    original = from_uint8(torch.cat(crops))
    damaged = model.config.corrupt_at_inference
    made = upsample(name, model, original, sampling, count, seed, tick, damaged)
    few = rows.first(min(OTHER_ROWS, len(rows)))
    other = upsample(name, model, original[: len(few)], sampling, 1, seed, tick, not damaged)
    return [
        *likeness_figures(name, made, rows, seed),
        consistency_figure(name, made, rows, seed),
        *damage_figures(name, made, other, few, seed, damaged),
    ]


def likeness_figures(name: str, made: Upsampled, rows: HeldOut, seed: int) -> list[Figure]:
    """Returns PSNR and SSIM to the original, of the mean of the samples and of one, against bicubic interpolation."""
    mean, one, count = made.samples.mean(0), made.samples[0], len(made.samples)
    figures = []
    for short, measure, unit in (("psnr", psnr, " (dB)"), ("ssim", ssim, "")):
        values = [measure(x, made.original) for x in (mean, one, made.bicubic)]
        claim: Literal["above"] | None = "above" if short == "psnr" else None
        said = f"{short.upper()} of the mean of {count} samples, " + (
            "above bicubic's" if claim else "baseline: bicubic"
        )
        figures.append(paired("e", name, f"{short}_of_mean", said + unit, values[0], values[2], rows, seed, claim))
        said = f"{short.upper()} of one sample{unit}; baseline: bicubic"
        figures.append(paired("e", name, f"{short}_of_one", said, values[1], values[2], rows, seed, None))
    return figures


def consistency_figure(name: str, made: Upsampled, rows: HeldOut, seed: int) -> Figure:
    """Returns how much of the undamaged small image is left in one sample, made small again as that was."""
    small = (made.clean.shape[2], made.clean.shape[3])
    one, bicubic = (psnr(resize(x, small), made.clean) for x in (made.samples[0], made.bicubic))
    says = "PSNR of one sample, made small again, to its undamaged small image (dB); baseline: bicubic"
    return paired("e", name, "consistency", says, one, bicubic, rows, seed, None)


def damage_figures(
    name: str, made: Upsampled, other: Upsampled, rows: HeldOut, seed: int, damaged: bool
) -> list[Figure]:
    """Returns PSNR of one sample of ``other``, sampled the other way, against that of ``made`` and against bicubic."""
    ways = ("damaged", "undamaged") if damaged else ("undamaged", "damaged")
    usual, one, bicubic = (
        psnr(x, other.original) for x in (made.samples[0, : len(rows)], other.samples[0], other.bicubic)
    )
    says = f"PSNR of one sample from the {ways[1]} small image (dB)"
    return [
        paired("e", name, f"{ways[1]}_psnr", f"{says}; baseline: {ways[0]}", one, usual, rows, seed, None),
        paired("e", name, f"{ways[1]}_psnr_bicubic", f"{says}; baseline: bicubic", one, bicubic, rows, seed, None),
    ]
