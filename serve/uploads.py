"""Opens images that clients send, in the way in which all images from outside are opened."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from fastapi import UploadFile
from PIL import Image

from models.inpainting import OPAQUE
from models.sampling_config import BASE
from models.view import view
from pipeline.data.pairs.decoding import OWN, shared_decoder
from pipeline.data.pairs.image import MAX_BYTES, MAX_PIXELS, StoredImage
from pipeline.ledger import REASONS
from serve.errors import ApiError

DECODING = ThreadPoolExecutor(1)  # there is one decoder: who waits for it keeps no captions waiting
CAPTION = b"caption" + 5 * b"\0"  # how a text chunk of ours begins that is neither compressed nor translated
CHUNKS = 16  # of a PNG that are looked at for it; ours has four before its pixels
SKEW = 0.02  # by which the shapes of image and mask may differ, since their sides are rounded


async def read_image(file: UploadFile, field: str) -> bytes:
    """Returns an upload as a PNG, upright and with a short side of 1024 px at most. Raises ApiError."""
    return await _opened(shared_decoder().prepare, file, field)


async def read_mask(file: UploadFile) -> bytes:
    """Returns how opaque an upload is as a PNG of the same view, white where it is opaque. Raises ApiError."""
    return await _opened(partial(shared_decoder().prepare, opacity=True), file, "mask")


async def read_caption(file: UploadFile) -> str:
    """Returns the caption in the recipe that a PNG of this software carries, "" where there is none."""
    await file.seek(0)
    return recipe_caption(await file.read(MAX_BYTES))


def recipe_caption(data: bytes) -> str:
    """Returns the caption in a PNG's text chunk, "" without one. Reads no pixels and unpacks nothing."""
    at = 8 if data.startswith(b"\x89PNG\r\n\x1a\n") else len(data)
    for _ in range(CHUNKS):
        head = data[at : at + 8]
        if len(head) < 8 or head[4:] == b"IDAT":
            break
        size = int.from_bytes(head[:4])
        if head[4:] == b"iTXt" and data.startswith(CAPTION, at + 8):
            return data[at + 8 + len(CAPTION) : at + 8 + size].decode(errors="replace")
        at += 12 + size  # length, kind and checksum
    return ""


def check_mask(image: bytes, mask: bytes) -> None:
    """Raises ApiError for a mask of another shape than its image, and for one that leaves nothing to draw."""
    (width, height), shown = Image.open(io.BytesIO(image)).size, Image.open(io.BytesIO(mask))
    why = ""
    if abs(width * shown.height - height * shown.width) > SKEW * width * shown.height:
        why = f"is {shown.width} x {shown.height} and the image {width} x {height}: give both the same shape"
    elif view(shown, BASE).min() >= OPAQUE:
        why = "is opaque in all of the square that is drawn: make transparent what is to be drawn again"
    if why:
        raise ApiError(400, "invalid_image", f"mask: {why}", "mask")


async def _opened(how: Callable[..., StoredImage | str], file: UploadFile, field: str) -> bytes:
    def opened() -> StoredImage | str:
        # Read here, in its turn: until then an upload lies on the disk.
        return how(file.file.read(MAX_BYTES + 1), MAX_PIXELS, OWN)

    found = await asyncio.get_running_loop().run_in_executor(DECODING, opened)
    if isinstance(found, str):
        raise ApiError(
            400,
            "invalid_image",
            f"{field}: cannot be taken ({found}: {REASONS[found]}): send a PNG, JPEG or WebP of at most "
            f"{MAX_PIXELS // 10**6} million pixels",
            field,
        )
    return found.data
