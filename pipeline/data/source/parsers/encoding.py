"""Tells the encoding of a text by its bytes, and asks for it where they do not tell.

UTF-8 is known by its rules, UTF-16 and UTF-32 by their byte order mark. All else looks alike: a wrong guess turns every
accent into something else, so the question shows how the first words would read.
"""

from __future__ import annotations

import codecs
import io
import re
from pathlib import Path

from pipeline.errors import UserError

HEAD = 1 << 20  # bytes by which the encoding of a file is judged
LONE = "unclip.lone_surrogates"  # error handler that leaves the bytes which cannot be decoded to their own row
MARKS = {  # the longer ones first: that of UTF-32 begins as that of UTF-16 does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
ASKED = ("cp1252", "cp1250", "cp1251", "mac_roman", "gb18030", "shift_jis")  # encodings that a question shows
MOST_WORDS, MOST_LETTERS = 3, 30  # of a reading


def _lone(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(LONE, _lone)


def encoding_of(path: Path, head: bytes, given: str) -> str:
    """Returns the encoding of a file by its first HEAD bytes, or ``given`` where they have neither mark nor UTF-8.

    Raises:
        UserError: where none is given then, with how the text would read in some.
    """
    if named := _marked(head):
        return named
    lines = head.split(b"\n")
    whole = lines if len(head) < HEAD else lines[:-1] or lines
    wrong = [(number, place) for number, line in enumerate(whole, 1) if (place := _not_utf8(line)) is not None]
    nul = b"\0" in lines[0]
    if given and (wrong or nul):
        return given
    remedy = "save it as UTF-8, or set source.encoding to what it is"
    if nul:
        raise UserError(
            f"source {path}: line 1 holds a NUL, as in binary files and in UTF-16 without a byte order mark "
            f"(utf-16-le, utf-16-be); {remedy}"
        )
    # A few such lines cost their rows; more than one in ten, and the file is in another encoding.
    if 10 * len(wrong) > len(whole):
        number, place = wrong[0]
        line = whole[number - 1]
        said = "".join(f", {words!r} in {name}" for words, name in _readings(line).items())
        raise UserError(
            f"source {path}: not UTF-8: byte {place + 1} of line {number} is 0x{line[place]:02x}, and {len(wrong):,} "
            f"of the first {len(whole):,} lines hold such bytes{said and f'; it reads{said[1:]}'}; {remedy}"
        )
    return "utf-8"


def decoded(data: bytes, given: str) -> str:
    """Returns a text as ``encoding_of`` judges it. Raises UnicodeDecodeError."""
    if named := _marked(data):
        return data.decode(named)
    try:
        return data.decode()
    except UnicodeDecodeError:
        if not given:
            raise
        return data.decode(given)


def check_encoding(name: str) -> None:
    """Raises ValueError for what is not the name of an encoding of text."""
    try:
        io.TextIOWrapper(io.BytesIO(), name)
    except LookupError:
        raise ValueError(f"encoding: {name!r} is unknown; use a name such as cp1252, cp1251 or shift_jis") from None


def _marked(head: bytes) -> str:
    return next((name for mark, name in MARKS.items() if head.startswith(mark)), "")


def _readings(line: bytes) -> dict[str, str]:
    """Returns the first words of a line that are not ASCII, as they read in the encodings of ASKED, each with one."""
    found: dict[str, str] = {}
    for name in ASKED:
        text = line.decode(name, "replace")
        words = " ".join(word[:MOST_LETTERS] for word in re.findall(r"[\w'-]*[^\x00-\x7f][\w'-]*", text)[:MOST_WORDS])
        if "\ufffd" not in text and words.isprintable():
            found.setdefault(words, name)
    return found


def _not_utf8(line: bytes) -> int | None:
    try:
        line.decode()
    except UnicodeDecodeError as e:
        return e.start
    return None
