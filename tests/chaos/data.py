"""Faults against the data stages.

A slice makes one stage anew on Ray workers, from a store in which all before it is made, and strikes once: when workers
are there and so many of the stage's shards have records. Then a run goes to its end, and every key and blob must be
those of a run that nothing disturbed.
"""

import json
import os
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pipeline.graph.artifacts import Artifact, read_shards
from pipeline.store import Store
from pipeline.store.records import blob_path, read_blob
from tests.chain import done, keys
from tests.chaos import strikes
from tests.chaos.strikes import Fault, Moment, Slice, cluster, ours, run_to_the_end
from tests.faults import artifact, assert_sound, copy, finish, forget, start

ROWS = 60
STAGES = ("pairs", "embeddings", "thresholds", "curation", "index", "codec")  # each needs only stages before it
ENDS = ("index", "codec")  # what all of them lead to


class Reference(strikes.Reference):
    def of(self, folder: Path, stage: str | None) -> Path:
        """The same for the store of another folder, with Ray workers for one stage."""
        return self.config(
            folder,
            str(folder / "store"),
            {name: {"workers": 2 if name == stage else 0} for name in STAGES},
            thresholds={"similarity": 0.05},
            curation={"near_duplicate": 0.999, "near_held_out": 0.999},
            codec={"components": 12, "buckets": 16},
            ar_prior={"model": {"buckets": 16}},
        )


def run_reference(folder: Path) -> Reference:
    """Make it, unless an earlier call has."""
    reference = Reference(folder)

    def make() -> None:
        for until in ENDS:
            run_to_the_end(reference.of(folder, None), until)

    splits = ["test" if i % 10 == 3 else "validation" if i % 10 == 7 else "train" for i in range(ROWS)]
    reference.make_once([i % 55 for i in range(ROWS)], splits, make)  # the last five are there twice
    return reference


# --- faults ---------------------------------------------------------------------------------------------------------


def ray_workers() -> list[int]:
    """Ray's processes that make shards."""
    return ours("MapWorker")


def stop_driver(now: Moment) -> str:
    return strikes.stop_one([now.process.pid], now.draw)


def truncate_blob(now: Moment) -> str:
    return _damage(now, lambda file: os.truncate(file, file.stat().st_size // 2))


def delete_blob(now: Moment) -> str:
    return _damage(now, Path.unlink)


def _damage(now: Moment, how: Callable[[Path], None]) -> str:
    """Kill the driver, and damage something that the stage left; ``now.place`` is the store and the stage."""
    store, stage = now.place
    now.process.kill()
    now.process.wait()
    names = {
        (name, blob)
        for entry in store.list(f"shards/{stage}/")
        for name, blob in json.loads(store.read(entry.path))["blobs"].items()
    }
    if not names:
        return "killed the driver, nothing was left to damage"
    name, blob = now.draw.choice(sorted(names))
    how(Path(store.url, blob_path(blob)))
    return f"killed the driver, damaged a blob: {name}"


FAULTS: dict[str, Fault] = {
    "kill worker": strikes.kill_worker,
    "kill driver": strikes.kill_driver,
    "truncate blob": truncate_blob,
    "kill node": strikes.kill_node,
    "stop worker": strikes.stop_worker,
    "delete blob": delete_blob,
    "stop driver": stop_driver,
}


# --- slices ---------------------------------------------------------------------------------------------------------


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
    with strikes.slice_folder(folder) as said:
        store = prepare(reference, folder, chosen.stage)
        config = reference.of(folder, chosen.stage)
        with cluster(nodes=2, cpus=2) if chosen.fault == "kill node" else nullcontext(({}, [])) as (environment, nodes):  # type: ignore[attr-defined]
            process = start("run", config, "--until", chosen.stage, env=environment)

            def due() -> bool:
                return len(list(store.list(f"shards/{chosen.stage}/"))) >= chosen.after

            now = Moment(process, ray_workers, nodes, draw, (store, chosen.stage))
            # The command may be faster than we.
            said["what"], said["exit"] = strikes.strike(now, FAULTS[chosen.fault], due, always=False)
        finally_run(reference, folder, store)
        if "blob" not in chosen.fault:  # else what a pass has left and nobody reads again may stay damaged
            assert_sound(store)
        assert keys(store) == keys(reference.store)
        for stage in keys(store):
            assert results(store, stage) == results(reference.store, stage), f"{stage} has other blobs"
    return said


def finally_run(reference: Reference, folder: Path, store: Store) -> None:
    """Quarantine what is damaged, and run to the end."""
    config = reference.of(folder, None)
    done(finish(start("data", "check", config, "--repair"), strikes.LIMIT_S))
    for until in ENDS:
        run_to_the_end(config, until)
    for name in keys(reference.store):
        for blob in blobs(store, artifact(store, name)):
            read_blob(store, blob)


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
