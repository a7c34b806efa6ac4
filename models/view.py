"""The one way an image file becomes pixels.

CLIP and every trained model see the same square, so that a decoder never learns what its embedding did not see.
"""

import io

import numpy as np
from PIL import ExifTags, Image, ImageOps


def open_view(data: bytes, size: int) -> np.ndarray:
    """Decode ``data`` and return its view, uint8 [size, size, 3]. Raises OSError or ValueError on a bad file."""
    image = Image.open(io.BytesIO(data))
    if image.format == "JPEG":  # decoding at 1/2, 1/4 or 1/8 costs a fraction, and still leaves two pixels for one
        image.draft("RGB", (2 * size, 2 * size))
    return view(image, size)


def view(image: Image.Image, size: int) -> np.ndarray:
    """Upright, alpha over white, sRGB, square centre crop, antialiased resize: uint8 [size, size, 3]."""
    image.load()  # where a PNG says how it was held
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":  # or it would be copied
        image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
