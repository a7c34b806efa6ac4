"""A picture that a user names on the command line, read with the guards that fetched ones pass."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from pipeline.data.pairs.decoding import shared_decoder
from pipeline.data.pairs.stage import PairsRecipe
from pipeline.errors import UserError
from pipeline.ledger import REASONS
from pipeline.local import TooLarge, read_local

SIDE = 1024  # px; no model sees more


def open_picture(path: Path) -> Image.Image:
    """The picture in a file as pairs would store it, but without loss: upright, sRGB, its short side at most SIDE.

    It is decoded in a child process. Raises UserError for a file that cannot be read or is no PNG, JPEG or WebP, and
    for one above the budgets of bytes and pixels that pairs has.
    """
    most = PairsRecipe()
    try:
        data = read_local(path, most.max_bytes)
    except OSError as e:
        if isinstance(e, TooLarge):
            raise UserError(f"{path}: more than {most.max_bytes >> 20} MiB; name a smaller picture") from None
        raise UserError(f"{path}: cannot be read ({e.strerror}); name a picture") from None
    found = shared_decoder().resize(data, SIDE, most.max_pixels, "png", 1)
    if isinstance(found, str):
        raise UserError(
            f"{path}: cannot be taken ({found}: {REASONS[found]}); name a PNG, JPEG or WebP of at most "
            f"{most.max_pixels // 10**6} million pixels"
        )
    return Image.open(io.BytesIO(found.data))
