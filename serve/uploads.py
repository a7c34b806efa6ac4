"""Opens images that clients send, in the way in which all images from outside are opened."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PureWindowsPath

from fastapi import UploadFile
from PIL import Image

from models.inpainting import mask_flaw
from pipeline.data.pairs.decoding import OWN, shared_decoder
from pipeline.data.pairs.image import MAX_BYTES, MAX_PIXELS, StoredImage
from pipeline.ledger import REASONS
from pipeline.sampling.recipe import text_chunks
from serve.errors import ApiError

NAME_CHARACTERS = 255  # which is what file systems take
DECODING = ThreadPoolExecutor(1)  # there is one decoder: who waits for it keeps no captions waiting


async def read_image(file: UploadFile, field: str) -> bytes:
    """Returns an upload as a PNG, upright and with a short side of 1024 px at most. Raises ApiError."""
    return await _opened(shared_decoder().prepare, file, field)


async def read_mask(file: UploadFile) -> bytes:
    """Returns how opaque an upload is as a PNG of the same view, white where it is opaque. Raises ApiError."""
    return await _opened(partial(shared_decoder().prepare, opacity=True), file, "mask")


async def read_caption(file: UploadFile) -> str:
    """Returns the caption in the recipe that a PNG of this software carries, "" where there is none."""
    await file.seek(0)
    return text_chunks(await file.read(MAX_BYTES)).get("caption", "")


def file_name(file: UploadFile) -> str:
    """Returns the name of an upload's file without folders, which a recipe keeps so that ``redraw`` finds it."""
    return PureWindowsPath(file.filename or "").name[:NAME_CHARACTERS]


def check_mask(image: bytes, mask: bytes) -> None:
    """Raises ApiError for a mask of another shape than its image, and for one that leaves nothing to draw."""
    if why := mask_flaw(Image.open(io.BytesIO(image)), Image.open(io.BytesIO(mask))):
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
            f"{field}: cannot be used ({found}: {REASONS[found]}): send a PNG, JPEG or WebP of at most "
            f"{MAX_PIXELS // 10**6} million pixels",
            field,
        )
    return found.data
