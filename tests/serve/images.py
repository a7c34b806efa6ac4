"""Images as the API takes and returns them."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def opened(data: Any) -> Any:
    """The PNG in base64 as an image."""
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    return image


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def noise(seed: int = 0, side: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))
