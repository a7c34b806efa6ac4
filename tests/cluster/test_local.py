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
from types import SimpleNamespace
from typing import Any

import pytest

import cluster.local
from cluster.client import Cluster
from cluster.local import end_idle, find, locked, start
from jobs.project import open_project
from pipeline.settings import RaySettings
from tests.chain import ROOT, data_blobs, done, here, keys, open_at, shard_paths, unclip, write_config, write_list
from tests.cluster.kuberay import parse, submit_command
from tests.seaweed import Server

WAIT_S = 400.0  # beside two other processes that test


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
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


def _said(log: Path, words: str) -> bool:
    return words in log.read_text()


def _start(log: Path, *words: object, code: tuple[str, ...] = ("-m", "jobs.cli", "submit")) -> subprocess.Popen[bytes]:
    """A submitter in the background, with all that it says in ``log``."""
    with open(log, "wb") as output:
        command = [sys.executable, *code, *map(str, words)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def _planned(config: Path, *overrides: str) -> dict[str, set[str]]:
    """The laptop's keys: a pure function of the configuration and the list."""
    return {verdict.stage: {verdict.key} for verdict in open_project(str(config), overrides).plan()}


def test_two_nodes_start_with_a_token_and_end_with_all_their_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for ``ray start`` that leaves a process behind, as it does."""
    said: list[list[str]] = []
    live = [True]

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        said.append(command)
        subprocess.Popen(["sleep", "1000"], env=env, start_new_session=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(cluster.local.subprocess, "run", run)
    seen = SimpleNamespace(jobs=lambda: [SimpleNamespace(live=live[0])])
    monkeypatch.setattr(cluster.local, "Cluster", lambda address, token: seen)
    monkeypatch.setattr(cluster.local, "LINGER_S", 0.0)
    with locked(folder):
        assert find(folder) is None
        start(folder, RaySettings(cpus=2))
        assert find(folder) is seen
    head, worker = said
    assert {"--head", "--dashboard-host=127.0.0.1", "--labels=pool=cpu", "--num-cpus=1"} <= {*head}
    assert {"--labels=pool=gpu", "--num-cpus=1"} <= {*worker}
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    end_idle(folder)
    assert len(_processes(folder)) == 2  # a job is left
    live[0] = False
    end_idle(folder)
    assert [process.words for process in _processes(folder)] == []
    assert {file.name for file in folder.iterdir()} == {"lock", "ray.log"}


# A submitter whose job does nothing before a file is there, and then what it would have done.
WAITING = """
import sys
from dataclasses import replace
import jobs.submit
from jobs.cli import main
make, gate = jobs.submit.make_job, sys.argv.pop()
wait = ("bash", "-c", 'until [ -e "$0" ]; do sleep 0.1; done; exec "$@"', gate)
jobs.submit.make_job = lambda *words: replace(job := make(*words), command=(*wait, *job.command))
sys.exit(main(["submit", *sys.argv[1:]]))
"""


@pytest.mark.timeout(900)
def test_it_survives_its_submitter_and_the_keys_are_the_laptops(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, str(tmp_path / "store"), "127.0.0.1:9", [write_list(tmp_path / "list.csv", 0, 6)])
    words = (config, "run.ray.cpus=2", "--to", "local", "--until", "source")
    submitter = _start(tmp_path / "first.log", *words, tmp_path / "go", code=("-c", WAITING))
    _wait("a submission", lambda: _said(tmp_path / "first.log", "is submitted to") or submitter.poll() is not None)
    submitter.kill()
    assert submitter.wait() == -signal.SIGKILL, (tmp_path / "first.log").read_text()
    (submitted,) = re.findall(r"(\S+) is submitted to", (tmp_path / "first.log").read_text())

    follow = Cluster.follow
    monkeypatch.setattr(Cluster, "follow", lambda *words: (tmp_path / "go").touch() or follow(*words))
    again = done(here("submit", *words))
    assert f"\n{submitted} runs already; its output so far:" in again
    assert "source done" in again
    assert keys(open_at(tmp_path / "store"))["source"] == _planned(config)["source"]
    assert (tmp_path / "out/report.html").exists()
    assert [process.words for process in _processes(folder)] == []  # it ended with its last job
    assert not (folder / "state.json").exists()


@pytest.mark.slow  # with a cluster that is none: test_submit; of a token that is wrong: test_client
@pytest.mark.timeout(900)
def test_a_job_that_fails_or_is_stopped_is_said_with_its_exit_code(
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
    assert "failed (exit code 2); submit it again to resume it" in failed.stderr
    assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in failed.stdout + str(_details(address, token))
    assert keys(open_at(url))["source"] == _planned(config, *other[:1])["source"]

    with socket.create_server(("127.0.0.1", 0)) as silent:
        hosts = f"run.pairs.hosts={{drawings.test: '127.0.0.1:{silent.getsockname()[1]}'}}"
        log, to = tmp_path / "stopped.log", ("--to", address)
        submitter = _start(log, config, other[0], hosts, *to, "--until", "pairs")
        _wait("a second time", lambda: _said(log, "-2 is submitted") or submitter.poll() is not None)
        stopped = done(unclip("submit", config, *to, "--stop"))
        assert "-2 was stopped (stopped); its results are kept" in stopped
        assert submitter.wait(WAIT_S) == 1
        assert "-2 was stopped; submit it again to resume it" in log.read_text()


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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rayjob_makes_the_pairs_by_the_words_of_kuberays_submitter(
    folder: Path, s3: Server, pictures: str, tmp_path: Path
) -> None:
    """On nodes of this machine in place of pods: no Kubernetes is here."""
    url = f"{s3.url}/rayjob-{os.getpid()}"
    config = write_config(tmp_path, url, pictures, [write_list(tmp_path / "list.csv", 200, 208)])
    words = ("source.shard_rows=4", "run.pairs.workers=1", "run.pairs.nodes={pool: cpu}", "run.kubernetes.image=a:1")
    # Another name of this machine, for one that says loopback is refused.
    elsewhere = {"AWS_ENDPOINT_URL": s3.endpoint.replace("127.0.0.1", "127.1")}
    rayjob = done(unclip("submit", config, *words, "--to", "kuberay", "--until", "pairs", env=elsewhere))
    with locked(folder):
        address = start(folder, RaySettings(cpus=2)).address
    keyless = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": (folder / "token").read_text()}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # of "ray"
    command = ["/bin/bash", "-ce", submit_command(rayjob, address)]
    run = subprocess.run(command, env=keyless | token | path, capture_output=True, text=True, timeout=WAIT_S)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert f"Job '{parse(rayjob).job.id}' succeeded" in run.stdout
    assert keys(open_at(url)).keys() == {"source", "pairs"}
    assert len(shard_paths(open_at(url), "pairs")) == 2
