"""Reads the headers of files of np.save."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.data.source.columns import Flaw
from pipeline.data.source.parsers.child import Budget

KINDS = ("float16", "float32")


def npy_header(opened: BinaryIO, path: Path, budget: Budget) -> Iterator[list[Any] | Flaw]:
    """Yields what the header of a file of np.save says: type, order (C or F), offset of the first value, and shape."""
    try:
        if np.lib.format.read_magic(opened) != (1, 0):
            raise ValueError
        shape, fortran, kind = np.lib.format.read_array_header_1_0(opened)
    except Exception:  # of Python's own parser, too
        yield Flaw("not_an_embedding", f"{path.name} has a damaged header")
        return
    if kind.name not in KINDS or len(shape) != 2:
        yield Flaw("not_an_embedding", f"{path.name} holds {kind} of shape {shape}, not a matrix of float16 or float32")
        return
    yield [kind.name, "F" if fortran else "C", str(opened.tell()), *map(str, shape)]
