"""Ctrl-C, SIGTERM and the death of the local Ray end a command, also one whose clearing up never ends or fails."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.faults import Running, finish

# What Ctrl-C may leave: a lock that nobody releases, or one that is released twice.
STUCK = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
import jobs.interrupt
from jobs.cli import guard

def stuck(words):
    lock = threading.Lock()
    lock.acquire()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lock.acquire)
        try:
            print("ready", flush=True)
            waiting.result()
        finally:
            print("clearing up")  # into the buffer of a pipe
            print("clearing up", file=sys.stderr, flush=True)

jobs.interrupt.GRACE_S = float(sys.argv[1])
sys.exit(guard(stuck, []))
"""
ERRONEOUS = """
import sys, time
from jobs.cli import guard

def erroneous(words):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        raise RuntimeError("cannot release un-acquired lock")

sys.exit(guard(erroneous, []))
"""
# As one that asks an actor of Ray, which is gone.
THREAD = """
import sys, threading, time
from jobs.cli import guard

def working(words):
    over = threading.Event()
    def late():
        over.wait()
        raise AttributeError("'Worker' object has no attribute 'core_worker'")
    thread = threading.Thread(target=late, daemon=True)
    thread.start()
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        over.set()
        thread.join()

sys.exit(guard(working, []))
"""
# At that time Python has given signals back to the system, whose alarm would end it with another code.
SLOW = """
import sys, time
import jobs.interrupt
from jobs.cli import guard

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(30)

def kept(words, slow=Slow()):  # until the interpreter is taken apart
    print("ready", flush=True)
    time.sleep(60)

jobs.interrupt.GRACE_S = 1.0
sys.exit(guard(kept, []))
"""
WITH_RAY = """
import sys, time
from jobs.cli import guard
from pipeline.graph.ray import start_ray
from pipeline.settings import RaySettings

def working(words):
    start_ray(RaySettings(cpus=1))
    print("ready", flush=True)
    time.sleep(60)

sys.exit(guard(working, []))
"""
LAST = "interrupted; what is done is kept, of trainings up to the last checkpoint: the same command goes on\n"


def _ready(program: str, *words: str) -> Running:
    """Start a program and wait until it is where Ctrl-C is to meet it."""
    command, pipe = [sys.executable, "-c", program, *words], subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("grace_s", "presses"), [(0.5, 1), (600.0, 2)])
def test_ctrl_c_ends_what_is_stuck(grace_s: float, presses: int, sent: signal.Signals) -> None:
    with _ready(STUCK, str(grace_s)) as process:
        assert process.stderr is not None
        for _ in range(presses - 1):
            process.send_signal(sent)
            assert process.stderr.readline() == "clearing up\n"
        process.send_signal(sent)
        result = finish(process, timeout=300)
    assert (result.returncode, result.stdout) == (128 + sent, "clearing up\n")
    assert result.stderr.replace("clearing up\n", "") == LAST


@pytest.mark.parametrize(
    ("program", "sent", "code"),
    [
        pytest.param(WITH_RAY, signal.SIGTERM, 143, id="while Ray runs, whose core would abort"),
        pytest.param(SLOW, signal.SIGINT, 130, id="an interpreter that is slow to go"),
        pytest.param(ERRONEOUS, signal.SIGINT, 130, id="an error that it causes"),
        pytest.param(THREAD, signal.SIGINT, 130, id="an error that it causes in a thread"),
    ],
)
@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["alone", "with its group, as timeout does"])
def test_the_line_is_all_that_is_said(
    program: str, sent: signal.Signals, code: int, kill: Callable[[int, int], None]
) -> None:
    with _ready(program) as process:
        kill(process.pid, sent)
        result = finish(process, timeout=300)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", LAST)
