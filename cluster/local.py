"""A cluster of two nodes on this machine, by ``ray start``, to rehearse a real one: a head, and a worker node.

It outlives the command that starts it, and ends with the one that sees its last job end. A small file says where it is.
The dashboard listens on loopback, and every connection needs a token.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.client import Cluster
from pipeline.errors import UserError
from pipeline.graph.ray import this_machine
from pipeline.graph.resources import object_store_mb
from pipeline.settings import RaySettings

HOST = "127.0.0.1"  # of the dashboard
# Of the nodes, as if they were machines. Ray takes 127.0.0.1 for "whatever address others reach this machine by".
HEAD, WORKER = "127.0.0.2", "127.0.0.3"
TRIES = 3  # Ray gives up after half a minute on a machine that is very busy
LINGER_S = 3.0  # after the last job, so that others who follow it hear its end
LEAST_STORE_MB = 100
# Variables of the starting process that name another cluster, its token, and that it has one node.
NOT_OURS = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
MARK = "UNCLIP_CLUSTER"  # in the environment of every process of a cluster, by which it is ended: ray stop ends all


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the cluster of ``folder``: no other process starts it, submits to it or ends it meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find(folder: Path) -> Cluster | None:
    """Returns the cluster that runs, or None. Call it ``locked``.

    Raises UserError if it runs and does not answer: a job may be at work in it.
    """
    if not (folder / "state.json").exists() or not _processes(folder):
        return None
    state = json.loads((folder / "state.json").read_text())
    try:
        return Cluster(state["address"], (folder / "token").read_text())
    except UserError as e:
        raise UserError(f"{e}; wait, or end the local cluster with pkill -f {state['scratch']}") from None


def start(folder: Path, settings: RaySettings) -> Cluster:
    """Starts the cluster and returns it. Call it ``locked``, after ``find``.

    Raises UserError if it does not come up.
    """
    machine = this_machine(settings)
    head_cpus = max(1, int(machine.cpus) // 2)
    worker_cpus = max(1, int(machine.cpus) - head_cpus)
    store = max(object_store_mb(settings, machine) // 2, LEAST_STORE_MB) << 20
    for _ in range(TRIES):
        end(folder)
        scratch = tempfile.mkdtemp(prefix="unclip-", dir="/tmp")  # Ray's sockets need a short path
        ports = free_ports("port", "dashboard-port", "ray-client-server-port")
        address = f"http://{HOST}:{ports['dashboard-port']}"
        (folder / "state.json").write_text(json.dumps({"address": address, "scratch": scratch}))
        with open(os.open(folder / "token", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        head = ["--head", f"--dashboard-host={HOST}", *(f"--{name}={port}" for name, port in ports.items())]
        nodes = (
            (HEAD, "pool=cpu", head_cpus, 0, head),
            (WORKER, "pool=gpu", worker_cpus, int(machine.gpus), [f"--address={HEAD}:{ports['port']}"]),
        )
        if all(
            _ray_start(
                folder,
                f"--node-ip-address={host}",
                f"--temp-dir={scratch}/{host}",  # of its own: a node that starts deletes what is unpacked there
                f"--labels={labels}",
                f"--num-cpus={cpus}",
                f"--num-gpus={gpus}",  # else Ray gives those of the machine to both
                f"--object-store-memory={store}",
                *more,
            )
            for host, labels, cpus, gpus, more in nodes
        ):
            return Cluster(address, (folder / "token").read_text())
    end(folder)
    raise UserError(f"the local cluster did not start; {folder / 'ray.log'} says why")


def end_idle(folder: Path) -> None:
    """Ends the cluster, if there is one and no job is left."""
    if not (folder / "state.json").exists():
        return
    with locked(folder):
        found = find(folder)
        if found and any(job.live for job in found.jobs()):
            return
        if found:
            time.sleep(LINGER_S)
        end(folder)


def end(folder: Path) -> None:
    """Ends the cluster with all that it left. Call it ``locked``."""
    empty = 0
    while empty < 3:  # a process has no environment while it becomes another program, so one look may miss it
        processes = _processes(folder)
        empty = 0 if processes else empty + 1
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(json.loads((folder / "state.json").read_text())["scratch"], ignore_errors=True)
    for name in ("state.json", "token"):
        (folder / name).unlink(missing_ok=True)


def _ray_start(folder: Path, *words: str) -> bool:
    """Starts a node and returns whether it is part of the cluster. Its processes outlive this one."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    environment |= {
        MARK: str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # of "python" in a job
    }
    # Port 0 is any free one: a node whose agent finds its usual port taken starts, and never takes a job.
    free = [f"--{name}=0" for name in ("dashboard-agent-listen-port", "min-worker-port", "max-worker-port")]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", *free, *words]
    with open(folder / "ray.log", "ab") as log:
        process = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return process.returncode == 0


def _processes(folder: Path) -> list[int]:
    """Returns the processes of the cluster, also those that have left the group of their parent."""
    mark, found, parents = f"{MARK}={folder}".encode(), set(), {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if mark in (place / "environ").read_bytes().split(b"\0"):
                found.add(int(place.name))
    # The title that Ray's agents give themselves lies over their environment: what ours have started is ours, too.
    while more := {process for process, parent in parents.items() if parent in found} - found:
        found |= more
    return list(found)


def free_ports(*names: str) -> dict[str, int]:
    """Returns a port for each name that nobody listens on."""
    probes = [socket.create_server(("", 0)) for _ in names]  # bound to every address, so that it is free at each
    ports = {name: probe.getsockname()[1] for name, probe in zip(names, probes, strict=True)}
    for probe in probes:
        probe.close()
    return ports
