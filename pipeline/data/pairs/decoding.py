"""Decodes in a child process, so that an image that kills its decoder costs one row and never a worker.

Decoders are C that reads what strangers made. The child has neither network nor credentials
(pipeline.sandbox), and memory and time for one image of the budget. It does one at a time, so the image that
killed it is known; it is tried once more in a new child, for a process may also be killed for what others do.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import astuple
from functools import cache
from pathlib import Path
from threading import Lock, Thread
from typing import Any, BinaryIO

from PIL import Image

from pipeline.data.pairs.image import (
    MAX_BYTES,
    MAX_PIXELS,
    READ,
    StoredImage,
    Storing,
    heif_is_there,
    inspect,
    load_resizer,
    measure,
    opacity,
    prepare,
)
from pipeline.errors import UserError
from pipeline.ledger import REASONS
from pipeline.local import TooLarge, read_local
from pipeline.sandbox import (
    bare_environment,
    give_up_rights,
    limit_memory,
    limit_time,
    memory_mapped,
    receive,
    send,
)

IDLE_S = 60  # after which a child ends; the next request starts another
BASE_S, S_PER_PIXEL = 30.0, 1e-6  # what an image may take; a hundred times what an honest one does
BASE_BYTES, BYTES_PER_PIXEL = 256 << 20, 20  # what the child may map for it
MODULE = "pipeline.data.pairs.decoding"
COMMAND = (sys.executable, "-P", "-m", MODULE)  # -P: the current folder may be a stranger's, and have a json.py
# glibc gives the pixels of every image back to the system and faults them in again for the next one, a third of the
# child's time. These keep 128 MiB instead, in blocks of up to 32.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
OWN = Storing(1024, "png", 1)  # how an image of the user's own is handed on: no model sees more
_READY = {"ready": True}


def seconds(pixels: int) -> float:
    """Returns how long an image of this many pixels may take."""
    return BASE_S + pixels * S_PER_PIXEL


class ImageDecoder:
    """Calls ``image.prepare``, ``opacity``, ``inspect`` and ``measure`` in a child process, started when it is needed.

    All give "decoder_crashed" for bytes that killed it twice, and "decode_timeout" for bytes that took more processor
    time than their pixels may, or more time than ``max_pixels`` may. All raise UserError if it does not start at all.
    """

    def __init__(self, command: Sequence[str] = COMMAND):
        self._command = command
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._until: float | None = None  # time.monotonic() when the image that is being decoded is to be done
        self._overdue: float | None = None  # that of the last one that was not
        atexit.register(self.close)

    def prepare(self, data: bytes, max_pixels: int, storing: Storing) -> StoredImage | str:
        """Calls image.prepare."""
        return self._stored("prepare", data, max_pixels, storing)

    def opacity(self, data: bytes, max_pixels: int, storing: Storing) -> StoredImage | str:
        """Calls image.opacity."""
        return self._stored("opacity", data, max_pixels, storing)

    def _stored(self, name: str, data: bytes, max_pixels: int, storing: Storing) -> StoredImage | str:
        said, body = self._ask(name, data, max_pixels, [max_pixels, astuple(storing)])
        return said if isinstance(said, str) else StoredImage(body, *said)

    def inspect(self, data: bytes, max_pixels: int) -> tuple[int, int] | str:
        """Calls image.inspect."""
        return self._size("inspect", data, max_pixels)

    def measure(self, data: bytes, max_pixels: int) -> tuple[int, int] | str:
        """Calls image.measure."""
        return self._size("measure", data, max_pixels)

    def _size(self, name: str, data: bytes, max_pixels: int) -> tuple[int, int] | str:
        said, _ = self._ask(name, data, max_pixels, [max_pixels])
        return said if isinstance(said, str) else (said[0], said[1])

    def start(self) -> None:
        """Starts the child, if it is not there, without waiting for it."""
        if self._process is None:
            root = str(Path(__file__).parents[3])
            path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
            pipe = subprocess.PIPE
            environment = bare_environment(PYTHONPATH=path, **KEEP_MEMORY)
            # In a group of its own: a terminal's Ctrl-C is for this process, and may come before the child is ready.
            self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, env=environment, process_group=0)
            Thread(target=self._watch, args=(self._process,), daemon=True).start()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Kills a child that is still at an image when its time is over. A thread for each image would cost more."""
        while process.returncode is None and self._process is process:
            until = self._until
            if until is not None and time.monotonic() > until:
                self._overdue = until
                process.kill()
            time.sleep(1)

    def close(self) -> int | None:
        """Ends the child, if it is there, and returns its exit code."""
        process, self._process, self._ready = self._process, None, False
        if process is None:
            return None
        process.kill()
        with contextlib.suppress(OSError):  # a request that was being written
            process.communicate()
        return process.returncode

    def _ask(self, name: str, data: bytes, max_pixels: int, arguments: list[Any]) -> tuple[Any, bytes]:
        with self._lock:
            if self._process is not None and self._process.poll() is not None:  # it had nothing to do, and has ended
                self.close()
            for _ in range(2):
                self._wait_until_ready()
                assert self._process is not None
                self._until = until = time.monotonic() + seconds(max_pixels)
                answer = _exchange(self._process, [name, arguments, max_pixels], data)
                self._until = None
                if answer is not None:
                    return answer
                if self.close() == -signal.SIGXCPU or self._overdue == until:
                    return "decode_timeout", b""
            return "decoder_crashed", b""

    def _wait_until_ready(self) -> None:
        self.start()
        if not self._ready:
            assert self._process is not None
            assert self._process.stdout is not None
            try:
                self._ready = receive(self._process.stdout)[0] == _READY
            except (OSError, EOFError, ValueError):
                self.close()
                raise UserError(f"the decoder did not start; run python -m {MODULE} to see why") from None


@cache
def shared_decoder() -> ImageDecoder:
    """Returns the decoder of this process."""
    return ImageDecoder()


def open_image(path: Path) -> Image.Image:
    """Opens an image that a user names, as pairs would store it, but without loss and with a short side of 1024 px.

    Raises UserError for a file that cannot be read or is of another kind than READ, and for one above the budgets of
    bytes and pixels that pairs has by default.
    """
    try:
        data = read_local(path, MAX_BYTES)
    except OSError as e:
        if isinstance(e, TooLarge):
            raise UserError(f"{path}: more than {MAX_BYTES >> 20} MiB; name a smaller image") from None
        raise UserError(f"{path}: cannot be read ({e.strerror}); name an image") from None
    found = shared_decoder().prepare(data, MAX_PIXELS, OWN)
    if isinstance(found, str):
        raise UserError(
            f"{path}: cannot be taken ({found}: {REASONS[found]}); name a {READ} of at most "
            f"{MAX_PIXELS // 10**6} million pixels"
        )
    return Image.open(io.BytesIO(found.data))


def _exchange(process: subprocess.Popen[bytes], request: Any, data: bytes) -> tuple[Any, bytes] | None:
    """Returns a child's answer, or None if it ended or said what a sound one does not."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        send(process.stdin, request, data)
        said, body = receive(process.stdout)
    except (OSError, EOFError, ValueError):
        return None
    return None if isinstance(said, str) and said not in REASONS else (said, body)


# --- in the child -----------------------------------------------------------------------------------------------------


def _answer(name: str, arguments: list[Any], data: bytes) -> tuple[Any, bytes]:
    try:
        if name == "measure":
            return measure(data, *arguments), b""
        if name == "inspect":
            return inspect(data, *arguments, starts=_limit_to), b""
        max_pixels, storing = arguments
        made = opacity if name == "opacity" else prepare
        found = made(data, max_pixels, Storing(*storing), starts=_limit_to)
    except MemoryError:
        return "decode_error", b""
    return (found, b"") if isinstance(found, str) else ([found.width, found.height, found.extension], found.data)


def _limit_to(pixels: int) -> None:
    limit_time(seconds(pixels))


def main() -> None:
    """Answers requests until stdin closes, the parent is gone, or no request came for a while."""
    load_resizer()  # before memory is limited by what is mapped
    heif_is_there()
    with contextlib.suppress(OSError):  # Linux: if memory ends, this process is the first to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    warnings.simplefilter("ignore")  # of odd metadata and large images, which are judged here
    parent = os.getppid()
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print must not get between answers
    requests = os.fdopen(os.dup(0), "rb")
    give_up_rights()
    mapped = memory_mapped()
    send(pipe, _READY, b"")
    while _request_comes(requests, parent):
        try:
            (name, arguments, max_pixels), data = receive(requests)
        except EOFError:
            return
        limit_memory(mapped + BASE_BYTES + BYTES_PER_PIXEL * max_pixels)
        _limit_to(0)
        send(pipe, *_answer(name, arguments, data))


def _request_comes(requests: BinaryIO, parent: int) -> bool:
    """Waits for a request. Returns False if none came for a minute, or the parent is gone."""
    for _ in range(IDLE_S):
        if select.select([requests], [], [], 1.0)[0]:
            return True
        if os.getppid() != parent:  # a fork of the parent may hold the other end of stdin open
            return False
    return False


if __name__ == "__main__":
    main()
