"""Runs in the child process that reads the files of a list (see pipeline.data.source.reader).

Each file comes as a request with its descriptor. What a list may cost grows with the size of its files; a budget that
is spent ends the list at a row that does not depend on the machine.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.data.source.columns import MAX_CAPTION, MAX_CAPTIONS, Flaw, bounded_row, characters_of
from pipeline.errors import UserError
from pipeline.progress import say_once
from pipeline.sandbox import give_up_rights, limit_memory, limit_time, memory_mapped, send

READERS = {  # each yields rows: lists of texts, lists of texts and Nones, or a Flaw; cells yields bytes or a Flaw
    "text": "pipeline.data.source.parsers.text:text_rows",
    "parquet": "pipeline.data.source.parsers.parquet:parquet_rows",
    "annotations": "pipeline.data.source.parsers.annotations:annotation_rows",
    "cells": "pipeline.data.source.parsers.cells:cells",
    "sheet": "pipeline.data.source.parsers.sheets:sheet_rows",
    "count": "pipeline.data.source.parsers.parquet:parquet_count",
    "npy": "pipeline.data.source.parsers.npy:npy_header",
    "tar": "pipeline.data.source.parsers.tar:members",
    "sidecar": "pipeline.data.source.parsers.sidecars:sidecar",
}
BATCH_ROWS, BATCH_CHARACTERS = 4096, 256 << 10  # of a message, which one row may exceed

# What a list may cost. Each file adds its size times the second number, and a row.
ROWS = (100_000, 1 / 8)
CHARACTERS = (32 << 20, 64)  # unpacked, and handed on
MEMORY = (192 << 20, 16)  # bytes that the child may map besides what Python and Arrow have mapped when they start
MOST_MEMORY = 2 << 30
SECONDS = (1.5, 1.5e-6)  # of processor time
SECONDS_A_FILE = 0.05


class Spent(Exception):
    """Says which budget a list has spent."""


@dataclass
class Budget:
    """Holds what a list may still cost. Its methods raise Spent."""

    rows: float = ROWS[0]
    unpacked: float = CHARACTERS[0]
    characters: float = CHARACTERS[0]
    size: int = 0

    def grow(self, size: int) -> None:
        """Adds what a file of this many bytes may cost."""
        self.size += size
        self.rows += 1 + size * ROWS[1]
        self.unpacked += size * CHARACTERS[1]
        self.characters += size * CHARACTERS[1]

    def unpack(self, size: int) -> None:
        """Counts bytes that were unpacked, or read again."""
        self.unpacked -= size
        if self.unpacked < 0:
            raise Spent(f"costs more than {CHARACTERS[1]} times its size to unpack")

    def take(self, characters: int) -> None:
        """Counts a row."""
        self.rows -= 1
        self.characters -= characters
        if self.rows < 0:
            raise Spent(f"has more than a row for {1 / ROWS[1]:g} bytes of its size")
        if self.characters < 0:
            raise Spent(f"has values of more than {CHARACTERS[1]} times its size")


class _Batches:
    """Gathers rows, bounds each, and sends them in batches."""

    def __init__(self, pipe: BinaryIO, budget: Budget):
        self.cut = 0
        self._pipe, self._budget = pipe, budget
        self._rows: list[Sequence[Any]] = []
        self._flaws: list[tuple[int, str, str]] = []
        self._characters = 0

    def add(self, row: Sequence[Any] | Flaw | bytes) -> None:
        """Takes a row, or the bytes of an image. Raises Spent, and then it is left out."""
        if isinstance(row, bytes):
            self._budget.unpack(len(row))
            self.flush()
            send(self._pipe, "image", row)
            return
        characters = characters_of(row)
        if not isinstance(row, Flaw) and characters > MAX_CAPTION:
            row, cut = bounded_row(row)
            self.cut += cut
            characters = MAX_CAPTIONS  # at most: what is cut off took time, too
        self._budget.take(characters)
        if isinstance(row, Flaw):
            self._flaws.append((len(self._rows) + len(self._flaws), row.reason, row.what[:MAX_CAPTION]))
            characters += 100
        else:
            self._rows.append(row)
        self._characters += characters
        if len(self._rows) + len(self._flaws) >= BATCH_ROWS or self._characters >= BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Sends the rows that are waiting."""
        if self._rows or self._flaws:
            batch = json.dumps([list(zip(*self._rows, strict=True)), self._flaws], ensure_ascii=False)
            # A half of a character becomes the escape that JSON has for it.
            send(self._pipe, "rows", batch.encode("utf-8", "backslashreplace"))
        self._rows, self._flaws, self._characters = [], [], 0


class _Saying(logging.Handler):
    """Sends what the readers log to the parent."""

    def __init__(self, pipe: BinaryIO):
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        send(self._pipe, "said", record.getMessage()[:MAX_CAPTION].encode("utf-8", "replace"))


def _read(pipe: BinaryIO, file: BinaryIO, budget: Budget, request: Any) -> None:
    """Sends the rows of a file, and how they ended."""
    kind, path, arguments, _ = request
    batches = _Batches(pipe, budget)
    module, _, name = READERS[kind].partition(":")
    answer = "end", ""
    try:
        for row in getattr(importlib.import_module(module), name)(file, Path(path), budget, *arguments):
            batches.add(row)
    except UserError as e:
        answer = "refused", str(e)
    except Spent as e:
        answer = "spent", f"source {path}: it {e}"
    except MemoryError:
        answer = "spent", f"source {path}: it takes more memory than its size allows"
    except Exception as e:
        answer = "refused", f"source {path}: cannot be read ({type(e).__name__}: {e})"
    batches.flush()
    said, text = answer
    text = text or str(batches.cut)
    send(pipe, said, text[:MAX_CAPTION].encode("utf-8", "replace"))


def main() -> None:
    """Reads files, each of which comes as a request with its descriptor, until the parent is gone."""
    with contextlib.suppress(OSError):  # Linux: if memory ends, this process is the first to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    connection = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    pipe = connection.makefile("wb")
    logger = logging.getLogger("unclip")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Saying(pipe))
    give_up_rights()  # before pyarrow is imported, which starts a thread: a process with threads keeps its network
    budget, files, mapped, unpaid = Budget(), 0, 0, 0.0
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent wants no more rows
        while request := _request(connection):
            line, file = request
            with file:
                asked = json.loads(line)
                if asked[-1]:  # it begins a list, which owes nothing for the one before it
                    budget, files, mapped, unpaid = Budget(), 0, 0, 0.0
                say_once.cache_clear()  # what is said of a file is for its list, and the parent says it once
                # What Python is when it starts, and what a reader imports, is not the list's to pay for.
                limit_memory(sys.maxsize)
                before = (memory_mapped(), time.process_time()) if files else (0, 0.0)
                importlib.import_module(READERS[asked[0]].partition(":")[0])
                mapped, unpaid = mapped + memory_mapped() - before[0], unpaid + time.process_time() - before[1]
                files += 1
                budget.grow(os.fstat(file.fileno()).st_size)
                limit_memory(mapped + min(MOST_MEMORY, MEMORY[0] + MEMORY[1] * budget.size))
                seconds = SECONDS[0] + SECONDS[1] * budget.size + SECONDS_A_FILE * files
                limit_time(unpaid + seconds - time.process_time())
                _read(pipe, file, budget, asked)


def _request(connection: socket.socket) -> tuple[bytes, BinaryIO] | None:
    """Returns the next request and its file, None behind the last one."""
    line, handles = b"", []
    while not line.endswith(b"\n"):
        data, received, _, _ = socket.recv_fds(connection, 1 << 16, 1)
        if not data:
            return None
        line += data
        handles += received
    return line, os.fdopen(handles[0], "rb")
