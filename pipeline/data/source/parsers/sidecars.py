"""Reads what holds the captions of an image beside it, in a folder or in a tar."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.data.source.columns import KNOWN, LIMIT, Flaw, one_line_each
from pipeline.data.source.parsers.child import Budget
from pipeline.data.source.parsers.encoding import decoded
from pipeline.data.source.parsers.text import parsed_object
from pipeline.progress import say_once

SIDECARS = ("txt", "caption", "json")  # extensions of what holds the captions of an image, the first that is there
CAPTIONS = ("caption", *KNOWN["caption"])  # where a sidecar in JSON has them, the first that is there


def sidecar(
    file: BinaryIO, path: Path, budget: Budget, extension: str, encoding: str, by_line: bool
) -> Iterator[list[Any] | Flaw]:
    """Yields the captions in a file beside an image as a row; none if it is empty."""
    if data := file.read(LIMIT + 1):
        found = sidecar_captions({extension: (data, str(path))}, encoding, by_line)
        yield found if isinstance(found, Flaw) else [None, list(found)]


def sidecar_captions(sidecars: Mapping[str, tuple[bytes, str]], encoding: str, by_line: bool) -> tuple[str, ...] | Flaw:
    """Returns the captions of what lies beside an image.

    Args:
        sidecars: First bytes, one more than LIMIT at most, and name of each by its extension. Of the first of
            SIDECARS that is there each paragraph is a caption, or of JSON the value of the first of CAPTIONS.
        encoding: Encoding of text that is not UTF-8.
        by_line: True where each line is a caption, and not each paragraph.
    """
    extension = next((extension for extension in SIDECARS if extension in sidecars), None)
    if extension is None:
        return ()
    data, path = sidecars[extension]
    where = path.encode("utf-8", "backslashreplace").decode()
    if len(data) > LIMIT:
        return Flaw("malformed_row", f"{where} has over {LIMIT:,} bytes")
    try:
        text = decoded(data, encoding)
    except UnicodeDecodeError as e:
        said = f"0x{data[e.start]:02x}, which is not {encoding or 'UTF-8'}"
        return Flaw("not_utf8", f"byte {e.start + 1} of {where} is {said}; source.encoding names another encoding")
    if extension != "json":
        return one_line_each(text.splitlines() if by_line else _paragraphs(text))
    found = parsed_object(text)
    if isinstance(found, str):
        return Flaw("malformed_row", f"{where} {found}")
    said = next((value for name in CAPTIONS if (value := found.get(name))), "")
    lines = said if isinstance(said, list) else [said]
    try:
        "".join(lines).encode()
    except (TypeError, UnicodeEncodeError):
        return Flaw("malformed_row", f"{where} has a caption that is not text")
    return one_line_each(lines)


def _paragraphs(text: str) -> list[str]:
    """Returns the parts of a text between its empty lines."""
    found = [list(lines) for said, lines in groupby(text.splitlines(), lambda line: bool(line.strip())) if said]
    if any(len(lines) > 1 for lines in found):
        say_once(
            "lines of a text beside an image form one caption, up to an empty line; source.caption_lines: true makes "
            "each line a caption"
        )
    return [" ".join(lines) for lines in found]
