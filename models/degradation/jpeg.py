"""JPEG's loss without its file: baseline, 4:2:0, for batches with a quality for each row, on any device.

ITU-T T.81, with libjpeg's quality scale, chroma averaging and smooth chroma upsampling, which Pillow and OpenCV use.
"""

from math import cos, pi, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

# Annex K, tables K.1 and K.2: quantisation steps at quality 50.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# Rows are Y, Cb, Cr; columns R, G, B (JFIF).
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))
# Row u is the u-th cosine of the orthonormal 8-point transform.
DCT = tuple(tuple(sqrt((1 if u == 0 else 2) / 8) * cos((2 * x + 1) * u * pi / 16) for x in range(8)) for u in range(8))


def jpeg(image: Tensor, quality: Tensor) -> Tensor:
    """[b, 3, h, w] in [0, 1], compressed and opened again: [b, 3, h, w] on the 256 levels of 8 bits.

    ``quality`` [b], whole numbers from 1 to 100, has Pillow's meaning.
    """
    height, width = image.shape[2:]
    pixels = (image * 255).round().clamp(0, 255)
    padded = F.pad(pixels, (0, -width % 16, 0, -height % 16), mode="replicate")
    ycc = (_mix(TO_YCC, padded) + _chroma_offset(padded)).round()
    luma = _requantised(ycc[:, :1], _steps(LUMINANCE, quality))[:, :, :height, :width]
    chroma = _requantised(_halved(ycc[:, 1:]), _steps(CHROMINANCE, quality))
    chroma = chroma[:, :, : (height + 1) // 2, : (width + 1) // 2]
    # Bilinear by two is libjpeg's triangle filter: 3/4 of the near sample and 1/4 of the far one on each axis.
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False).round()
    opened = torch.cat([luma, chroma[:, :, :height, :width]], dim=1)
    return _mix(TO_RGB, opened - _chroma_offset(opened)).round().clamp(0, 255) / 255


def _mix(matrix: tuple[tuple[float, ...], ...], image: Tensor) -> Tensor:
    """A 3 x 3 matrix applied to the channels of [b, 3, h, w]."""
    return torch.einsum("oc,bchw->bohw", torch.tensor(matrix, dtype=image.dtype, device=image.device), image)


def _chroma_offset(image: Tensor) -> Tensor:
    return torch.tensor([0.0, 128.0, 128.0], dtype=image.dtype, device=image.device).view(1, 3, 1, 1)


def _halved(chroma: Tensor) -> Tensor:
    """[b, c, h, w] to whole numbers [b, c, h / 2, w / 2]; halves go down and up in turns along a row, as in libjpeg."""
    bias = torch.tensor([0.25, 0.5], dtype=chroma.dtype, device=chroma.device).repeat(chroma.shape[3] // 4)
    return (F.avg_pool2d(chroma, 2) + bias).floor()


def _steps(table: tuple[tuple[int, ...], ...], quality: Tensor) -> Tensor:
    """Quantisation steps [b, 8, 8] at these qualities [b], by libjpeg's rule."""
    q = quality.long()
    percent = torch.where(q < 50, 5000 // q.clamp(min=1), 200 - 2 * q)
    steps = torch.tensor(table, device=quality.device)
    return ((steps * percent[:, None, None] + 50) // 100).clamp(1, 255)


def _requantised(plane: Tensor, steps: Tensor) -> Tensor:
    """Planes [b, c, h, w], 0 to 255 and multiples of 8 a side, rounded to [b, 8, 8] steps in frequency, and back."""
    transform = torch.tensor(DCT, dtype=plane.dtype, device=plane.device)
    blocks = (plane - 128).unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # [b, c, h / 8, w / 8, 8, 8]
    steps = steps[:, None, None, None].to(plane.dtype)
    levels = (transform @ blocks @ transform.T / steps).round()
    blocks = transform.T @ (levels * steps) @ transform
    return (blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3) + 128).round().clamp(0, 255)
