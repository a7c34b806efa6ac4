"""Decoding in a child process, so that a picture that kills its decoder costs one row and never a worker.

Decoders are C that reads what strangers made. The child does one picture at a time, so whoever killed it is known; it
is tried once more in a new child, for a process may also be killed for what others do. Messages on the pipes are a line
of JSON and bytes, nothing that could be executed.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from pipeline.data.picture import Picture, inspect, resize
from pipeline.errors import UserError

IDLE_S = 60  # after which a child ends; the next request starts another
COMMAND = (sys.executable, "-m", "pipeline.data.decoding")
# glibc gives the pixels of every picture back to the system and faults them in again for the next one, a third of the
# child's time. These keep 128 MiB instead, in blocks of up to 32.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
_READY = {"ready": True}


class Decoder:
    """``picture.resize`` and ``picture.inspect`` in a child process, which is started when it is needed.

    Both give "decoder_crashed" for bytes that killed it twice, and raise UserError if it does not start at all.
    """

    def __init__(self, command: Sequence[str] = COMMAND):
        self._command = command
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        atexit.register(self.close)

    def resize(
        self, data: bytes, image_size: int, max_pixels: int, encode_format: str, encode_quality: int
    ) -> Picture | str:
        """See picture.resize."""
        said, body = self._ask("resize", data, [image_size, max_pixels, encode_format, encode_quality])
        return said if isinstance(said, str) else Picture(body, *said)

    def inspect(self, data: bytes, max_pixels: int) -> tuple[int, int] | str:
        """See picture.inspect."""
        said, _ = self._ask("inspect", data, [max_pixels])
        return said if isinstance(said, str) else (said[0], said[1])

    def start(self) -> None:
        """Start the child, if there is none, without waiting for it."""
        if self._process is None:
            root = str(Path(__file__).parents[2])
            path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
            pipe = subprocess.PIPE
            environment = {**KEEP_MEMORY, **os.environ, "PYTHONPATH": path}
            self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, env=environment)

    def close(self) -> None:
        """End the child, if there is one."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):  # a request that was being written
                self._process.communicate()
            self._process, self._ready = None, False

    def _ask(self, name: str, data: bytes, arguments: list[Any]) -> tuple[Any, bytes]:
        with self._lock:
            for _ in range(2):
                self._wait_until_ready()
                assert self._process is not None
                assert self._process.stdin is not None
                assert self._process.stdout is not None
                try:
                    _send(self._process.stdin, [name, arguments], data)
                    return _receive(self._process.stdout)
                except (OSError, EOFError):
                    self.close()
            return "decoder_crashed", b""

    def _wait_until_ready(self) -> None:
        self.start()
        if not self._ready:
            assert self._process is not None
            assert self._process.stdout is not None
            try:
                self._ready = _receive(self._process.stdout)[0] == _READY
            except (OSError, EOFError):
                self.close()
                raise UserError("the decoder did not start; run python -m pipeline.data.decoding to see why") from None


@cache
def shared_decoder() -> Decoder:
    """The one of this process."""
    return Decoder()


def _send(pipe: BinaryIO | Any, message: Any, data: bytes) -> None:
    pipe.write(json.dumps([message, len(data)]).encode() + b"\n")
    pipe.write(data)
    pipe.flush()


def _receive(pipe: BinaryIO | Any) -> tuple[Any, bytes]:
    """Raises EOFError if the other end is gone."""
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    message, size = json.loads(line)
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return message, data


# --- in the child -----------------------------------------------------------------------------------------------------


def _answer(name: str, arguments: list[Any], data: bytes) -> tuple[Any, bytes]:
    if name == "inspect":
        return inspect(data, *arguments), b""
    found = resize(data, *arguments)
    return (found, b"") if isinstance(found, str) else ([found.width, found.height, found.extension], found.data)


def main() -> None:
    """Answer requests until stdin closes, the parent is gone, or nothing was asked for a while."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent ends this one
    with contextlib.suppress(OSError):  # Linux: if memory ends, this process is the first to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    warnings.simplefilter("ignore")  # of odd metadata and large pictures, which are judged here
    parent = os.getppid()
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between answers
    requests = os.fdopen(os.dup(0), "rb")
    _send(pipe, _READY, b"")
    while _request_comes(requests, parent):
        try:
            (name, arguments), data = _receive(requests)
        except EOFError:
            return
        _send(pipe, *_answer(name, arguments, data))


def _request_comes(requests: BinaryIO, parent: int) -> bool:
    """Wait for a request. False: there is none for a minute, or the parent is gone."""
    for _ in range(IDLE_S):
        if select.select([requests], [], [], 1.0)[0]:
            return True
        if os.getppid() != parent:  # a fork of the parent may hold the other end of stdin open
            return False
    return False


if __name__ == "__main__":
    main()
