"""Opens images that clients send, in the way in which all images from outside are opened."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from fastapi import UploadFile
from PIL import Image

from models.inpainting import OPAQUE
from models.sampling_config import BASE
from models.view import view
from pipeline.data.pairs.decoding import OWN, shared_decoder
from pipeline.data.pairs.image import MAX_BYTES, StoredImage
from pipeline.ledger import REASONS
from serve.errors import ApiError

MAX_PIXELS = 16_000_000  # of an upload; an honest one takes the decoder for a second at most
DECODING = ThreadPoolExecutor(1)  # there is one decoder: who waits for it keeps no captions waiting
SKEW = 0.02  # by which the shapes of image and mask may differ, since their sides are rounded


async def read_image(file: UploadFile, field: str) -> bytes:
    """Returns an upload as a PNG, upright and with a short side of 1024 px at most. Raises ApiError."""
    return await _opened(shared_decoder().prepare, file, field)


async def read_mask(file: UploadFile) -> bytes:
    """Returns how opaque an upload is as a PNG of the same view, white where it is opaque. Raises ApiError."""
    return await _opened(shared_decoder().opacity, file, "mask")


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
