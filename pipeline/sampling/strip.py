"""Pictures side by side, or one after the other: a strip as one PNG, an animation as WebP. Pure functions."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from math import ceil

import numpy as np
from PIL import Image

WIDEST = 2560  # px of a strip; after that it goes on in another row
SMALLEST = 128  # px of a tile; smaller pictures are shown with every pixel as a square of pixels
GAP = 4  # px of white between two tiles
FRAME_MS, END_MS = 100, 600
DESCRIPTION = 0x010E  # EXIF: ImageDescription


def strip(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Square pictures of one side, uint8 [s, s, 3], as one, uint8 [h, w, 3], in reading order, rows equally long.

    The last row may be shorter, ending in white.
    """
    tiles = [enlarged(picture) for picture in pictures]
    step = len(tiles[0]) + GAP
    rows = ceil(len(tiles) / max(1, (WIDEST + GAP) // step))
    columns = ceil(len(tiles) / rows)
    whole = np.full((rows * step - GAP, columns * step - GAP, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * step, i % columns * step
        whole[top : top + len(tile), left : left + len(tile)] = tile
    return whole


def enlarged(picture: np.ndarray) -> np.ndarray:
    """A picture with every pixel repeated until its side is at least SMALLEST; a larger one stays."""
    times = ceil(SMALLEST / len(picture))
    return picture.repeat(times, 0).repeat(times, 1)


def animation(pictures: Sequence[np.ndarray], text: Mapping[str, str]) -> bytes:
    """Two pictures or more, uint8 [s, s, 3], as a lossless WebP that goes forth and back for ever.

    ``n`` pictures become 2 n - 2 frames; both ends stay for longer. A picture that equals the one before adds its
    time to it. ``text`` is in the EXIF image description, as JSON.
    """
    forth = [Image.fromarray(enlarged(picture)) for picture in pictures]
    frames = forth + forth[-2:0:-1]
    times = [END_MS if frame in (0, len(forth) - 1) else FRAME_MS for frame in range(len(frames))]
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps(dict(text))
    out = io.BytesIO()
    frames[0].save(
        out, "WEBP", save_all=True, append_images=frames[1:], duration=times, loop=0, lossless=True, exif=exif
    )
    return out.getvalue()
