"""Finds the columns of a table that say what a row needs, by their names and by those that other tools give them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.local import MAX_REFERENCE
from pipeline.progress import say_once

DELIMITERS = (",", ";", "\t", "|")  # of values in a line, as programs write them
SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz")  # of tables
IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
LIMIT = 1 << 20  # characters of a row of a CSV or TSV file, of a value in Parquet, of a file of captions
MOST_SHOWN = 100  # columns, and characters of each, in a message
MAX_CAPTION = 4096  # characters, of which CLIP reads the first 77 tokens; the rest is cut
MAX_CAPTIONS = 64 << 10  # characters of the captions of one row; further ones are left out
# What the two columns that every list needs are called elsewhere: img2dataset, LAION, clip-retrieval, diffusers.
KNOWN = {
    "url": (
        "image_url",
        "img_url",
        "image_path",
        "img_path",
        "file_name",
        "filename",
        "file_path",
        "filepath",
        "path",
        "image",
    ),
    "caption": ("text", "prompt", "description", "alt_text", "alt"),
}
# Of Flickr30k, and of tars that the Hugging Face Hub has made tables of; taken where no other is there.
FURTHER = {"url": ("image_name", "jpg", "jpeg", "png", "webp"), "caption": ("comment", "raw", "txt")}
# Widths and heights in pixels, as img2dataset states them of what it fetched and of what it stored, and LAION.
SIZES = ("original_width", "original_height", "width", "height", "WIDTH", "HEIGHT")


@dataclass(frozen=True)
class Flaw:
    """Says why a row cannot be read: a reason of pipeline.ledger, and for a message what is wrong, and where."""

    reason: str
    what: str


def table_kind(name: str) -> str | None:
    """Returns which of SUFFIXES a name ends with, without ``.gz``, or None for what is not a table."""
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)
    return suffix and suffix.removesuffix(".gz")


def columns_of(path: Path, names: Sequence[str], wanted: Sequence[str], needed: int) -> list[str | None]:
    """Returns what the wanted columns are called in a file, None for one that it lacks."""
    counts = Counter(names)
    found = [column if counts[column] else None for column in wanted]
    for i, column in enumerate(wanted[:needed]):
        found[i] = found[i] or _known(path, names, column)
    for name in found:
        if name is not None and counts[name] > 1:
            raise UserError(f"source {path}: {counts[name]} columns are called {name}; rename all but one")
    return found


def meant(names: Sequence[str], column: str) -> list[str]:
    """Returns the columns that can mean ``column`` by their names, best only: one if it is clear which."""
    if column in names:
        return [column]
    for known in ([column], KNOWN[column], FURTHER[column]) if column in KNOWN else ():
        if found := list(dict.fromkeys(name for name in names if name.lower() in known)):
            return found
    return []


def _known(path: Path, names: Sequence[str], column: str) -> str:
    """Returns the one column that means ``column`` by its name, and says so. Raises UserError without one."""
    found = meant(names, column)
    if len(found) == 1:
        say_once(f"{path.name}: {found[0]} is used as the column {column}")
        return found[0]
    some = [name[:MOST_SHOWN] for name in names[:MOST_SHOWN]] + ["..."] * (len(names) > MOST_SHOWN)
    which = f"{' and '.join(found)} could be meant" if found else f"it has {', '.join(some)}"
    raise UserError(f"source {path}: no column {column}; {which}. Set source.image_column or source.caption_column")


def text_of(value: Any) -> str | None:
    """Returns a value as text. Raises UnicodeDecodeError, and ValueError for one that is too long."""
    if isinstance(value, str | bytes) and len(value) > LIMIT:
        raise ValueError(f"has over {LIMIT:,} characters")
    return (
        value if value is None or isinstance(value, str) else value.decode() if isinstance(value, bytes) else str(value)
    )


def bounded_captions(texts: Iterable[str | None]) -> tuple[list[str], int]:
    """Returns the captions of a row within MAX_CAPTION and MAX_CAPTIONS, and how many are cut or left out."""
    kept, cut, left = [], 0, MAX_CAPTIONS
    for text in filter(None, texts):
        short = text if len(text) <= MAX_CAPTION else " ".join(text.split())[:MAX_CAPTION]
        cut += len(short) < len(text) or len(short) > left
        if len(short) <= left:
            left -= len(short)
            kept.append(short)
    return kept, cut


def bounded_row(row: Sequence[Any]) -> tuple[Sequence[Any] | Flaw, int]:
    """Returns a row with its captions, the second value, cut, and how many were; a Flaw for another long value."""
    kept, all_cut = list(row), 0
    for place, value in enumerate(row):
        if place == 1 and value:
            captions, all_cut = bounded_captions(value if isinstance(value, list) else [value])
            kept[1] = captions if isinstance(value, list) else captions[0]
        elif value and len(value) > MAX_REFERENCE:
            what = f"its reference has {len(value):,} characters; {MAX_REFERENCE:,} at most are read"
            if place == 0:
                return Flaw("unsupported_reference", what), all_cut
            return Flaw("malformed_row", what.replace("reference", f"value {place + 1}")), all_cut
    return kept, all_cut


def characters_of(row: Sequence[Any] | Flaw) -> int:
    """Returns the characters of a row's values."""
    if isinstance(row, Flaw):
        return 0
    try:
        return len("".join(filter(None, row)))
    except TypeError:  # captions
        flat = (value if isinstance(value, list) else (value,) for value in row)
        return sum(map(len, filter(None, chain.from_iterable(flat))))


def one_line_each(lines: Iterable[str | None]) -> tuple[str, ...]:
    """Returns texts on one line each, without those that are empty."""
    return tuple(text for line in lines if line and (text := " ".join(line.split())))
