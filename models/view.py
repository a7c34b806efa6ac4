"""The view of an image file: the pixels that every model sees.

CLIP and every trained model see the same square, so that a decoder never learns what its embedding did not see.
"""

import contextlib
import io

import numpy as np
from PIL import ExifTags, Image, ImageCms


def open_view(data: bytes, size: int) -> np.ndarray:
    """Decodes ``data`` and returns its view, uint8 [size, size, 3]. Raises OSError or ValueError on a bad file."""
    image = Image.open(io.BytesIO(data))
    if image.format == "JPEG":  # decoding at 1/2, 1/4 or 1/8 is far cheaper, and still leaves two pixels for one
        image.draft("RGB", (2 * size, 2 * size))
    return view(image, size)


def view(image: Image.Image, size: int) -> np.ndarray:
    """Returns ``upright_rgb`` of an image, square centre crop, antialiased resize: uint8 [size, size, 3]."""
    image = upright_rgb(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


_TURNS = {  # by EXIF orientation, of which 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turned(image: Image.Image) -> Image.Image:
    """Returns an image turned as its EXIF orientation says; itself, where there is none or its EXIF cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises SyntaxError, struct.error and others
        return image
    turn = _TURNS.get(orientation)
    if turn is None:
        return image
    upright = image.transpose(turn)
    for said in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):  # or it would be turned a second time
        upright.info.pop(said, None)
    return upright


def upright_rgb(image: Image.Image) -> Image.Image:
    """Returns an image of any kind as RGB: turned as its EXIF orientation says, over white, and in sRGB.

    16 bits become 8, and an embedded ICC profile is applied unless it is broken or is for another kind of image. What
    is given is not changed, and comes back itself if there is nothing to do. Raises OSError or ValueError for pixels
    that cannot be decoded, or have no range (32 bits, floating point).
    """
    image.load()  # a PNG may have its EXIF chunk behind the pixels
    profile = image.info.get("icc_profile")
    image = turned(image)
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips 16-bit grey at 255
        levels = np.asarray(image)
        # A transparent level becomes white here: below, the image no longer has 16 bits to compare it with.
        image = Image.fromarray(np.where(levels == image.info.get("transparency"), 255, levels >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} (32 bits, or floating point) have no defined black and white")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # Modes for which there are ICC profiles stay until theirs is applied.
    if image.mode not in ("L", "CMYK", "RGB"):
        image = image.convert("RGB")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            embedded, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, embedded, srgb, outputMode="RGB") or image
    return image if image.mode == "RGB" else image.convert("RGB")
