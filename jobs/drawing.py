"""What ``unclip sample``, ``edit``, ``redraw`` and ``generate`` share: the words of a drawing, and the files made."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, get_type_hints

from models.sampling_config import OTHER_NAMES, SamplingConfig
from pipeline.errors import UserError
from pipeline.parse import parse, read_value
from pipeline.sampling.recipe import ImageRecipe
from pipeline.store.records import digest

if TYPE_CHECKING:
    import numpy as np

SLUG_BYTES = 80  # UTF-8; with kind, hash, seed and suffix a name stays below the 143 bytes of encrypted folders
NAME_HASH = 10  # hexadecimal digits


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raises UserError for a ValueError of what was asked for."""
    try:
        yield
    except ValueError as e:
        raise UserError(str(e)) from None


def read_options(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the values of NAME=VALUE by name, each of its option's type, also by the names of other programs.

    Raises UserError.
    """
    numbers = {"n": int, "seed": int, "eta": float, "strength": float, "shares": tuple[float, ...], "size": int}
    kinds = get_type_hints(SamplingConfig) | numbers
    options: dict[str, Any] = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: write NAME=VALUE")
        own = OTHER_NAMES.get(name, name)
        if own in ("caption", "before") or (own == "size" and ("x" in value or value == "auto")):
            options[name] = value
            continue
        parsed = read_value(value, f"--set {text}")
        options[name] = parse(kinds[own], parsed, f"--set {name}") if own in kinds else parsed
    return options


def one_file(to: Path | None, images: int, kinds: Sequence[str] = (".png",)) -> bool:
    """Returns whether ``-o`` names a file, of one of ``kinds``, and not a folder.

    Raises UserError for a file of another kind, and for one that would have to hold several images.
    """
    if to is None or not to.suffix or to.is_dir():
        return False
    if to.suffix.lower() not in kinds:
        raise UserError(f"--to {to}: the output is a {' or '.join(kinds)} file; name one, or a folder")
    if images > 1:
        raise UserError(f"--to {to}: {images} images do not fit into one file; name a folder")
    return True


def writable(place: Path, single: bool) -> Path:
    """Returns a file or folder for images, with the folders above it made, once a file could be made there.

    Raises UserError: what is drawn for minutes is not lost to a place that cannot be written.
    """
    folder = place.parent if single else place
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
        if single and place.exists():
            open(place, "r+b").close()
    except OSError as e:
        raise UserError(f"{place}: cannot be written ({e.strerror}); name another place with --to") from None
    return place


def write_png(path: Path, pixels: np.ndarray, recipe: ImageRecipe, more: Mapping[str, str] | None = None) -> Path:
    """Writes an image, uint8 [height, width, 3], with its recipe, and returns its file."""
    from pipeline.sampling.drawing import png_with_text

    path.write_bytes(png_with_text(pixels, {**recipe.chunks(), **(more or {})}))
    return path


def file_name(words: str, request: Mapping[str, Any], seed: int) -> str:
    """Returns a file's name without its suffix: some words, a hash of everything that was asked for, and the seed.

    Two requests that differ never share a name, also where a file system takes upper and lower case for the same.
    """
    return f"{slug(words)}-{digest(request)[:NAME_HASH]}-{seed}"


def slug(text: str) -> str:
    """Returns a text as part of a file name: letters and digits of any script, lower case, NFC, at most SLUG_BYTES."""
    kept = ""
    for char in unicodedata.normalize("NFC", text.lower()):
        kind = unicodedata.category(char)[0]
        # A mark belongs to its letter: many scripts have no vowels without marks. Alone it would be invisible.
        kept += char if kind in "LN" or (kind == "M" and kept[-1:].strip()) else " "
    words = "-".join(kept.split())
    return words.encode()[:SLUG_BYTES].decode(errors="ignore").strip("-") or "image"
