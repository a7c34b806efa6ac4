"""Ends a command at Ctrl-C or SIGTERM: in order if that is quick, and in any case.

Python turns Ctrl-C into an exception that may come between the taking of a lock and the block that would release it,
and then everything that waits for that lock waits for ever, a thread pool's end for example. So the process is ended
after some seconds of clearing up, or at the next Ctrl-C. Nothing is lost by it that is not lost by a kill.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import cache, partial
from types import FrameType

from pipeline.graph.local_ray import interrupted

GRACE_S = 10.0  # from the first signal to the end of the process
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Returns 128 and the number of the signal that has caused this, as shells do."""
    return int(interrupt.args[0]) if interrupt.args else 128 + signal.SIGINT


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Lets the first Ctrl-C raise KeyboardInterrupt here, whatever errors it causes on its way, and sets the limit.

    SIGTERM, by which schedulers and containers end a process, does the same, with another exit code. The limit holds
    beyond this block to the end of the process. Leaves a signal alone that is ignored, as Ctrl-C is under nohup, or
    that somebody else handles.
    """
    free = [s for s in SIGNALS if signal.getsignal(s) in (signal.default_int_handler, signal.SIG_DFL)]
    code = 0

    def leave() -> None:
        """Ends it after all that a command registers for its exit: what the interpreter takes apart may be slow."""
        if code:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)

    def first(signum: int, frame: FrameType | None) -> None:
        nonlocal code
        code = 128 + signum
        interrupted.set()
        # Threads that are still at work meet what has been taken apart, such as Ray: their tracebacks help nobody.
        threading.excepthook = lambda _: None
        for each in (*free, signal.SIGALRM):
            signal.signal(each, partial(_end, code))
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)
        raise KeyboardInterrupt(code)

    before = {each: signal.signal(each, first) for each in free}
    atexit.register(leave)
    try:
        yield
    except Exception as e:
        if not code:
            raise
        raise KeyboardInterrupt(code) from e
    finally:
        if not code:
            atexit.unregister(leave)
        for each in free:
            if signal.getsignal(each) is first:
                signal.signal(each, before[each])


def _end(code: int, *_: object) -> None:
    with contextlib.suppress(Exception):  # it may be in the middle of a write
        sys.stdout.flush()
    say_interrupted()
    os._exit(code)


@cache
def say_interrupted() -> None:
    """Says it once: the limit may be reached after it was said."""
    os.write(
        2,
        b"interrupted; what is done is kept, of trainings up to the last checkpoint: the same command goes on\n",
    )
