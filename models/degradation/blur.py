"""Gaussian blurs of batches, one kernel for each row."""

import torch
import torch.nn.functional as F
from torch import Tensor

CORRUPTION_SIDE, CORRUPTION_SIGMA = 3, 0.6  # unCLIP, appendix C


def gaussian_kernels(side: int, angle: Tensor, variances: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """Returns normalised kernels [b, side, side].

    ``variances`` [b, 2], above zero, in pixels squared along two axes that ``angle`` [b], radians, turns from (x, y).
    ``shift``, a number or [b], moves the centre by as many pixels down and right.
    """
    places = torch.arange(side, device=angle.device) - (side - 1) / 2
    offset = (places - (shift[:, None] if isinstance(shift, Tensor) else shift)).expand(len(angle), side)
    y, x = offset[:, :, None], offset[:, None, :]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = cos * x + sin * y, cos * y - sin * x
    first, second = variances[:, :, None, None].unbind(1)
    weights = torch.exp(-0.5 * (along**2 / first + across**2 / second))
    return weights / weights.sum(dim=(1, 2), keepdim=True)


def mirrored(image: Tensor, margin: int) -> Tensor:
    """Returns [b, c, h, w] with ``margin`` more pixels on each side, mirrored without repeating the edge.

    The margin may be wider than the image, unlike PyTorch's own reflection.
    """
    for axis in (2, 3):
        last = image.shape[axis] - 1
        place = torch.arange(-margin, last + margin + 1, device=image.device) % max(2 * last, 1)
        image = image.index_select(axis, last - (last - place).abs())
    return image


def blur(image: Tensor, kernels: Tensor, stride: int = 1) -> Tensor:
    """Filters each row of [b, 3, h, w] with its own kernel [b, k, k], k odd, and keeps every ``stride``-th pixel."""
    channels = image.shape[1]
    # One grouped convolution, a group for each row and channel: conv2d has no other way to a kernel a row.
    padded = mirrored(image, kernels.shape[-1] // 2)
    weight = kernels.to(image.dtype).repeat_interleave(channels, dim=0)[:, None]
    filtered = F.conv2d(padded.flatten(0, 1)[None], weight, stride=stride, groups=len(weight))
    return filtered[0].unflatten(0, (-1, channels))


def corruption_blur(image: Tensor) -> Tensor:
    """Returns the first upsampler's corruption of [b, 3, h, w]: a Gaussian blur, kernel 3, sigma 0.6."""
    variances = torch.full((len(image), 2), CORRUPTION_SIGMA**2, device=image.device)
    return blur(image, gaussian_kernels(CORRUPTION_SIDE, variances.new_zeros(len(image)), variances))
