"""What all chaos shares: slices, processes to find and to hurt, a cluster, a run that must end."""

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import finish, start

LIMIT_S = 600.0  # of one command


@dataclass(frozen=True)
class Slice:
    """What happens in one: a fault, to a stage, when ``after`` of its shards or checkpoints have records."""

    number: int
    fault: str
    stage: str
    after: int


def run_to_the_end(config: Path, until: str) -> None:
    result = finish(start("run", config, "--until", until), LIMIT_S)
    if result.returncode:
        raise AssertionError(f"exit {result.returncode} of a run that nothing disturbs\n{result.stderr[-2000:]}")


def ours(name: str) -> list[int]:
    """Processes below this one whose command line has a name in it, the oldest first."""
    return [pid for pid in _descendants(os.getpid()) if name in command_line(pid)]


def _descendants(root: int) -> list[int]:
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {root})


def command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    return ""


def kill_one(found: Sequence[int], draw: random.Random) -> str:
    """Kill one of these processes; says which."""
    if not found:
        return "no worker was left"
    victim = draw.choice(found)
    name = command_line(victim)
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    return f"killed: {name}"


def stop_one(found: Sequence[int], draw: random.Random) -> str:
    """Stop one of these processes for longer than the lease of a run."""
    if not found:
        return "no worker was left"
    victim, seconds = draw.choice(found), draw.uniform(2, 6)
    name = command_line(victim)
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(victim, signal.SIGCONT)
    return f"stopped for {seconds:.1f} s: {name}"


def kill_raylet(nodes: Sequence[Any], draw: random.Random) -> str:
    """Kill the raylet of one of these nodes."""
    [raylet] = draw.choice(nodes).all_processes["raylet"]
    os.kill(raylet.process.pid, signal.SIGKILL)
    return "killed a raylet"


@contextmanager
def cluster(nodes: int, cpus: int) -> Iterator[tuple[dict[str, str], list[Any]]]:
    """A head without cores and nodes with so many each; yields the environment that reaches it, and the nodes."""
    from ray.cluster_utils import Cluster

    memory = 100 << 20
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": memory})
    try:
        added = [made.add_node(num_cpus=cpus, object_store_memory=memory) for _ in range(nodes)]
        yield {"RAY_ADDRESS": made.address}, added
    finally:
        with suppress(Exception):  # a node of it may have been killed
            made.shutdown()
