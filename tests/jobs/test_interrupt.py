"""Ctrl-C, SIGTERM and the death of the local Ray end a command, also one whose clearing up never ends or fails."""

import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event

import pytest

from tests.chain import done, here, write_config
from tests.faults import Running, finish, start, wait_until
from tests.pipeline.data.bench import listening, picture

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
LAST = "interrupted; what is done is kept: run the same command again to go on\n"


def _ready(program: str, *words: str) -> Running:
    """Start a program and wait until it is where Ctrl-C is to meet it."""
    command, pipe = [sys.executable, "-c", program, *words], subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
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
    [(WITH_RAY, signal.SIGTERM, 143), (SLOW, signal.SIGINT, 130), (ERRONEOUS, signal.SIGINT, 130)],
    ids=["while Ray runs, whose core would abort", "an interpreter that is slow to go", "an error that it causes"],
)
def test_the_line_is_all_that_is_said(program: str, sent: signal.Signals, code: int) -> None:
    with _ready(program) as process:
        process.send_signal(sent)
        result = finish(process, timeout=300)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", LAST)


@pytest.mark.slow  # of the line, see graph/test_local_ray; of a run that goes on, test_crashes
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_run_whose_ray_is_killed_ends_with_a_line_and_the_next_one_goes_on(tmp_path: Path, name: str) -> None:
    asked, answer = Event(), Event()

    class Slow(BaseHTTPRequestHandler):
        """Answers the first image at once, and the others when the test says so."""

        def do_GET(self) -> None:
            image = self.path.endswith(".png")
            if image and not self.path.endswith("/0.png"):
                asked.set()
                answer.wait(300)
            data = picture(int(Path(self.path).stem)) if image else b""
            self.send_response(200 if image else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    rows = "".join(f"http://drawings.test/{i}.png,a picture\n" for i in range(4))
    (tmp_path / "list.csv").write_text(f"url,caption\n{rows}")
    with listening(Slow) as address:
        run = {"lease_s": 3, "pairs": {"workers": 1}}
        source = {"shard_rows": 1, "validation": 0.0, "test": 0.0}
        config = write_config(tmp_path, f"{tmp_path}/store", address, [tmp_path / "list.csv"], run=run, source=source)
        words = ("run", config, "--until", "pairs")
        process = start(*words)
        wait_until(asked.is_set, process)
        [pid] = [child for child, its_name in _children(process.pid) if its_name == name]
        os.kill(pid, signal.SIGKILL)
        result = finish(process)
        assert result.returncode == 1
        line = result.stderr.splitlines()[-1]
        assert line.startswith("ERROR the ")
        assert f"({name}) of Ray on this machine was killed by SIGKILL" in line
        assert "run the same command again" in line
        assert result.stderr.count(name) == 1
        assert "\x1b" not in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        answer.set()
        assert "pairs done" in done(here(*words, "run.pairs.workers=0"))  # a second Ray: test_local_ray.py


def _children(pid: int) -> list[tuple[int, str]]:
    """The processes that a process has started, with their names."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            before, _, after = file.read_text().rpartition(")")
        except OSError:  # it has ended
            continue
        if int(after.split()[1]) == pid:
            found.append((int(file.parent.name), before.partition("(")[2]))
    return found
