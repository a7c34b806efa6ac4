"""Reads lists in this process, for tests of commands: a child for each list would take longer than the command."""

import json
import os
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from threading import Thread
from types import SimpleNamespace
from typing import Any

from pipeline.data.source.parsers import child


class ReaderThread:
    """Reads what a list's child would read, without its limits, which are tested in tests/pipeline/data/source."""

    def __init__(self, command: Sequence[str], stdin: int, **_: Any):
        self._connection = socket.socket(fileno=os.dup(stdin))
        self._thread = Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        budget = child.Budget()
        with suppress(OSError), self._connection, self._connection.makefile("wb") as pipe:  # nobody wants more rows
            while request := child._request(self._connection):
                line, file = request
                with file:
                    budget.grow(os.fstat(file.fileno()).st_size)
                    child._read(pipe, file, budget, json.loads(line))

    def kill(self) -> None:
        """It ends by itself, as the other end is closed."""

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        return 0


# In the place of ``subprocess`` in pipeline.data.source.reader.
IN_A_THREAD = SimpleNamespace(Popen=ReaderThread, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired)
