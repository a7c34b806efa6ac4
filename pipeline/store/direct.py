"""Writing past the page cache."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from pathlib import Path

from pipeline.store.base import Buffers

BLOCK = 4 << 20  # bytes of a write
DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only


def write_direct(file: Path, buffers: Buffers) -> None:
    """Write buffers to a file, from this process to the disk where the file system can do that. Raises OSError.

    The page cache would cost another copy, push out what is read again, and fill fresh pages, which in a virtual
    machine can take ten times as long as the disk.
    """
    with open(file, "wb", buffering=0) as out:
        descriptor = out.fileno()
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | DIRECT)
        block, filled = memoryview(mmap.mmap(-1, BLOCK)), 0  # begins with a page: the disk reads it itself
        for buffer in buffers:
            taken = 0
            while taken < len(buffer):
                count = min(len(buffer) - taken, BLOCK - filled)
                block[filled : filled + count] = buffer[taken : taken + count]
                taken, filled = taken + count, filled + count
                if filled == BLOCK:
                    _write(descriptor, block)
                    filled = 0
        _write(descriptor, block[:filled])


def _write(descriptor: int, data: memoryview) -> None:
    """Write all of it. After what cannot go to the disk directly, as an end that fills no block of it, nothing does."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError as e:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            if e.errno != errno.EINVAL or not flags & DIRECT:
                raise
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~DIRECT)
