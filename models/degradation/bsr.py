"""BSR degradation (Zhang et al. 2021, "Designing a practical degradation model"), as in latent diffusion.

An image is sometimes halved first, and then blurred twice, shrunk, brought to a quarter of its side, made noisy and
JPEG-compressed, in a random order of its own, and JPEG-compressed again. Every row draws its own parameters. The rows
that do the same to images of one size at the same time are worked on together.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from models.degradation.blur import blur, gaussian_kernels
from models.random_streams import RandomStreams

SCALE = 4  # images lose three quarters of their side
KERNEL_SIDE = 25  # pixels, for the longest reach
RESIZINGS = ("bilinear", "bicubic", "area")
STEPS = ("blur", "second blur", "shrink", "fit", "noise", "jpeg")


@dataclass(frozen=True)
class Strength:
    """Holds the parameters of a degradation; pairs are the least and the most, both included.

    Attributes:
        blur: Factor of the widths of blurs.
        second_blur: A second blur follows the first.
        reach: Pixels from the centre of an elliptic kernel to its end.
        circle_reach: Pixels from the centre of a circular kernel to its end.
        resized: Share of images that are shrunk by resizing; the others are blurred and subsampled.
        noise: Standard deviation of the noise, 8-bit levels.
        quality: Quality of JPEG.
    """

    blur: float
    second_blur: bool
    reach: tuple[int, int]
    circle_reach: tuple[int, int]
    resized: float
    noise: tuple[int, int]
    quality: tuple[int, int]


FULL = Strength(1.0, True, reach=(3, 12), circle_reach=(3, 12), resized=0.75, noise=(2, 25), quality=(30, 95))
# Latent diffusion's kernels of an even side, which move an image by half a pixel, are of the odd sides around them.
LIGHT = Strength(0.25, False, reach=(2, 6), circle_reach=(2, 3), resized=0.8, noise=(1, 2), quality=(80, 95))


def bsr(image: Tensor, rng: RandomStreams, light: bool = False) -> Tensor:
    """Degrades images [b, 3, h, w] in [-1, 1] to [b, 3, h / 4, w / 4], both on 8-bit levels.

    Sides h and w are multiples of 4.

    ``light`` is latent diffusion's weaker form: one blur instead of two, and less of everything.
    """
    strength = LIGHT if light else FULL
    images = list(_quantised((image + 1) / 2))
    size = (image.shape[2] // SCALE, image.shape[3] // SCALE)
    halved = (rng.uniform("bsr_halve") < 0.25).tolist()
    # Half of the halvings are antialiased, the other half one of the three resizings.
    halving = _choice(rng, "bsr_halving", (*RESIZINGS, "antialiased", "antialiased", "antialiased"))
    images = [_halved(x, how) if half else x for x, how, half in zip(images, halving, halved, strict=True)]
    scale = torch.tensor([SCALE / 2 if half else SCALE for half in halved], device=image.device)
    kernels = {name: _kernels(rng, f"bsr_{name}", scale, strength) for name in STEPS[:2]}
    shrink, fit = _shrinker(rng, scale, strength), _choice(rng, "bsr_fit", RESIZINGS)
    noise = _noise(rng, (image.shape[2], image.shape[3]), strength)
    compress = rng.keep("bsr_jpeg", drop=0.1)
    quality = _integers(rng, "bsr_jpeg_quality", strength.quality)

    # Each takes images [n, 3, h, w] of one size and their row numbers, and gives n images.
    steps: dict[str, Callable[[Tensor, list[int]], Iterable[Tensor]]] = {
        "blur": lambda x, rows: _blurred(x, kernels["blur"], rows),
        "second blur": lambda x, rows: _blurred(x, kernels["second blur"], rows) if strength.second_blur else x,
        "shrink": shrink,
        "fit": lambda x, rows: [_resized(crop, size, fit[row]) for crop, row in zip(x, rows, strict=True)],
        "noise": lambda x, rows: x + noise[rows, :, : x.shape[2], : x.shape[3]],
        "jpeg": lambda x, rows: torch.where(compress[rows, None, None, None], jpeg(x, quality[rows]), x),
    }
    order = _orders(rng)
    # In turn k each row takes its k-th step; rows with the same step and size share a call.
    for turn in range(len(STEPS)):
        groups = defaultdict(list)
        for row, crop in enumerate(images):
            groups[order[row][turn], crop.shape].append(row)
        for (name, _), rows in groups.items():
            for row, crop in zip(rows, steps[name](torch.stack([images[i] for i in rows]), rows), strict=True):
                images[row] = crop.clamp(0, 1)
    return jpeg(torch.stack(images), _integers(rng, "bsr_last_quality", strength.quality)) * 2 - 1


def bsr_mild(image: Tensor, rng: RandomStreams, light: bool = False) -> Tensor:
    """Returns the mild end of ``bsr`` at an unchanged size, for sampling: [b, 3, h, w] in [-1, 1], on 8-bit levels.

    No blur, the least noise and the best JPEG quality of the training range.
    """
    strength = LIGHT if light else FULL
    noise = rng.normal("bsr_noise", *image.shape[1:]) * (strength.noise[0] / 255)
    noisy = (_quantised((image + 1) / 2) + noise).clamp(0, 1)
    best = torch.full((len(image),), strength.quality[1], device=image.device)
    return jpeg(noisy, best) * 2 - 1


def jpeg(image: Tensor, quality: Tensor) -> Tensor:
    """Compresses images [b, 3, h, w] in [0, 1] as JPEG and opens them again, on the 256 levels of 8 bits.

    ``quality`` [b] holds whole numbers from 1 to 100. It runs on the CPU, wherever the images are: 0.2 ms for 64 px and
    2 ms for 256 px on one core. Rows are shared among threads, so that a GPU does not wait long.
    """
    levels = (image * 255).round().clamp(0, 255).to(torch.uint8).cpu()
    opened = _threads().map(lambda row, level: decode_jpeg(encode_jpeg(row, level)), levels, quality.tolist())
    return torch.stack(list(opened)).to(image.device) / 255


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="jpeg")


def _quantised(image: Tensor) -> Tensor:
    """Returns [0, 1] on the 256 levels of 8 bits."""
    return (image.float() * 255).round().clamp(0, 255) / 255


def _integers(rng: RandomStreams, purpose: str, bounds: tuple[int, int]) -> Tensor:
    """Returns int64 [b], both bounds included."""
    return rng.integers(purpose, bounds[1] - bounds[0] + 1) + bounds[0]


def _choice(rng: RandomStreams, purpose: str, options: tuple[str, ...]) -> list[str]:
    return [options[i] for i in rng.integers(purpose, len(options)).tolist()]


def _orders(rng: RandomStreams) -> list[list[str]]:
    """Returns for each row the steps in random order, except that shrinking comes before the fit to the final size."""
    orders = [[STEPS[i] for i in row] for row in rng.uniform("bsr_order", len(STEPS)).argsort(dim=1).tolist()]
    for order in orders:
        shrink, fit = order.index("shrink"), order.index("fit")
        if shrink > fit:
            order[shrink], order[fit] = "fit", "shrink"
    return orders


def _resized(crop: Tensor, size: tuple[int, int], how: str) -> Tensor:
    """Resizes [3, h, w] to [3, *size] without antialiasing.

    Enlarging by areas would repeat pixels, so it is bilinear then.
    """
    if how == "area" and size[0] <= crop.shape[1]:
        return F.interpolate(crop[None], size, mode="area")[0]
    return F.interpolate(crop[None], size, mode="bicubic" if how == "bicubic" else "bilinear")[0]


def _halved(crop: Tensor, how: str) -> Tensor:
    """Returns [3, h, w] at half its side."""
    size = (crop.shape[1] // 2, crop.shape[2] // 2)
    if how == "antialiased":
        return F.interpolate(crop[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    return _resized(crop, size, how).clamp(0, 1)


def _blurred(x: Tensor, kernels: list[Tensor], rows: list[int]) -> list[Tensor]:
    """Blurs each image by itself: most kernels are much smaller than the largest."""
    return [blur(crop[None], kernels[row][None])[0] for crop, row in zip(x, rows, strict=True)]


def _kernels(rng: RandomStreams, purpose: str, scale: Tensor, strength: Strength) -> list[Tensor]:
    """Returns a blur kernel [k, k] for each row.

    Each is a turned ellipse or a circle, with equal chance, cut off at a random reach, k // 2.
    """
    same, first, second, angle = rng.uniform(purpose, 4).unbind(1)
    # As in BSRGAN: an ellipse's variances are drawn, a circle's width, which is squared.
    ellipse = torch.stack([first, second], dim=1) * ((4 + scale) * strength.blur)[:, None]
    circle = (first * (2 + 0.2 * scale) * strength.blur) ** 2
    variances = torch.where((same < 0.5)[:, None], ellipse, circle[:, None]).clamp(min=1e-4)
    kernels = gaussian_kernels(KERNEL_SIDE, angle * pi, variances)
    middle = KERNEL_SIDE // 2
    ellipse_reach = _integers(rng, f"{purpose}_reach", strength.reach)
    circle_reach = _integers(rng, f"{purpose}_circle_reach", strength.circle_reach)
    reaches = torch.where(same < 0.5, ellipse_reach, circle_reach).tolist()
    inside = [slice(middle - reach, middle + reach + 1) for reach in reaches]
    cut = [kernel[place, place] for kernel, place in zip(kernels, inside, strict=True)]
    return [kernel / kernel.sum() for kernel in cut]


def _shrinker(rng: RandomStreams, scale: Tensor, strength: Strength) -> Callable[[Tensor, list[int]], Iterable[Tensor]]:
    """Returns a resize by 1 to 2 scales, with chance ``strength.resized``, else a blur and every scale-th pixel."""
    factors = (1 + rng.uniform("bsr_shrink_factor") * (2 * scale - 1)).tolist()
    how = _choice(rng, "bsr_shrink", RESIZINGS)
    resized = (rng.uniform("bsr_shrink_kind") < strength.resized).tolist()
    sigma = 0.1 + rng.uniform("bsr_shrink_sigma") * (0.6 * scale - 0.1)
    # A shift of half the stride puts the centre of the pixels that are kept where the small pixel's centre is.
    kernels = gaussian_kernels(
        KERNEL_SIDE, torch.zeros_like(scale), (sigma**2)[:, None].expand(-1, 2), shift=(scale - 1) / 2
    )
    strides = [int(value) for value in scale.tolist()]

    def shrink(x: Tensor, rows: list[int]) -> list[Tensor]:
        results = []
        for crop, row in zip(x, rows, strict=True):
            if resized[row]:
                size = tuple(max(int(side / factors[row]), 1) for side in crop.shape[1:])
                results.append(_resized(crop, (size[0], size[1]), how[row]))
            else:
                results.append(blur(crop[None], kernels[[row]], strides[row])[0])
        return results

    return shrink


def _noise(rng: RandomStreams, size: tuple[int, int], strength: Strength) -> Tensor:
    """Returns noise [b, 3, *size].

    It is independent in each channel (two rows in five), the same in all (two), or correlated (one).

    Correlated noise has the covariance L^2 Q^T D Q of a random rotation Q and diagonal D in [0, 1], with the largest
    level L.
    """
    white = rng.normal("bsr_noise", 3, *size)
    kind = rng.uniform("bsr_noise_kind")[:, None, None, None]
    level = _integers(rng, "bsr_noise_level", strength.noise)[:, None, None, None] / 255
    # The Q of a random matrix is a rotation; a root of the covariance turns white noise into correlated noise.
    rotation, _ = torch.linalg.qr(rng.uniform("bsr_noise_rotation", 3, 3))
    root = rng.uniform("bsr_noise_diagonal", 3).sqrt()[:, :, None] * rotation * (strength.noise[1] / 255)
    correlated = torch.einsum("bij,bihw->bjhw", root, white)
    plain = torch.where(kind < 0.4, white[:, :1], white) * level
    return torch.where(kind < 0.8, plain, correlated)
