"""Encodes finished images as an answer asks for them."""

from __future__ import annotations

import io

from PIL import Image

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
BEST = 100  # OpenAI's default of output_compression


def encode(png: bytes, output_format: str, compression: int = BEST) -> bytes:
    """Returns an image in one of MEDIA_TYPES; a PNG as it is, with its recipe, which the other formats do not carry.

    Equal arguments give equal bytes.

    Args:
        png: The finished image, a PNG of this server's.
        output_format: Name of the format.
        compression: Quality of JPEG and WebP, 0 to 100, where 100 is best; PNG is lossless.
    """
    if output_format == "png":
        return png
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        # Colours at full resolution, as a PNG has them; WebP knows no such choice.
        image.convert("RGB").save(out, output_format.upper(), quality=compression, subsampling=0)
    return out.getvalue()
