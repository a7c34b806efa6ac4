"""Pixels as the image models see them: fp32 in [-1, 1], and the one resize that training and sampling share."""

import torch
import torch.nn.functional as F
from torch import Tensor

RANGE = 2.0  # of pixels, from -1 to 1
MOST_DB = 100.0  # equal images have an infinite PSNR


def from_uint8(image: Tensor) -> Tensor:
    """Returns uint8 images [b, 3, h, w] as fp32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """Returns values in [-1, 1] as the nearest uint8; those beyond are clamped."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes, antialiased bicubic, [b, 3, h, w] to ``size`` (h, w) if it has another, clamped to [-1, 1], fp32."""
    if image.shape[2:] == size:
        return image.float().clamp(-1, 1)
    # Bicubic weights are negative in places, so a resized image may leave the range.
    resized = F.interpolate(image.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(-1, 1)


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Returns the PSNR of images in [-1, 1], [b, c, h, w], in dB: fp64 [b], at most MOST_DB."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # its import takes seconds

    values = peak_signal_noise_ratio(image.double(), reference.double(), RANGE, reduction="none", dim=(1, 2, 3))
    return values.clamp(max=MOST_DB)
