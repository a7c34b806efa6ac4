"""From fetched bytes to the picture that is kept: checked, upright, sRGB, and resized as img2dataset does it.

The pipeline calls this in a process of its own (pipeline.data.pairs.decoding). img2dataset's own resizer decodes a
second time and sets up a transform for every picture, a fifth of all the time; OpenCV is called here as it does, to the
same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from models.view import upright_rgb

MAX_SCANS = 500  # of a JPEG; encoders write about 10
LONGEST = 8  # times image_size: the long side of what is stored
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # of a JPEG: no escaped byte, no padding, no restart
SCAN, END = 0xDA, 0xD9


@dataclass(frozen=True)
class Picture:
    """An encoded picture with its width and height in pixels; ``extension`` is jpg, png or webp."""

    data: bytes
    width: int
    height: int
    extension: str


def resize(
    data: bytes,
    image_size: int,
    max_pixels: int,
    encode_format: str,
    encode_quality: int,
    *,
    starts: Callable[[int], object] = int,
) -> Picture | str:
    """Normalise a picture and bring its short side down to ``image_size`` pixels; return it, or a reason.

    Takes PNG, JPEG and WebP by their first bytes (of an animation the first frame; no GIF). The header's pixel count
    and a JPEG's scans are checked before anything is decoded; ``starts`` is called with that count when decoding
    starts. Pictures become what ``upright_rgb`` says, and are stored as three channels; area interpolation, never
    enlarged. The long side may be LONGEST times ``image_size``, which bounds what is stored. Equal input gives equal
    bytes. ``encode_format``: jpg, png or webp; ``encode_quality``: 0 to 100, for png the compression 0 to 9.
    """
    upright = _decode(data, max_pixels, starts)
    if isinstance(upright, str):
        return upright
    return _shrunk(np.asarray(upright), image_size, encode_format, encode_quality)


def inspect(data: bytes, max_pixels: int, *, starts: Callable[[int], object] = int) -> tuple[int, int] | str:
    """Width and height, upright, of a picture that ``resize`` would take but for its long side, or the reason why it
    would not."""
    upright = _decode(data, max_pixels, starts)
    return upright if isinstance(upright, str) else upright.size


def _decode(data: bytes, max_pixels: int, starts: Callable[[int], object]) -> Image.Image | str:
    if not data:
        return "zero_bytes"
    if not (data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (data[:4], data[8:12]) == (b"RIFF", b"WEBP")):
        return "not_an_image"
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                return "too_many_pixels"
            if data.startswith(b"\xff\xd8") and too_many_scans(data):
                return "decode_error"
            starts(pixels)
            image.load()
            # The decoder of WebP keeps two canvases as long as its image is there.
            plain = image.copy() if image.format == "WEBP" else image
        del image
        return upright_rgb(plain)
    except Image.DecompressionBombError:
        return "too_many_pixels"
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        cut = "truncated" in str(error) or (data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data))
        return "truncated" if cut else "decode_error"


def too_many_scans(jpeg: bytes) -> bool:
    """Whether a JPEG has more than MAX_SCANS scans. A decoder goes over all pixels for each, however few bytes it has.

    See LJT-01-003 of libjpeg-turbo's advice.
    """
    at, scans = 2, 0
    while scans <= MAX_SCANS and (marker := MARKER.search(jpeg, at)):
        at, kind = marker.end(), marker[1][0]
        if kind == END:
            break
        scans += kind == SCAN
        at += int.from_bytes(jpeg[at : at + 2])  # its own length, those two bytes included
    return scans > MAX_SCANS


def _shrunk(pixels: np.ndarray, image_size: int, encode_format: str, encode_quality: int) -> Picture | str:
    """As img2dataset's resizer with ``keep_ratio``, ``resize_only_if_bigger`` and area interpolation; RGB uint8."""
    import cv2

    cv2.setNumThreads(1)
    height, width = pixels.shape[:2]
    try:
        if min(width, height) > image_size:
            scale = image_size / min(width, height)
            width, height = round(width * scale), round(height * scale)
        if max(width, height) > LONGEST * image_size:
            return "too_long"
        if (height, width) != pixels.shape[:2]:
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        quality = {
            "jpg": cv2.IMWRITE_JPEG_QUALITY,
            "png": cv2.IMWRITE_PNG_COMPRESSION,
            "webp": cv2.IMWRITE_WEBP_QUALITY,
        }[encode_format]
        blue_first = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        done, stored = cv2.imencode(f".{encode_format}", blue_first, [quality, encode_quality])
    except cv2.error:
        done = False
    return Picture(stored.tobytes(), width, height, encode_format) if done else "decode_error"  # such as too wide
