"""Reads the files of a list in a child process without rights, within a budget that the size of the list sets.

Parsers read what strangers made, and some of them are C++. The parent opens each file, with its own checks, and passes
the descriptor; it never parses the file. Rows come back in bounded batches of JSON. The child has neither network nor
credentials (pipeline.sandbox). Budgets of rows and bytes end the list at a row that does not depend on the machine, so
that a list read twice is the same list.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import NoneType, TracebackType
from typing import IO, Any, BinaryIO

from pipeline.data.source.columns import MAX_CAPTION, MAX_CAPTIONS, Flaw, bounded_row
from pipeline.errors import UserError
from pipeline.ledger import REASONS
from pipeline.local import PathPolicy, open_local
from pipeline.progress import say_once
from pipeline.sandbox import bare_environment, give_up_rights, limit_memory, limit_time, memory_mapped, receive, send

READERS = {  # each yields rows: lists of texts, lists of texts and Nones, or a Flaw; cells yields bytes or a Flaw
    "text": "pipeline.data.source.text:text_rows",
    "parquet": "pipeline.data.source.parquet:parquet_rows",
    "annotations": "pipeline.data.source.annotations:annotation_rows",
    "cells": "pipeline.data.source.cells:cells",
    "sheet": "pipeline.data.source.sheets:sheet_rows",
    "count": "pipeline.data.source.parquet:parquet_count",
    "npy": "pipeline.data.source.imported:npy_header",
    "tar": "pipeline.data.source.tars:members",
    "sidecar": "pipeline.data.source.rows:sidecar",
}
BATCH_ROWS, BATCH_CHARACTERS = 4096, 256 << 10  # of a message, which one row may exceed
MOST_MESSAGE = 4 << 20  # bytes: every character of a batch as an escape of six
MOST_SAID = 100  # lines of a child about a file
EXIT_S = 10.0  # between the last message of a child and its end
WAIT_S = 600.0  # without a message: the disk has gone, or the child does something else

# What a list may cost. Each file adds its size times the second number, and a row.
ROWS = (100_000, 1 / 8)
CHARACTERS = (32 << 20, 64)  # unpacked, and handed on
MEMORY = (192 << 20, 16)  # bytes that the child may map besides what Python and Arrow have mapped when they start
MOST_MEMORY = 2 << 30
SECONDS = (1.5, 1.5e-6)  # of processor time
SECONDS_A_FILE = 0.05

_COMMAND = (sys.executable, "-P", "-c", "from pipeline.data.source.child import main; main()")
_REMEDY = "name it in smaller parts, and without compression"


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


class ListReader:
    """Reads the files of one list, one after the other, in one child process that is started for the first.

    Use it in a ``with`` statement, which ends the child.
    """

    def __init__(self) -> None:
        self.spent = ""  # why the rest of the list is left out
        self.cut = 0  # captions that were cut
        self._allowed = Budget()  # the child counts, too; but it may have been taken over
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._pipe: IO[bytes] | None = None

    def __enter__(self) -> ListReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, of: TracebackType | None) -> None:
        self.close()

    def close(self, wait: bool = False) -> int | None:
        """Ends the child, if it is there, or waits until it has ended, and returns its exit code."""
        process, self._process = self._process, None
        for each in (self._pipe, self._socket):
            if each is not None:
                each.close()
        if process is None:
            return None
        if wait:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(EXIT_S)
        process.kill()
        return process.wait()

    def rows(
        self, kind: str, path: Path, width: int, *arguments: Any, within: PathPolicy | None = None
    ) -> Iterator[Any]:
        """Yields the rows of a file, each of ``width`` values, as the reader of its ``kind`` in READERS does.

        Behind the last row that the budget allows comes one that is "budget_spent", and then no file has rows. Rows
        without values are images, of at most as many bytes as the last argument says.

        Raises:
            OSError: as open_local does.
            UserError: for a file that cannot be read, or not in the processor time that its size allows.
        """
        if self.spent:
            return
        with open_local(path, within) as file:
            self._allowed.grow(os.fstat(file.fileno()).st_size)
            self._ask(file, [kind, str(path), arguments])
        number, whole = 0, False
        most = MOST_MESSAGE if width else max(MOST_MESSAGE, arguments[-1])
        try:
            while True:
                message, batch = self._answer(path, number, width, most)
                whole = message not in ("rows", "image")
                if message == "end":
                    return
                if message == "spent":
                    break
                number += len(batch)
                yield from batch
        finally:
            # The caller wants no more rows, and what still comes would be taken for rows of the next file.
            if not whole:
                self.close()
        self.spent += f", so all behind row {number:,} of {path.name} is left out; {_REMEDY}"
        yield Flaw("budget_spent", self.spent)

    def _answer(self, path: Path, number: int, width: int, most: int) -> tuple[str, Sequence[list[Any] | Flaw | bytes]]:
        """Returns the next "rows" with their batch, an "image", or "end" or "spent". Raises UserError."""
        for _ in range(MOST_SAID):
            try:
                message, data = receive(self._pipe, most)
                if message == "image" and width == 0:
                    return message, [data]
                text = data.decode()
                if message == "rows":
                    batch = _checked(json.loads(text), width)
                    self._allowed.rows -= len(batch)
                    self._allowed.characters -= sum(min(_characters(row), MAX_CAPTIONS) for row in batch)
                    if not batch or self._allowed.rows < 0 or self._allowed.characters < 0:
                        raise ValueError("more than a sound child sends, or nothing")
                    return message, batch
                if message == "end":
                    self.cut += int(text)
                    return message, []
            except (OSError, EOFError, ValueError, TypeError, OverflowError, RecursionError) as e:
                self.spent = self._death(path, number, e)
                return "spent", []
            if message == "refused":
                raise UserError(text)
            if message == "said":
                say_once(text)
                continue
            self.spent = text
            break
        else:
            self.close()
        self.spent = self.spent or f"source {path}: its reader sent something other than rows"
        return "spent", []

    def _ask(self, file: BinaryIO, request: Any) -> None:
        if self._process is None:
            ours, theirs = socket.socketpair()
            ours.settimeout(WAIT_S)
            root = str(Path(__file__).parents[3])
            path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
            arrow = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}  # others map memory in advance
            with theirs:
                # In a group of its own: a terminal's Ctrl-C is for this process, which ends the child.
                try:
                    self._process = subprocess.Popen(
                        _COMMAND,
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        env=bare_environment(PYTHONPATH=path, **arrow),
                        process_group=0,
                    )
                except OSError as e:  # which would read as an error of the file
                    raise UserError(f"the process that reads lists cannot be started ({e}); free some memory") from e
            self._socket, self._pipe = ours, ours.makefile("rb")
        assert self._socket is not None
        with contextlib.suppress(OSError):  # it has ended, which the answer will say
            socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], [file.fileno()])

    def _death(self, path: Path, number: int, error: Exception) -> str:
        """Returns why a child that gave no answer has ended. Raises UserError where another try may end elsewhere."""
        code = self.close(wait=isinstance(error, EOFError | ConnectionError))
        where = f"source {path}: cannot be read behind row {number:,}"
        if isinstance(error, TimeoutError):
            raise UserError(f"{where}: nothing came for {WAIT_S:g} s; look at its disk or server, then run again")
        if not isinstance(error, EOFError | ConnectionError):
            return f"source {path}: its reader sent something other than rows"
        if code == -signal.SIGXCPU:
            raise UserError(f"{where} in the processor time that its size allows; {_REMEDY}")
        if code == -signal.SIGKILL:
            raise UserError(f"{where}: its reader was killed, as for want of memory; run again")
        if code == 1:  # Python's own, before any rights are given up
            raise UserError(f"{where}: its reader did not start, or failed; the lines above say why")
        return f"source {path}: its reader crashed ({'exit code' if code and code > 0 else 'signal'} {abs(code or 0)})"


def _checked(batch: Any, width: int) -> list[list[Any] | Flaw]:
    """Returns the rows of a batch. Raises ValueError or TypeError for what a sound child does not send."""
    columns, flaws = batch
    if len(columns) not in (0, width):
        raise ValueError(f"{len(columns)} values")
    for i, column in enumerate(columns):
        kinds = set(map(type, column))
        texts = column
        if list in kinds:  # of captions
            if i != 1:
                raise ValueError("a list where a text belongs")
            texts = [each for value in column for each in (value if type(value) is list else (value,))]
            kinds = set(map(type, texts))
        if not kinds <= {str, NoneType}:
            raise ValueError("not a text")
        "".join(filter(None, texts)).encode()  # no half of a character
    rows: list[list[Any] | Flaw] = list(map(list, zip(*columns, strict=True)))
    for place, reason, what in flaws:
        if reason not in REASONS:
            raise ValueError(f"not a reason: {reason}")
        rows.insert(int(place), Flaw(reason, str(what)))
    return rows


def _characters(row: Sequence[Any] | Flaw) -> int:
    """Returns the characters of a row's values."""
    if isinstance(row, Flaw):
        return 0
    try:
        return len("".join(filter(None, row)))
    except TypeError:  # captions
        flat = (value if isinstance(value, list) else (value,) for value in row)
        return sum(map(len, filter(None, chain.from_iterable(flat))))


# --- in the child -----------------------------------------------------------------------------------------------------


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
        characters = _characters(row)
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
    kind, path, arguments = request
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
    budget, files, mapped, started = Budget(), 0, 0, 0.0
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent wants no more rows
        while request := _request(connection):
            line, file = request
            with file:
                asked = json.loads(line)
                # What a reader imports is not the list's to pay for.
                limit_memory(sys.maxsize)
                before = memory_mapped() if mapped else 0
                importlib.import_module(READERS[asked[0]].partition(":")[0])
                mapped += memory_mapped() - before
                started = started or time.process_time()
                files += 1
                budget.grow(os.fstat(file.fileno()).st_size)
                limit_memory(mapped + min(MOST_MEMORY, MEMORY[0] + MEMORY[1] * budget.size))
                seconds = SECONDS[0] + SECONDS[1] * budget.size + SECONDS_A_FILE * files
                limit_time(started + seconds - time.process_time())
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
