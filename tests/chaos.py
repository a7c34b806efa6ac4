"""Real faults against the data stages, slice after slice: ``make chaos N=50 SEED=1``.

A slice makes one stage anew on Ray workers, from a store in which all before it is made, and strikes once at a moment
that the slice's seed draws: when workers are there and so many of the stage's shards have records. Then a run goes to
its end, and every key and blob must be those of a run that nothing disturbed. Slices that are done are not done again:
what they found is in FOLDER/slices.jsonl, a line each. The last line that is printed is one JSON object.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts import Artifact, read_shards
from pipeline.errors import CorruptObject
from pipeline.execute import heal
from pipeline.records import blob_path, read_blob
from pipeline.store import Store
from tests.chain import DATA_STAGES, keys, open_at
from tests.faults import Running, artifact, assert_sound, copy, finish, forget, start
from tests.pipeline.data.bench import picture, save_clip, write_list

ROWS = 60
STAGES = ("pairs", "embeddings", "thresholds", "curation", "index", "codec")  # each needs only stages before it
ENDS = ("index", "codec")  # what all of them lead to
COMPARED = (*DATA_STAGES, "thresholds", "index")
LIMIT_S = 240.0  # of one command


@dataclass(frozen=True)
class Slice:
    """What happens in one: a fault, to a stage, when ``after`` of its shards have records."""

    number: int
    fault: str
    stage: str
    after: int


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbed."""

    folder: Path

    @property
    def store(self) -> Store:
        return open_at(self.folder / "store")

    def config(self, folder: Path, stage: str | None) -> Path:
        """The same for the store of another folder, with Ray workers for one stage."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "project": "chaos",
            "preset": "nano",
            "store": str(folder / "store"),
            "source": {"paths": [str(self.folder / "list.csv")], "shard_rows": 10},
            "clip": {"weights": f"local-dir:{self.folder / 'clip'}"},
            "thresholds": {"similarity": 0.05},
            "curation": {"near_duplicate": 0.999, "near_held_out": 0.999},
            "codec": {"components": 12, "buckets": 16},
            "ar_prior": {"model": {"buckets": 16}},
            "run": {"output": str(folder / "out"), "lease_s": 2}
            | {name: {"workers": 2 if name == stage else 0} for name in STAGES},
        }
        (folder / "chaos.yaml").write_text(yaml.safe_dump(values))
        return folder / "chaos.yaml"


def run_reference(folder: Path) -> Reference:
    """Make it, unless an earlier call has."""
    reference = Reference(folder)
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "pictures").mkdir(parents=True)
        for i in range(ROWS):
            (folder / f"pictures/{i}.png").write_bytes(picture(i % 55))  # the last five are there twice
        splits = ["test" if i % 10 == 3 else "validation" if i % 10 == 7 else "train" for i in range(ROWS)]
        rows = [(f"file://{folder}/pictures/{i}.png", f"picture {i}", split) for i, split in enumerate(splits)]
        write_list(folder / "list.csv", rows)
        save_clip(folder / "clip")
        for until in ENDS:
            run_to_the_end(reference.config(folder, None), until)
        (folder / "made").touch()
    return reference


def run_to_the_end(config: Path, until: str) -> None:
    result = finish(start("run", config, "--until", until), LIMIT_S)
    if result.returncode:
        raise AssertionError(f"exit {result.returncode} of a run that nothing disturbs\n{result.stderr[-2000:]}")


# --- faults ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """What a fault may strike: the command that runs, the store that it writes, Ray's nodes if it uses a cluster."""

    process: Running
    store: Store
    stage: str
    nodes: Sequence[Any]
    draw: random.Random


def ray_workers() -> list[int]:
    """Ray's processes that make shards, of all commands below this process."""
    return [pid for pid in descendants(os.getpid()) if "MapWorker" in command_line(pid)]


def descendants(root: int) -> list[int]:
    """Process ids, the oldest first."""
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


def kill_worker(now: Moment) -> str:
    return _to_a_worker(now, lambda pid: os.kill(pid, signal.SIGKILL), "killed")


def stop_worker(now: Moment) -> str:
    seconds = now.draw.uniform(2, 6)  # run.lease_s is 2
    return _to_a_worker(now, lambda pid: _stop(pid, seconds), f"stopped for {seconds:.1f} s")


def _to_a_worker(now: Moment, strike: Callable[[int], None], what: str) -> str:
    found = ray_workers()
    if not found:
        return "no worker was left"
    victim = now.draw.choice(found)
    name = command_line(victim)
    with suppress(ProcessLookupError):
        strike(victim)
    return f"{what}: {name}"


def kill_driver(now: Moment) -> str:
    now.process.kill()
    return "killed"


def stop_driver(now: Moment) -> str:
    seconds = now.draw.uniform(2, 6)
    _stop(now.process.pid, seconds)
    return f"stopped for {seconds:.1f} s"


def _stop(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)


def kill_node(now: Moment) -> str:
    """Kill the raylet of a node that has cores."""
    [raylet] = now.draw.choice(now.nodes).all_processes["raylet"]
    os.kill(raylet.process.pid, signal.SIGKILL)
    return "killed a raylet"


def truncate_blob(now: Moment) -> str:
    return _damage(now, lambda file: os.truncate(file, file.stat().st_size // 2))


def delete_blob(now: Moment) -> str:
    return _damage(now, Path.unlink)


def _damage(now: Moment, how: Callable[[Path], None]) -> str:
    """Kill the driver, and damage something that the stage left."""
    now.process.kill()
    now.process.wait()
    names = {
        (name, blob)
        for entry in now.store.list(f"shards/{now.stage}/")
        for name, blob in json.loads(now.store.read(entry.path))["blobs"].items()
    }
    if not names:
        return "killed the driver, nothing was left to damage"
    name, blob = now.draw.choice(sorted(names))
    how(Path(now.store.url, blob_path(blob)))
    return f"killed the driver, damaged a blob: {name}"


FAULTS: dict[str, Callable[[Moment], str]] = {
    "kill worker": kill_worker,
    "kill driver": kill_driver,
    "truncate blob": truncate_blob,
    "kill node": kill_node,
    "stop worker": stop_worker,
    "delete blob": delete_blob,
    "stop driver": stop_driver,
}


# --- slices ---------------------------------------------------------------------------------------------------------


@contextmanager
def cluster() -> Iterator[tuple[dict[str, str], list[Any]]]:
    """A head without cores and two nodes with two each; yields the environment that reaches it, and the nodes."""
    from ray.cluster_utils import Cluster

    memory = 100 << 20
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": memory})
    try:
        nodes = [made.add_node(num_cpus=2, object_store_memory=memory) for _ in range(2)]
        yield {"RAY_ADDRESS": made.address}, nodes
    finally:
        with suppress(Exception):  # a node of it may have been killed
            made.shutdown()


def plan(number: int, seed: int, reference: Reference) -> tuple[Slice, random.Random]:
    """The slice of this number, and where its fault draws from: the same whenever it is asked for."""
    draw = random.Random(f"{seed} {number}")
    faults, stages = list(FAULTS), list(STAGES)
    fault = faults[number % len(faults)]  # all of them, in turn, each on other stages
    stage = draw.choice(stages)
    shards = len(list(reference.store.list(f"shards/{stage}/")))
    least = 1 if "blob" in fault else 0  # records, or there is nothing to damage
    return Slice(number, fault, stage, draw.randrange(least, max(shards, 2))), draw


def run_slice(chosen: Slice, draw: random.Random, reference: Reference, folder: Path) -> dict[str, object]:
    """One faulted run and one to the end. Raises AssertionError if they do not end as the reference."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store = prepare(reference, folder, chosen.stage)
    config = reference.config(folder, chosen.stage)
    began = time.monotonic()
    with cluster() if chosen.fault == "kill node" else nullcontext(({}, [])) as (environment, nodes):
        what, code = strike(config, chosen, draw, store, environment, nodes)
    finally_run(reference, folder, store)
    if "blob" not in chosen.fault:  # else what a pass has left and nobody reads again may stay damaged
        assert_sound(store)
    assert keys(store) == keys(reference.store)
    for stage in COMPARED:
        assert results(store, stage) == results(reference.store, stage), f"{stage} has other blobs"
    shutil.rmtree(folder)
    return {"what": what, "exit": code, "seconds": round(time.monotonic() - began, 1)}


def finally_run(reference: Reference, folder: Path, store: Store) -> None:
    """Run to the end, and again if somebody who then reads all results finds one damaged, and heals it."""
    for _ in range(3):
        for until in ENDS:
            run_to_the_end(reference.config(folder, None), until)
        artifacts = {name: artifact(store, name) for name in COMPARED}
        try:
            for name in COMPARED:
                for blob in blobs(store, artifacts[name]):
                    read_blob(store, blob)
            return
        except CorruptObject as e:
            heal(store, e, artifacts)
    raise AssertionError("results are still damaged after two healings")


def blobs(store: Store, made: Artifact) -> set[str]:
    """All blobs of a result."""
    if made.shard_table is None:
        return set(made.blobs.values())
    shards = read_shards(store, made)
    return {made.shard_table, *made.blobs.values(), *(blob for shard in shards for blob in shard.blobs.values())}


def prepare(reference: Reference, folder: Path, stage: str) -> Store:
    """A copy of the reference without this stage, all after it, and their blobs."""
    store = copy(reference.store, folder)
    for name in STAGES[STAGES.index(stage) :]:
        forget(store, name)
    store.delete([entry.path for entry in store.list("locks/")])
    needed = {blob for name in keys(store) for blob in blobs(store, artifact(store, name))}
    for entry in store.list("shards/"):
        if "/segment-" not in entry.path:
            needed |= set(json.loads(store.read(entry.path))["blobs"].values())
    store.delete([e.path for e in store.list("blobs/") if e.path.rpartition("/")[2] not in needed])
    return store


def results(store: Store, stage: str) -> Any:
    """What a stage's artefact is: all that does not depend on when it was made."""
    made = artifact(store, stage)
    shards = [(s.key, s.blobs, s.counts) for s in read_shards(store, made)] if made.shard_table else []
    return made.key, made.blobs, made.ledger, made.metrics, shards


def strike(
    config: Path, chosen: Slice, draw: random.Random, store: Store, environment: dict[str, str], nodes: Sequence[Any]
) -> tuple[str, int]:
    """Run the stage, and the fault when its moment has come; what it did, and how the command ended."""
    process = start("run", config, "--until", chosen.stage, env=environment)
    deadline = time.monotonic() + LIMIT_S
    try:
        while len(list(store.list(f"shards/{chosen.stage}/"))) < chosen.after or not ray_workers():
            if process.poll() is not None or time.monotonic() > deadline:
                break  # it was faster than we
            time.sleep(0.005)
        what = FAULTS[chosen.fault](Moment(process, store, chosen.stage, nodes, draw))
        result = finish(process, LIMIT_S)
        if result.returncode > 0:
            what += f"; {result.stderr.splitlines()[-1][:200]}"
        return what, result.returncode
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    options = argparse.ArgumentParser(prog="make chaos", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--slices", type=int, default=50, help="how many, from the first (50)")
    options.add_argument("--seed", type=int, default=1, help="what they draw from (1)")
    options.add_argument("--folder", type=Path, default=Path("out/chaos"), help="where they work (out/chaos)")
    options.add_argument("--seconds", type=float, default=float("inf"), help="begin no slice after so many")
    chosen = options.parse_args()
    began = time.monotonic()
    os.environ.pop("RAY_ADDRESS", None)
    os.environ |= {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    folder = chosen.folder.resolve() / f"seed-{chosen.seed}"
    reference = run_reference(folder / "reference")
    ledger = folder / "slices.jsonl"
    done = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    print(f"{'slice':>5}  {'fault':14}{'stage':12}{'shards':>6}  {'exit':>4}{'seconds':>8}  what happened")
    for row in done[: chosen.slices]:
        show(row)
    for number in range(len(done), chosen.slices):
        if time.monotonic() - began > chosen.seconds:
            break
        planned, draw = plan(number, chosen.seed, reference)
        row = asdict(planned) | {"failure": ""}
        try:
            row |= run_slice(planned, draw, reference, folder / f"slice-{number}")
        except (AssertionError, subprocess.TimeoutExpired) as e:  # its folder stays, to be looked at
            row |= {"what": "FAILED", "exit": -1, "seconds": 0.0, "failure": str(e)[-2000:]}
        done.append(row)
        with open(ledger, "a") as f:
            f.write(json.dumps(row) + "\n")
        show(row)
    done = done[: chosen.slices]
    failed = [row["number"] for row in done if row["failure"]]
    faults = Counter(row["fault"] for row in done)
    print(json.dumps({"slices": len(done), "of": chosen.slices, "failed": failed, "faults": faults}))
    return 1 if failed else 0


def show(row: dict[str, object]) -> None:
    print(
        f"{row['number']:5}  {row['fault']:14}{row['stage']:12}{row['after']:6}  {row['exit']:4}{row['seconds']:8}  "
        f"{row['what']}{row['failure']}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
