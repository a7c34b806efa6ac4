"""A decoder of images whose child fails at pictures that hold a word."""

import sys
from pathlib import Path

from pipeline.data.pairs.decoding import ImageDecoder
from tests.pipeline.data.bench import picture

# A child as the real one, but for pictures that hold a word: those do to it what a broken decoder would.
WRAPPED = """
import os, signal, sys, time
from pathlib import Path
from pipeline.data.pairs import decoding

once = Path(sys.argv[1])
is_first = not once.exists()
once.touch()  # before the child gives up the right to

def hurt(function):
    def hurting(data, *arguments, starts):
        if b"SEGFAULT" in data:
            os.kill(os.getpid(), signal.SIGSEGV)
        if b"EXIT" in data:
            os._exit(0)
        if b"ONCE" in data and is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        if b"CHATTER" in data:
            os.write(1, b"a library that talks\\n" * 10_000)
        if b"SPIN" in data or b"SLEEP" in data:
            starts(1)
            while b"SPIN" in data:
                pass
            time.sleep(600)
        if b"GREEDY" in data:
            bytearray(1 << 40)
        if b"LIES" in data:
            return "no_such_reason"
        if b"ENDLESS" in data:
            starts.__self__.pixels = float("inf")
            return (80, 72)
        if b"LIST" in data:
            return [[], 10**30]
        return function(data, *arguments, starts=starts)
    return hurting

for name in ("prepare", "inspect", "read_foreign_pixels"):
    setattr(decoding, name, hurt(getattr(decoding, name)))
decoding.IDLE_S = int(sys.argv[2])
decoding.main()
"""


def wrapped(folder: Path, idle_s: int = 60) -> ImageDecoder:
    return ImageDecoder((sys.executable, "-c", WRAPPED, str(folder / "once"), str(idle_s)))


def with_word(word: str) -> bytes:
    """A sound PNG with a word after its end, which decoders do not read."""
    return picture(1) + word.encode()
