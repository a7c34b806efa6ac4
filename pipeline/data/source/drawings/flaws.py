"""Lists nine flawed pairs, so that the quick start shows what becomes of bad rows before a user meets their own.

One is the address of a row of every other subset, one has no caption; of the others the bytes are at fault, or the size
of the image, or the length of the caption. They follow the other list, ``drawings:flawed``; no model is trained on
them.
"""

from __future__ import annotations

import io

from PIL import Image

from pipeline.data.source.drawings.listing import DrawingRow, drawing_rows
from pipeline.data.source.drawings.world import HOST, draw, draw_png, drawing_of

FLAWED = "/flawed/"
_CAPTIONS = {
    "missing": "a monster that nobody has kept",
    "page": "a monster behind a login page",
    "cut": "a plant in a pot, cut off on its way",
    "empty": "an image of nothing at all",
    "small": "a planet, 32 px wide",
    "strip": "four monsters in a row",
    "untold": "",
    "long": "a square pink monster," + " and more keywords for search engines" * 30,
}


def flawed_rows() -> list[DrawingRow]:
    """Returns the list, in its fixed order. Raises UserError if the demo packages are missing."""
    twice = drawing_rows("nano")[0]
    rows = [
        twice._replace(url=f"http://{HOST}{FLAWED}{name}.png", captions=(caption,), group="flawed", split="train")
        for name, caption in _CAPTIONS.items()
    ]
    return [*rows, twice]


def flawed_bytes(url_path: str) -> bytes:
    """Returns what is served under the path of such a row. Raises LookupError for a path without bytes."""
    drawings = [drawing_of(row.url)[0] for row in drawing_rows("nano")[:4]]
    match url_path.removeprefix(FLAWED).removesuffix(".png"):
        case "page":
            return b"<!doctype html><title>Please log in</title>"
        case "cut":
            return draw_png(drawings[0], 256)[:2000]
        case "empty":
            return b""
        case "small":
            return draw_png(drawings[1], 32)
        case "strip":
            strip = Image.new("RGB", (1024, 256))
            for i, drawing in enumerate(drawings):
                strip.paste(draw(drawing, 256), (256 * i, 0))
            out = io.BytesIO()
            strip.save(out, "PNG")
            return out.getvalue()
        case "untold":
            return draw_png(drawings[2], 256)
        case "long":
            return draw_png(drawings[3], 256)
    raise LookupError(f"{url_path}: no such image")
