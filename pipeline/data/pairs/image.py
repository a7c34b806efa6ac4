"""Turns fetched bytes into the image that is kept: checked, upright, sRGB, resized and encoded as img2dataset does.

The pipeline calls this in a process of its own (pipeline.data.pairs.decoding). Only img2dataset's resizer is loaded:
the whole package takes 350 MB and two seconds of every such process.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.view import open_view, turned, upright_rgb

MAX_BYTES, MAX_PIXELS = 32 << 20, 64_000_000  # of an image, unless a recipe says otherwise
MOST_PIXELS = 178_956_970  # twice Image.MAX_IMAGE_PIXELS, above which Pillow opens nothing
READ = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
# What is used where it lies in a tar of the user's. Trainings decode it again at every epoch, so all else is stored as
# a fetched image is.
IN_PLACE = ("PNG", "JPEG", "WEBP")
IN_PLACE_PIXELS, IN_PLACE_SCANS, IN_PLACE_S = 16_000_000, 50, 1.0
BEGINNINGS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
BRANDS = dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIF") | dict.fromkeys(
    (b"avif", b"avis"), "AVIF"
)
MAX_SCANS = 500  # of a JPEG; encoders write about 10
LONGEST_SIDE = 8  # times image_size: the long side of what is stored
# The markers of a JPEG behind which libjpeg reads a length. It passes over others by two bytes, and what follows may be
# a scan: TEM (01), RST (D0 to D7) and, where it looks for a restart, reserved ones (02 to BF).
SEGMENT = re.compile(rb"\xff([\xc0-\xc7\xc9-\xcf\xd9-\xdd\xe0-\xef\xfe])")
SCAN, END = 0xDA, 0xD9


@dataclass(frozen=True)
class StoredImage:
    """Holds an encoded image with its width and height in pixels; ``extension`` is jpg, png or webp."""

    data: bytes
    width: int
    height: int
    extension: str


@dataclass(frozen=True)
class Storing:
    """Says how an image is stored, as img2dataset names it. Nothing is enlarged.

    ``encode_quality`` is 0 to 100, for png the compression 0 to 9; ``resize_mode`` is one of img2dataset's.
    """

    image_size: int
    encode_format: str = "jpg"
    encode_quality: int = 95
    resize_mode: str = "keep_ratio"
    min_image_size: int = 0


def prepare(
    data: bytes,
    max_pixels: int,
    storing: Storing,
    opacity: bool = False,
    *,
    starts: Callable[[int], object] = int,
) -> StoredImage | str:
    """Returns the image in ``data`` as it is to be stored, or the reason why it cannot be.

    Takes images of the kinds READ by their first bytes (of an animation the first frame). The header's pixel count and
    a JPEG's scans are checked before anything is decoded; ``starts`` is called with that count when decoding
    starts. With ``opacity`` the image is replaced by how opaque it is, white where it is wholly. The long side may be
    LONGEST_SIDE times ``image_size``, which bounds what is stored. Equal input gives equal bytes.
    """
    upright = _decode(data, max_pixels, starts, _opaque if opacity else upright_rgb)
    if isinstance(upright, str):
        return upright
    most, size = LONGEST_SIDE * storing.image_size, upright.size
    if min(size) < storing.min_image_size:
        return "too_small"
    if storing.resize_mode == "keep_ratio" and max(size) * min(1, storing.image_size / min(size)) > most:
        return "too_long"  # nothing so long is resized or encoded
    plain = _bitmap(upright)
    del upright  # a large one takes as much memory as what follows
    stored, width, height, *_ = _resizer(storing)(plain)
    if max((width, height) if stored else size) > most:
        return "too_long"
    return StoredImage(stored, width, height, storing.encode_format) if stored else "decode_error"


def _opaque(image: Image.Image) -> Image.Image:
    alpha = turned(image).convert("RGBA").getchannel("A")
    return Image.merge("RGB", [alpha] * 3)


def inspect(data: bytes, max_pixels: int, *, starts: Callable[[int], object] = int) -> tuple[int, int] | str | None:
    """Returns width and height, upright, of an image that can be used as it lies, or the reason why it cannot be used.

    It is one that ``prepare`` would take but for its sides. Returns None for an image that is to be stored as a fetched
    one is: it is of a kind that IN_PLACE lacks, has more pixels than IN_PLACE_PIXELS or more scans than IN_PLACE_SCANS,
    or took more than IN_PLACE_S of processor time.
    """
    start = time.process_time()
    size = measure(data, max_pixels)
    if isinstance(size, str):
        return size
    if kind_of(data) not in IN_PLACE or size[0] * size[1] > IN_PLACE_PIXELS or too_many_scans(data, IN_PLACE_SCANS):
        return None
    upright = _decode(data, max_pixels, starts, upright_rgb)
    if isinstance(upright, str):
        return upright
    return upright.size if time.process_time() - start <= IN_PLACE_S else None


def read_pixels(data: bytes, size: int | None) -> np.ndarray:
    """Returns the view of an image, uint8 [size, size, 3], or without a size all of it, upright, uint8 [h, w, 3].

    Raises OSError or ValueError on a bad file.
    """
    return open_view(data, size) if size else np.asarray(upright_rgb(Image.open(io.BytesIO(data))))


def read_foreign_pixels(data: bytes, size: int | None, *, starts: Callable[[int], object] = int) -> np.ndarray | str:
    """Returns what ``read_pixels`` does, of an image that ``inspect`` lets be used as it lies; else the reason."""
    if kind_of(data) not in IN_PLACE:
        return "not_an_image"
    header = _decode(data, IN_PLACE_PIXELS, int, None)
    if isinstance(header, str):
        return header
    if too_many_scans(data, IN_PLACE_SCANS):
        return "decode_error"
    starts(header.width * header.height)
    try:
        return read_pixels(data, size)
    except Exception:  # as in _decode
        return "decode_error"


def measure(data: bytes, max_pixels: int) -> tuple[int, int] | str:
    """Returns width and height of an image by its header, or the reason why ``prepare`` would not open it."""
    opened = _decode(data, max_pixels, int, None)
    return opened if isinstance(opened, str) else opened.size


def kind_of(data: bytes) -> str:
    """Returns the kind of an image by its first bytes, as Pillow calls it, "" for none of READ."""
    if data[4:8] == b"ftyp" and (data[8:12] in BRANDS or data[8:12] in (b"mif1", b"msf1")):
        # The two general brands are followed by those that say more.
        return BRANDS.get(data[8:12]) or ("AVIF" if b"avif" in data[16:64] else "HEIF")
    if (data[:4], data[8:12]) == (b"RIFF", b"WEBP"):
        return "WEBP"
    return next((kind for begin, kind in BEGINNINGS.items() if data.startswith(begin)), "")


@cache
def heif_is_there() -> bool:
    """Returns whether HEIC can be read, which takes the package of the extra ``heif``, and makes Pillow read it."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    return True


def _decode(
    data: bytes, max_pixels: int, starts: Callable[[int], object], shown: Callable[[Image.Image], Image.Image] | None
) -> Image.Image | str:
    """Returns what ``shown`` makes of an image, or without it the image of which only the header is read."""
    if not data:
        return "zero_bytes"
    if not (kind := kind_of(data)):
        return "not_an_image"
    if kind == "HEIF" and not heif_is_there():
        return "needs_heif"
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                return "too_many_pixels"
            if shown is None:
                return image
            if too_many_scans(data, MAX_SCANS):
                return "decode_error"
            starts(pixels)
            image.load()
            # The decoder of WebP keeps two canvases as long as its image is there.
            plain = image.copy() if kind == "WEBP" else image
        del image
        return shown(plain)
    except Image.DecompressionBombError:
        return "too_many_pixels"
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        cut = "truncated" in str(error) or (data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data))
        return "truncated" if cut else "decode_error"


def too_many_scans(data: bytes, most: int) -> bool:
    """Returns whether an image is a JPEG that has more than this many scans.

    A decoder goes over all pixels for each, however few bytes it has. See LJT-01-003 of libjpeg-turbo's advice. Never
    counts fewer than libjpeg finds before it gives up.
    """
    if kind_of(data) != "JPEG":
        return False
    at, scans = 2, 0
    while scans <= most and (marker := SEGMENT.search(data, at)):
        at, kind = marker.end(), marker[1][0]
        if kind == END:
            break
        scans += kind == SCAN
        at += int.from_bytes(data[at : at + 2])  # its own length, those two bytes included
    return scans > most


def _bitmap(image: Image.Image) -> io.BytesIO:
    """Returns an RGB image as a BMP, which the resizer reads with no more than a copy."""
    out = io.BytesIO()
    image.save(out, "BMP")
    out.seek(0)
    return out


@cache
def _resizer(storing: Storing) -> Any:
    return load_resizer().Resizer(
        storing.image_size,
        storing.resize_mode,
        resize_only_if_bigger=True,
        encode_format=storing.encode_format,
        encode_quality=storing.encode_quality,
    )


@cache
def load_resizer() -> Any:
    """Returns the module img2dataset.resizer, without the rest of the package."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # albumentations asks a package index for news otherwise
    package = importlib.util.find_spec("img2dataset")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0], "resizer.py")
    spec = importlib.util.spec_from_file_location("img2dataset.resizer", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
