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
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from threading import Lock, Thread
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.pairs.image import (
    IN_PLACE_PIXELS,
    MAX_BYTES,
    MAX_PIXELS,
    MOST_PIXELS,
    READ,
    StoredImage,
    Storing,
    heif_is_there,
    inspect,
    load_resizer,
    measure,
    prepare,
    read_foreign_pixels,
    read_pixels,
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
    processor_time,
    python_path,
    receive,
    send,
)

IDLE_S = 60  # after which a child ends; the next request starts another
BASE_BYTES, BYTES_PER_PIXEL = 256 << 20, 20  # what the child may map for it
MODULE = "pipeline.data.pairs.decoding"
COMMAND = (sys.executable, "-P", "-m", MODULE)  # -P: the current folder may be a stranger's, and have a json.py
# glibc gives the pixels of every image back to the system and faults them in again for the next one, a third of the
# child's time. These keep 128 MiB instead, in blocks of up to 32.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
OWN = Storing(1024, "png", 1)  # how an image of the user's own is handed on: no model sees more
_READY = {"ready": True}


class TimeLimit(NamedTuple):
    """Says how much processor time an image may take, by its pixels."""

    base_s: float
    s_per_pixel: float

    def seconds(self, pixels: int) -> float:
        """Returns how long an image of this many pixels may take."""
        return self.base_s + pixels * self.s_per_pixel


LONGEST = TimeLimit(30.0, 1e-6)  # a hundred times what an honest image takes


@dataclass
class Decoding:
    """Says how long decoding an image may take, and then how long it took.

    Attributes:
        limit: Limit of its processor time.
        seconds: Processor time of the child, as the system and not the child counts it.
        pixels: Pixels by the header of the image, 0 where none was read.
    """

    limit: TimeLimit = LONGEST
    seconds: float = 0.0
    pixels: int = 0


class ImageDecoder:
    """Calls the functions of pipeline.data.pairs.image in a child process, started when it is needed.

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

    def prepare(
        self, data: bytes, max_pixels: int, storing: Storing, work: Decoding | None = None, opacity: bool = False
    ) -> StoredImage | str:
        """Calls image.prepare."""
        said, body = self._ask("prepare", data, max_pixels, [max_pixels, astuple(storing), opacity], work)
        return said if isinstance(said, str) else StoredImage(body, *said)

    def inspect(self, data: bytes, max_pixels: int, work: Decoding | None = None) -> tuple[int, int] | str | None:
        """Calls image.inspect."""
        said, _ = self._ask("inspect", data, max_pixels, [max_pixels], work)
        return said if said is None or isinstance(said, str) else (said[0], said[1])

    def measure(self, data: bytes, max_pixels: int) -> tuple[int, int] | str:
        """Calls image.measure."""
        said, _ = self._ask("measure", data, max_pixels, [max_pixels])
        return said if isinstance(said, str) else (said[0], said[1])

    def read_pixels(self, data: bytes, size: int | None) -> np.ndarray:
        """Calls image.read_foreign_pixels. Raises ValueError with the reason where an image cannot be read."""
        said, body = self._ask("read_pixels", data, IN_PLACE_PIXELS, [size])
        if isinstance(said, str):
            raise ValueError(REASONS[said])
        pixels = np.frombuffer(body, np.uint8).reshape(*said, 3)
        if size and said != [size, size]:
            raise ValueError(REASONS["decoder_crashed"])
        return pixels

    def start(self) -> None:
        """Starts the child, if it is not there, without waiting for it."""
        if self._process is None:
            pipe = subprocess.PIPE
            environment = bare_environment(PYTHONPATH=python_path(), **KEEP_MEMORY)
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

    def _ask(
        self, name: str, data: bytes, max_pixels: int, arguments: list[Any], work: Decoding | None = None
    ) -> tuple[Any, bytes]:
        work = work or Decoding()
        with self._lock:
            if self._process is not None and self._process.poll() is not None:  # it had nothing to do, and has ended
                self.close()
            for _ in range(2):
                self._wait_until_ready()
                assert self._process is not None
                before = processor_time(self._process.pid)
                most = LONGEST.seconds(max_pixels)
                self._until = until = time.monotonic() + most
                answer = _exchange(self._process, [name, arguments, max_pixels, work.limit], data)
                self._until = None
                work.seconds += min(processor_time(self._process.pid) - before, most)
                if answer is not None:
                    said, work.pixels, body = answer
                    return said, body
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


_idle: list[ImageDecoder] = []  # as many as threads have asked at once, the last one used at the end


def read_pair_pixels(key: str, data: bytes, size: int | None, *, in_place: bool) -> np.ndarray:
    """Returns what image.read_pixels makes of the image of a kept row, which has this key.

    What this pipeline's own encoder has made is decoded here. What lies ``in_place``, in a tar of the user's, has been
    made by others: a child decodes it, one for each thread that asks at the same time.

    Raises UserError for an image that cannot be read.
    """
    try:
        return _read_in_child(data, size) if in_place else read_pixels(data, size)
    except (OSError, ValueError) as e:
        raise UserError(f"the image of row {key} cannot be opened ({e}): remove the row from the list") from e


def _read_in_child(data: bytes, size: int | None) -> np.ndarray:
    try:
        decoder = _idle.pop()
    except IndexError:
        decoder = ImageDecoder()
    try:
        return decoder.read_pixels(data, size)
    finally:
        _idle.append(decoder)


def open_image(path: Path, opacity: bool = False) -> Image.Image:
    """Opens an image that a user names, as pairs would store it, but without loss and with a short side of 1024 px.

    With ``opacity`` it is how opaque the image is, white where it is wholly. Raises UserError for a file that cannot be
    read or is of another kind than READ, and for one above the budgets of bytes and pixels that pairs has by default.
    """
    try:
        data = read_local(path, MAX_BYTES)
    except OSError as e:
        if isinstance(e, TooLarge):
            raise UserError(f"{path}: more than {MAX_BYTES >> 20} MiB; name a smaller image") from None
        address = str(path).partition(":")
        if address[0] in ("http", "https", "s3"):  # of which Path has left one slash
            where = f"{address[0]}://{address[2].lstrip('/')}"
            raise UserError(f"{where}: only local files are opened; download it and name the file") from None
        raise UserError(f"{path}: cannot be read ({e.strerror}); name an image") from None
    found = shared_decoder().prepare(data, MAX_PIXELS, OWN, opacity=opacity)
    if isinstance(found, str):
        raise UserError(
            f"{path}: cannot be used ({found}: {REASONS[found]}); name a {READ} of at most "
            f"{MAX_PIXELS // 10**6} million pixels"
        )
    return Image.open(io.BytesIO(found.data))


def _exchange(process: subprocess.Popen[bytes], request: Any, data: bytes) -> tuple[Any, int, bytes] | None:
    """Returns a child's answer, with the image's pixels; None if it ended or said what a sound one does not."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        send(process.stdin, request, data)
        (said, pixels), body = receive(process.stdout)
        return (said, max(0, min(int(pixels), request[2])), body) if _is_sound(request[0], said) else None
    except (OSError, EOFError, ValueError, TypeError, OverflowError):
        return None


def _is_sound(name: str, said: Any) -> bool:
    """Returns whether a function of this name can have said that. What took a child over may say anything."""
    if said is None or isinstance(said, str):
        return said in REASONS or (said is None and name == "inspect")
    *sides, extension = said if name == "prepare" else (*said, "jpg")
    return (
        len(sides) == 2
        and all(type(side) is int and 0 < side <= MOST_PIXELS for side in sides)
        and extension in ("jpg", "png", "webp")
    )


# --- in the child -----------------------------------------------------------------------------------------------------


class _Clock:
    """Holds the limit of the image that is being decoded, from when its request came, and its pixels."""

    def __init__(self, limit: TimeLimit):
        self._limit, self._began, self.pixels = limit, time.process_time(), 0
        limit_time(limit.seconds(0))

    def starts(self, pixels: int) -> None:
        """Sets the limit for an image of this many pixels."""
        self.pixels = pixels
        limit_time(self._limit.seconds(pixels) - (time.process_time() - self._began))


def _answer(name: str, arguments: list[Any], data: bytes, clock: _Clock) -> tuple[Any, bytes]:
    try:
        if name == "measure":
            return measure(data, *arguments), b""
        if name == "inspect":
            return inspect(data, *arguments, starts=clock.starts), b""
        if name == "read_pixels":
            pixels = read_foreign_pixels(data, *arguments, starts=clock.starts)
            return (pixels, b"") if isinstance(pixels, str) else (pixels.shape[:2], pixels.tobytes())
        max_pixels, storing, opacity = arguments
        found = prepare(data, max_pixels, Storing(*storing), opacity, starts=clock.starts)
    except MemoryError:
        return "decode_error", b""
    return (found, b"") if isinstance(found, str) else ([found.width, found.height, found.extension], found.data)


def main() -> None:
    """Answers requests until stdin closes, the parent is gone, or no request came for a while."""
    import cv2  # noqa: F401 - before memory is limited by what is mapped

    heif_is_there()
    with contextlib.suppress(OSError):  # Linux: if memory ends, this process is the first to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    warnings.simplefilter("ignore")  # of odd metadata and large images, which are judged here
    parent = os.getppid()
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print must not get between answers
    requests = os.fdopen(os.dup(0), "rb")
    give_up_rights()
    mapped, resizer = memory_mapped(), None
    send(pipe, _READY, b"")
    while _request_comes(requests, parent):
        try:
            (name, arguments, max_pixels, limit), data = receive(requests)
        except EOFError:
            return
        if not resizer and name == "prepare":
            # Not at the start, four fifths of which it would take: a child that only reads does without it.
            limit_memory(sys.maxsize)
            limit_time(LONGEST.base_s)
            resizer, mapped = load_resizer(), memory_mapped()
        limit_memory(mapped + BASE_BYTES + BYTES_PER_PIXEL * max_pixels)
        clock = _Clock(TimeLimit(*limit))
        said, body = _answer(name, arguments, data, clock)
        send(pipe, [said, clock.pixels], body)


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
