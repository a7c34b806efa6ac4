"""Runs a cluster of two nodes on this machine, to rehearse a real one: a head, and a worker node with a GPU's label.

A keeper process, which outlives the command that started it, starts both nodes, starts the worker node again when it
dies, and ends both when no job is left. A small file says where it is. The dashboard listens on loopback, and every
connection needs a token.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.client import LIVE
from pipeline.errors import UserError
from pipeline.graph.resources import object_store_mb
from pipeline.settings import RaySettings

ROOT = Path(__file__).parents[1]
HOST = "127.0.0.1"  # of the dashboard
# Of the nodes, as if they were machines. Ray takes 127.0.0.1 for "whatever address others reach this machine by".
HEAD, WORKER = "127.0.0.2", "127.0.0.3"
HEAD_LABELS, WORKER_LABELS = "pool=cpu", "pool=gpu"
START_S = 300.0  # until both nodes are there
TRIES = 3  # to start a node
ANSWER_S = 60.0  # of a cluster that is there
FIRST_S = 120.0  # until the first job comes
LINGER_S = 30.0  # after the last one, so that its follower hears its end and can submit it again
POLL_S = 2.0
END_S = 10.0  # for Ray to end in order
LEAST_STORE_MB = 100
# Variables of the starting process that name another cluster, its token, and that it has one node.
NOT_OURS = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
MARK = "UNCLIP_CLUSTER"  # in the environment of every process of a cluster
AGENT_PORTS = (  # a node whose agents find their usual ports taken by another one starts, and never takes a job
    "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port",
)  # fmt: skip
SCRATCH_ROOT = "/tmp"  # Ray's sockets need a short path
log = logging.getLogger("unclip")
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is behind no proxy


@dataclass(frozen=True)
class State:
    """The content of the file: the dashboard and the keeper's process."""

    address: str
    keeper: int


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the cluster of ``folder``: no other process starts it, submits to it or ends it meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find(folder: Path) -> tuple[str, str] | None:
    """Returns address and token of the cluster that runs, or None. Call it ``locked``.

    Raises UserError if it runs and does not answer: a job may be at work in it.
    """
    deadline = time.monotonic() + ANSWER_S
    while (state := _read(folder)) is not None and _is_keeper(state.keeper, folder):
        token = (folder / "token").read_text()
        if _jobs(state.address, token) is not None:
            return state.address, token
        if time.monotonic() > deadline:
            raise UserError(
                f"the local cluster at {state.address} does not answer; wait, or end it with kill {state.keeper}"
            )
        time.sleep(0.5)
    return None


def start(folder: Path, settings: RaySettings) -> tuple[str, str]:
    """Starts the cluster and returns its address and token, once it answers. Call it ``locked``, after ``find``.

    Raises UserError if it does not come up.
    """
    from pipeline.graph.ray import this_machine

    clear(folder)
    (folder / "token").unlink(missing_ok=True)
    with open(os.open(folder / "token", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from cluster.local import keep; keep(*sys.argv[1:])"
    words = [sys.executable, "-c", code, str(folder)]
    machine = this_machine(settings)
    words += [str(int(number)) for number in (machine.cpus, machine.gpus, object_store_mb(settings, machine))]
    with open(folder / "keeper.log", "wb") as output:
        keeper = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and keeper.poll() is None:
        if (found := find(folder)) is not None:
            return found
        time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(keeper.pid, signal.SIGTERM)
    raise UserError(f"the local cluster did not start; {folder / 'keeper.log'} says why")


def clear(folder: Path) -> None:
    """Ends what a keeper that was killed has left. Call it ``locked``."""
    for scratch in Path(SCRATCH_ROOT).glob(_scratch(folder) + "*"):
        _kill_marked(scratch)
        shutil.rmtree(scratch, ignore_errors=True)
    (folder / "state.json").unlink(missing_ok=True)


# --- the keeper -------------------------------------------------------------------------------------------------------


def keep(folder: str, cpus: str, gpus: str, store_mb: str) -> None:
    """Runs the keeper until no job is left; the main function of its process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _Keeper(Path(folder), int(cpus), int(gpus), int(store_mb)).live()


class _Keeper:
    def __init__(self, folder: Path, cpus: int, gpus: int, store_mb: int):
        self.folder, self.gpus = folder, gpus
        self.head_cpus = max(1, cpus // 2)
        self.worker_cpus = max(1, cpus - self.head_cpus)
        self.memory = max(store_mb // 2, LEAST_STORE_MB) << 20
        self.scratch = Path(tempfile.mkdtemp(prefix=_scratch(folder), dir=SCRATCH_ROOT))
        self.token = (folder / "token").read_text()
        self.nodes: list[subprocess.Popen[bytes]] = []

    def live(self) -> None:
        try:
            ports = free_ports("port", "dashboard-port", "ray-client-server-port", *AGENT_PORTS)
            self.address = f"http://{HOST}:{ports['dashboard-port']}"
            head = ["--head", f"--dashboard-host={HOST}", "--disable-usage-stats"]
            head += [f"--{name}={port}" for name, port in ports.items() if name not in AGENT_PORTS]
            worker = [f"--address={HEAD}:{ports['port']}"]
            self._add(lambda: self._node(HEAD, "head", self.head_cpus, HEAD_LABELS, head))
            self.make_worker = lambda: self._node(WORKER, "worker", self.worker_cpus, WORKER_LABELS, worker)
            self._add(self.make_worker)
            state = State(self.address, os.getpid())
            draft = self.folder / "state.new"
            draft.write_text(json.dumps(asdict(state)))
            draft.replace(self.folder / "state.json")
            self._watch()
        finally:
            self._leave()

    def _add(self, make: Callable[[], subprocess.Popen[bytes]]) -> None:
        """Starts one more node and waits until it is part of the cluster.

        It tries again where Ray gives up, as it does after half a minute on a machine that is very busy.
        """
        self.nodes.append(make())
        for attempt in range(TRIES):
            while self.nodes[-1].poll() is None:
                if _alive(self.address, self.token) == len(self.nodes):
                    return
                time.sleep(0.2)
            if attempt < TRIES - 1:
                self.nodes[-1] = make()
        raise SystemExit("a node ended while it started")

    def _node(self, host: str, name: str, cpus: int, labels: str, more: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts a node with a folder of its own: a node that starts deletes the packages unpacked in its folder."""
        words = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={host}",
            f"--temp-dir={self.scratch / name}", f"--num-cpus={cpus}", f"--labels={labels}",
            f"--num-gpus={self.gpus if name == 'worker' else 0}",  # else Ray gives those of the machine to both
            f"--object-store-memory={self.memory}", "--min-worker-port=0", "--max-worker-port=0",
            *(f"--{name}={port}" for name, port in free_ports(*AGENT_PORTS).items()), *more,
        ]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
        environment |= {
            MARK: str(self.scratch),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # of "python" in a job
        }
        return subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)

    def _watch(self) -> None:
        """Returns when no job is left or the head has ended."""
        until = time.monotonic() + FIRST_S
        while self.nodes[0].poll() is None:
            if self.nodes[1].poll() is not None:
                log.warning("the worker node ended with %s; it is started again", self.nodes[1].returncode)
                self.nodes[1] = self.make_worker()
            if self._is_needed():
                until = time.monotonic() + LINGER_S
            elif time.monotonic() > until:
                with locked(self.folder):
                    if not self._is_needed():  # nobody has submitted another one meanwhile
                        self._forget()
                        return
            time.sleep(POLL_S)
        log.warning("the head ended with %s, and the cluster with it", self.nodes[0].returncode)

    def _is_needed(self) -> bool:
        jobs = _jobs(self.address, self.token)
        return jobs is None or any(job["status"] in LIVE for job in jobs)

    def _forget(self) -> None:
        """Removes the file that names this cluster, unless it names another one by now."""
        if (state := _read(self.folder)) is not None and state.keeper == os.getpid():
            (self.folder / "state.json").unlink(missing_ok=True)

    def _leave(self) -> None:
        self._forget()
        for file in self.scratch.glob("head/session_*/logs/job-driver-*.log"):
            shutil.copy(file, self.folder / file.name.removeprefix("job-driver-"))
        for node in reversed(self.nodes):
            node.terminate()
        for node in self.nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(END_S)
        _kill_marked(self.scratch)
        shutil.rmtree(self.scratch, ignore_errors=True)


# --- processes, ports, requests ---------------------------------------------------------------------------------------


def _read(folder: Path) -> State | None:
    try:
        state = State(**json.loads((folder / "state.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # or a file of another version
        return None
    return state if isinstance(state.keeper, int) else None


def _scratch(folder: Path) -> str:
    """Returns how the names of Ray's folders begin, for the cluster of ``folder``; short, since sockets lie there."""
    return f"unclip-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}-"


def _is_keeper(pid: int, folder: Path) -> bool:
    """Says whether a process lives and is the keeper of ``folder``; without /proc, whether it lives."""
    try:
        os.kill(pid, 0)
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except ProcessLookupError:
        return False
    except OSError:
        return not Path("/proc/self").exists()
    return os.fsencode(folder) in words


def _kill_marked(scratch: Path) -> None:
    """Kills every process of a cluster, also those that have left the group of their parent."""
    mark = f"{MARK}={scratch}".encode()
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if mark in file.read_bytes().split(b"\0"):
                os.kill(int(file.parent.name), signal.SIGKILL)


def free_ports(*names: str) -> dict[str, int]:
    """Returns a port for each name that nobody listens on."""
    probes = [socket.create_server(("", 0)) for _ in names]  # bound to every address, so that it is free at each
    ports = {name: probe.getsockname()[1] for name, probe in zip(names, probes, strict=True)}
    for probe in probes:
        probe.close()
    return ports


def _jobs(address: str, token: str) -> list[dict[str, Any]] | None:
    """Returns the jobs that the head knows, or None if it does not answer."""
    return _get(f"{address}/api/jobs/", token)


def _alive(address: str, token: str) -> int:
    """Returns how many nodes the cluster has."""
    answer = _get(f"{address}/api/v0/nodes", token)
    return sum(node["state"] == "ALIVE" for node in answer["data"]["result"]["result"]) if answer else 0


def _get(url: str, token: str) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with _opener.open(request, timeout=10) as answer:
            return json.loads(answer.read())
    except (OSError, http.client.HTTPException, ValueError):
        return None
