"""One line of the output of ``unclip doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """``level``: a run works (ok), works badly (warning) or not at all (problem). ``advice``: what to do about it."""

    level: Literal["ok", "warning", "problem"]
    subject: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:9}{self.subject:10}{self.text}{f'; {self.advice}' if self.advice else ''}"


def gigabytes(count: float) -> str:
    """Returns a number of bytes such as '0.3 GB' or '22.1 GB'."""
    return f"{count / 1e9:,.1f} GB"


def brief(error: BaseException) -> str:
    """Returns an unexpected error in one line: its first, or the last line of a traceback inside."""
    lines = str(error).strip().splitlines() or [""]
    line = lines[-1] if any("Traceback" in line for line in lines) else lines[0]
    return f"{type(error).__name__}: {line}".removesuffix(": ")
