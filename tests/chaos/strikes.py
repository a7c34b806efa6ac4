"""What all chaos shares: slices, processes to find and to hurt, a cluster, a run that must end."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.store import Store
from tests.chain import open_at
from tests.faults import Running, finish, start
from tests.pipeline.data.bench import picture, save_clip, write_list

LIMIT_S = 600.0  # of one command


@dataclass(frozen=True)
class Slice:
    """What happens in one: a fault, to a stage, when ``after`` of its shards or checkpoints have records."""

    number: int
    fault: str
    stage: str
    after: int


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbed, with the list, the pictures and the CLIP of all slices."""

    folder: Path

    @property
    def store(self) -> Store:
        return open_at(self.folder / "store")

    def config(self, folder: Path, store: str, settings: Mapping[str, Any], **values: Any) -> Path:
        """Returns the file of a configuration with this store, run settings by stage, and other values."""
        folder.mkdir(parents=True, exist_ok=True)
        common = {
            "project": "chaos",
            "preset": "nano",
            "store": store,
            "source": {"paths": [str(self.folder / "list.csv")], "shard_rows": 10, "test": 0.0},
            "clip": {"weights": f"local-dir:{self.folder / 'clip'}"},
            "run": {"output": str(folder / "out"), "lease_s": 2, **settings},
        }
        (folder / "chaos.yaml").write_text(yaml.safe_dump(common | values))
        return folder / "chaos.yaml"

    def make_once(self, pictures: Sequence[int], splits: Sequence[str], make: Callable[[], None]) -> None:
        """Writes the list and makes the run, unless an earlier call has."""
        if not (self.folder / "made").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            write_pairs(self.folder, pictures, splits)
            make()
            (self.folder / "made").touch()


@contextmanager
def slice_folder(folder: Path) -> Iterator[dict[str, object]]:
    """An empty folder for a slice, which goes when it has ended well, and what is said of it, with its seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began, said = time.monotonic(), dict[str, object]()
    yield said
    said["seconds"] = round(time.monotonic() - began, 1)
    shutil.rmtree(folder)


def run_to_the_end(config: Path, until: str) -> None:
    result = finish(start("run", config, "--until", until), LIMIT_S)
    if result.returncode:
        raise AssertionError(f"exit {result.returncode} of a run that nothing disturbs\n{result.stderr[-2000:]}")


def write_pairs(folder: Path, pictures: Sequence[int], splits: Sequence[str]) -> None:
    """Writes a list of pairs, its pictures by their numbers, and a CLIP."""
    (folder / "pictures").mkdir(parents=True)
    for i, number in enumerate(pictures):
        (folder / f"pictures/{i}.png").write_bytes(picture(number))
    rows = [(f"file://{folder}/pictures/{i}.png", f"picture {i}", split) for i, split in enumerate(splits)]
    write_list(folder / "list.csv", rows)
    save_clip(folder / "clip")


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


@dataclass(frozen=True)
class Moment:
    """What a fault may strike: a command that runs, its Ray workers, the nodes of its cluster if it has one.

    ``place`` is what the faults of some stages strike besides.
    """

    process: Running
    workers: Callable[[], list[int]]
    nodes: Sequence[Any]
    draw: random.Random
    place: Any


Fault = Callable[[Moment], str]  # strikes, and says what it did


def kill_worker(now: Moment) -> str:
    if not (found := now.workers()):
        return "no worker was left"
    victim = now.draw.choice(found)
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


def stop_worker(now: Moment) -> str:
    return stop_one(now.workers(), now.draw)


def kill_driver(now: Moment) -> str:
    now.process.kill()
    return "killed"


def kill_node(now: Moment) -> str:
    [raylet] = now.draw.choice(now.nodes).all_processes["raylet"]
    os.kill(raylet.process.pid, signal.SIGKILL)
    return "killed a raylet"


def strike(now: Moment, fault: Fault, due: Callable[[], bool], always: bool = True) -> tuple[str, int]:
    """Strike a command when its moment is due; returns what that did, and how the command ended.

    A command that ends before is struck all the same, or with ``always`` raises AssertionError.
    """
    process = now.process
    deadline = time.monotonic() + LIMIT_S
    try:
        while not due() or not now.workers():
            if process.poll() is not None or time.monotonic() > deadline:
                if not always:
                    break
                out = finish(process, 1)
                raise AssertionError(f"no moment for the fault before exit {out.returncode}\n{out.stderr[-2000:]}")
            time.sleep(0.005)
        what = fault(now)
        result = finish(process, LIMIT_S)
        if result.returncode > 0:
            what += f"; {result.stderr.splitlines()[-1][:200]}"
        return what, result.returncode
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


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
