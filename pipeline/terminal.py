"""Keeps text of lists, records and other machines from controlling a terminal.

``jobs.cli.guard`` puts a Printable in the place of the standard streams, so everything that a command, a library or a
log prints passes through here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Control characters but tab and line feed, what turns the direction of text (CVE-2021-42574), and halves of characters,
# which no stream can encode.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
RESET = "\x1b[0m"


def printable(text: str) -> str:
    r"""Returns text with an escape such as ``\x1b`` for each character that would control a terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Printable:
    """A text stream that writes ``printable`` text to another one, ``unfiltered``, and is like it otherwise."""

    def __init__(self, unfiltered: TextIO):
        self.unfiltered = unfiltered

    def write(self, text: str) -> int:
        """Writes text as ``printable`` returns it."""
        if text == RESET:  # colorama, which Ray loads, resets at exit the colours that nothing has set
            return len(text)
        return self.unfiltered.write(printable(text))

    def writelines(self, lines: Any) -> None:
        """Writes each line as ``write`` does."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfiltered, name)


@contextmanager
def printable_streams() -> Iterator[None]:
    """Lets standard output and standard error take printable text only."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Printable(sys.stdout), Printable(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
