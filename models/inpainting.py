"""Inpainting by replacement in the reverse process: RePaint (Lugmayr et al. 2022, algorithm 1).

After every step the known region is replaced by the image itself, noised to the same level. The step is taken several
times, so that the unknown region can agree with it.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from models.diffusion.process import per_row, posterior_variance, q_sample
from models.diffusion.samplers import Callback, Denoise, grid_steps
from models.diffusion.schedules import Schedule
from models.pixels import from_uint8
from models.random_streams import RandomStreams
from models.sampling_config import BASE
from models.view import view

RESAMPLINGS = 4  # times that each step of the decoder is taken; the paper's 10 cost as much more
OPAQUE = 250  # of 255; a resized mask is rarely 255, and less than this is drawn again
SKEW = 0.02  # by which the shapes of image and mask may differ, since their sides are rounded


class KnownRegion:
    """Holds an image, and the mask of its known region: white where it stays, a grey image of the same view."""

    def __init__(self, image: Image.Image, mask: Image.Image):
        self.image, self.mask = image, mask

    def at(self, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the image, fp32 [1, 3, side, side] in [-1, 1], and where it is known, bool [1, 1, side, side]."""
        image, mask = (torch.tensor(view(one, side)).permute(2, 0, 1)[None] for one in (self.image, self.mask))
        return from_uint8(image).to(device), (mask[:, :1] >= OPAQUE).to(device)


def mask_flaw(image: Image.Image, mask: Image.Image) -> str:
    """Returns what is wrong with a mask: it has another shape than its image, or leaves nothing to draw; else ""."""
    (width, height), (wide, high) = image.size, mask.size
    if abs(width * high - height * wide) > SKEW * width * high:
        return f"is {wide} x {high} and the image {width} x {height}: give both the same shape"
    if view(mask, BASE).min() >= OPAQUE:
        return (
            "is opaque in all of the square that is drawn, whatever its colours: make transparent, by an alpha "
            "channel, what is to be drawn again"
        )
    return ""


@torch.no_grad()
def repaint(
    denoise: Denoise,
    noise: Tensor,
    known: KnownRegion,
    grid: Tensor,
    schedule: Schedule,
    rng: RandomStreams,
    free: bool,
    callback: Callback | None = None,
) -> Tensor:
    """Returns samples that equal an image in its known region.

    Args:
        denoise: Model that predicts the clean image.
        noise: x at the first timestep of ``grid``, [b, c, s, s].
        known: Image, and the mask of its known region.
        grid: Falling timesteps.
        schedule: Noise schedule of the model.
        rng: Noise of each row.
        free: DDPM's steps, each RESAMPLINGS times with the sample noised again in between, for a model without a small
            image as condition. An upsampler has one, which agrees with the image already, and takes DDIM's steps once.
        callback: Callback after every step, as for the samplers.
    """
    x0, where = known.at(noise.shape[-1], noise.device)
    x0, x, eta = x0.expand_as(noise), noise, float(free)
    for i, t, previous, last in grid_steps(grid, schedule, noise):
        level, before = schedule.at(t), schedule.at(previous)
        for again in range(RESAMPLINGS if free and not last else 1):
            if again:  # one step of the forward process, from the previous level back to this one
                ratio = level / before
                x = per_row(ratio.sqrt(), x) * x
                x = x + per_row((1 - ratio).sqrt(), x) * rng.normal(f"again{i}.{again}", *x.shape[1:])
            prediction = denoise(x, t)
            added = eta * posterior_variance(level, before)
            x = per_row(before.sqrt(), x) * prediction.x0
            x = x + per_row((1 - before - added).clamp(min=0).sqrt(), x) * prediction.eps
            if free and not last:
                x = x + per_row(added.sqrt(), x) * rng.normal(f"step{i}.{again}", *x.shape[1:])
            x = torch.where(where, q_sample(x0, rng.normal(f"kept{i}.{again}", *x.shape[1:]), before), x)
        if callback is not None:
            callback(i + 1, torch.where(where, x0, prediction.x0))
    return x
