"""Reads the files of a list in a child process without rights, within a budget that the size of the list sets.

Parsers read what strangers made, and some of them are C++. The parent opens each file, with its own checks, and passes
the descriptor; it never parses the file. Rows come back in bounded batches of JSON. The child has neither network nor
credentials (pipeline.sandbox). Budgets of rows and bytes end the list at a row that does not depend on the machine, so
that a list read twice is the same list.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import IO, Any, BinaryIO

from pipeline.data.source.columns import MAX_CAPTIONS, Flaw, characters_of
from pipeline.data.source.parsers.child import Budget
from pipeline.errors import UserError
from pipeline.ledger import REASONS
from pipeline.local import PathPolicy, open_local
from pipeline.progress import say_once
from pipeline.sandbox import bare_environment, python_path, receive

MOST_MESSAGE = 4 << 20  # bytes: every character of a batch as an escape of six
MOST_SAID = 100  # lines of a child about a file
EXIT_S = 10.0  # between the last message of a child and its end
WAIT_S = 600.0  # without a message: the disk has gone, or the child does something else

_COMMAND = (sys.executable, "-P", "-c", "from pipeline.data.source.parsers.child import main; main()")
_REMEDY = "name it in smaller parts, and without compression"


class ListReader:
    """Reads the files of lists, one after the other, in one child process that is started for the first.

    Use it in a ``with`` statement, which ends the child.
    """

    def __init__(self) -> None:
        self.begin()
        self._said: set[str] = set()  # of files, without their names
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._pipe: IO[bytes] | None = None

    def __enter__(self) -> ListReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> None:
        """Begins another list, with a budget of its own: what the lists before it have cost does not count."""
        self.spent = ""  # why the rest of the list is left out
        self.cut = 0  # captions that were cut
        self._allowed = Budget()  # the child counts, too; but it may have been taken over
        self._begins = True  # the child is to be told

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
            self._ask(file, [kind, str(path), arguments, self._begins])
            self._begins = False
        number, whole = 0, False
        most = MOST_MESSAGE if width else max(MOST_MESSAGE, arguments[-1])
        try:
            while True:
                message, batch = self._answer(path, number, width, most)
                whole = message not in ("rows", "image")
                if message == "end":
                    return
                if message == "refused":
                    raise UserError(batch[0])
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

    def _answer(self, path: Path, number: int, width: int, most: int) -> tuple[str, Sequence[Any]]:
        """Returns the next "rows" with their batch, an "image", "refused" with why, or "end" or "spent"."""
        for _ in range(MOST_SAID):
            try:
                message, data = receive(self._pipe, most)
                if message == "image" and width == 0:
                    return message, [data]
                text = data.decode()
                if message == "rows":
                    batch = _checked(json.loads(text), width)
                    self._allowed.rows -= len(batch)
                    self._allowed.characters -= sum(min(characters_of(row), MAX_CAPTIONS) for row in batch)
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
                return message, [text]
            if message == "said":
                # Ten thousand files of one kind have the same to say.
                if (said := text.removeprefix(f"{path.name}: ")) not in self._said:
                    self._said.add(said)
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
            arrow = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}  # others map memory in advance
            with theirs:
                # In a group of its own: a terminal's Ctrl-C is for this process, which ends the child.
                try:
                    self._process = subprocess.Popen(
                        _COMMAND,
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        env=bare_environment(PYTHONPATH=python_path(), **arrow),
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
            raise UserError(f"{where}: no data for {WAIT_S:g} s; check its disk or server, then run again")
        if not isinstance(error, EOFError | ConnectionError):
            return f"source {path}: its reader sent something other than rows"
        if code == -signal.SIGXCPU:
            raise UserError(f"{where} in the processor time that its size allows; {_REMEDY}")
        if code == -signal.SIGKILL:
            raise UserError(f"{where}: its reader was killed, most likely out of memory; run again")
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
