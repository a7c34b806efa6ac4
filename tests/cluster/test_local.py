"""Jobs on a real cluster of two nodes on this machine, with the store on a real S3 server."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.local import locked, start
from jobs.project import open_project
from pipeline.data.source.drawings.server import serving
from pipeline.settings import RaySettings
from tests.chain import ROOT, data_blobs, done, keys, open_at, unclip, write_config, write_list
from tests.seaweed import Server

WAIT_S = 400.0  # beside two other processes that test


@pytest.fixture(scope="module")
def pictures() -> Iterator[str]:
    with serving() as address:
        yield address


@pytest.fixture
def folder(tmp_path: Path, s3: Server) -> Iterator[Path]:
    """Where the local cluster is found; whatever is left of it is ended."""
    folder = tmp_path / "out" / "cluster"
    yield folder
    for process in _processes(folder):
        process.kill()


class Process:
    """A process of a cluster, as /proc has it."""

    def __init__(self, folder: Path):
        self.pid = int(folder.name)
        self.words = (folder / "cmdline").read_bytes().decode().split("\0")
        self.parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def _processes(folder: Path) -> list[Process]:
    """Those of the cluster of ``folder``: its nodes have been told where its token is."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder / "token").encode() in (place / "environ").read_bytes():
                found.append(Process(place))
        except OSError:
            continue
    return found


def _wait(what: str, happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.1)


def _start(log: Path, *words: object) -> subprocess.Popen[bytes]:
    """A submitter in the background, with all that it says in ``log``."""
    with open(log, "wb") as output:
        command = [sys.executable, "-m", "jobs.cli", "submit", *map(str, words)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def _planned(config: Path, *overrides: str) -> dict[str, set[str]]:
    """The laptop's keys: a pure function of the configuration and the list."""
    return {verdict.stage: {verdict.key} for verdict in open_project(str(config), overrides).plan()}


@pytest.mark.timeout(900)
def test_it_survives_its_submitter_and_the_keys_are_the_laptops(
    folder: Path, s3: Server, pictures: str, tmp_path: Path
) -> None:
    url = f"{s3.url}/submit-{os.getpid()}"
    rows = write_list(tmp_path / "list.csv", 0, 60)
    config = write_config(tmp_path, url, pictures, [rows])
    planned = _planned(config)
    words = (config, "run.pairs.workers=1", "--to", "local", "--until", "pairs")
    log = tmp_path / "first.log"
    submitter = _start(log, *words)
    _wait("a submission", lambda: "is submitted to" in log.read_text() or submitter.poll() is not None)
    submitter.kill()
    assert submitter.wait() == -signal.SIGKILL, log.read_text()

    again = done(unclip("submit", *words, timeout=WAIT_S))
    (submitted,) = re.findall(r"(\S+) is submitted to", log.read_text())
    assert f"\n{submitted} runs already; what it said so far:" in again
    assert "pairs done" in again
    assert keys(open_at(url)) == {stage: planned[stage] for stage in ("source", "pairs")}
    assert "pairs" in (tmp_path / "out/report.html").read_text()

    assert [process.words for process in _processes(folder)] == []  # it ended with its last job
    assert not (folder / "state.json").exists()


@pytest.mark.slow  # with a cluster that is none: test_submit; of a token that is wrong: test_client
@pytest.mark.timeout(900)
def test_a_job_that_fails_is_left_or_is_stopped_is_said_with_its_exit_code(
    folder: Path, s3: Server, pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3.url}/ended-{os.getpid()}"
    config = write_config(tmp_path, url, pictures, [write_list(tmp_path / "list.csv", 0, 60)])
    with locked(folder):
        address = start(folder, RaySettings(cpus=2)).address
    token = (folder / "token").read_text()
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    other = ("source.shard_rows=30", "run.pairs.headers={'http://drawings.test': NO_SUCH_VARIABLE}")
    failed = unclip("submit", config, *other, "--to", address, "--until", "pairs")
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "NO_SUCH_VARIABLE" in failed.stdout
    assert "failed (exit code 2); submit it again to go on where it was" in failed.stderr
    assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in failed.stdout + str(_details(address, token))
    assert keys(open_at(url))["source"] == _planned(config, *other[:1])["source"]

    with socket.create_server(("127.0.0.1", 0)) as silent:
        hosts = f"run.pairs.hosts={{drawings.test: '127.0.0.1:{silent.getsockname()[1]}'}}"
        log, to = tmp_path / "stopped.log", ("--to", address)
        submitter = _start(log, config, other[0], hosts, *to, "--until", "pairs")
        _wait("a second time", lambda: "-2 is submitted" in log.read_text() or submitter.poll() is not None)
        submitter.send_signal(signal.SIGINT)
        assert submitter.wait(WAIT_S) == 130
        assert "-2 goes on: the same command attaches to it, --stop stops it" in log.read_text()
        assert not [word for word in ("Traceback", "interrupted") if word in log.read_text()]
        submitter = _start(log, config, other[0], hosts, *to, "--until", "pairs")
        _wait("attaching", lambda: "-2 runs already" in log.read_text() or submitter.poll() is not None)
        stopped = done(unclip("submit", config, *to, "--stop"))
        assert "-2 was stopped (stopped); what it has made stays made" in stopped
        assert submitter.wait(WAIT_S) == 1
        assert "-2 was stopped; submit it again to go on where it was" in log.read_text()

    assert "nothing of micro runs there" in done(unclip("submit", config, "--to", "local", "--stop"))
    assert not _processes(folder)


def _details(address: str, token: str) -> object:
    """All that the dashboard tells of jobs."""
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_chain_survives_its_worker_node_and_its_driver(
    folder: Path, s3: Server, pictures: str, tmp_path: Path
) -> None:
    rows = write_list(tmp_path / "list.csv", 0, 60)
    (tmp_path / "laptop").mkdir()
    done(unclip("run", write_config(tmp_path / "laptop", str(tmp_path / "store"), pictures, [rows]), timeout=900))

    url = f"{s3.url}/killed-{os.getpid()}"
    config = write_config(tmp_path, url, pictures, [rows])
    words = (config, "run.pairs.workers=2", "run.embeddings.workers=2", "run.decoder.workers=1", "--to", "local")
    log = tmp_path / "first.log"
    submitter = _start(log, *words)
    _wait("work on the worker node", lambda: _on_the_worker_node(folder) or submitter.poll() is not None)
    _worker_node(folder)[0].kill()
    _wait("half of the chain", lambda: "ar_prior done" in log.read_text() or submitter.poll() is not None)
    driver = [p for p in _processes(folder) if p.words[1:4] == ["-m", "jobs.cli", "run"]]
    driver[-1].kill()
    assert submitter.wait(WAIT_S) == 137, log.read_text()
    assert "failed (exit code 137)" in log.read_text()

    done(unclip("submit", *words, timeout=900))
    assert keys(open_at(url)) == keys(open_at(tmp_path / "store"))
    assert data_blobs(open_at(url)) == data_blobs(open_at(tmp_path / "store"))
    assert (tmp_path / "out/samples/0000.png").exists()
    assert "nothing to do" in done(unclip("submit", *words))


def _worker_node(folder: Path) -> list[Process]:
    """The raylet of the worker node, once it is there."""
    return [
        p for p in _processes(folder) if p.words[0].endswith("/raylet") and "--node_ip_address=127.0.0.3" in p.words
    ]


def _on_the_worker_node(folder: Path) -> bool:
    """Whether a worker of a stage has begun there."""
    raylets = {node.pid for node in _worker_node(folder)}
    return any(p.parent in raylets and p.words[0].startswith("ray::MapWorker") for p in _processes(folder))
