"""Faults against a training.

A slice trains a diffusion prior on two Ray workers, with a checkpoint every few seconds, and strikes once: when workers
are there and so many checkpoints were published. Then a run goes to its end, and the artefact must be, to the bit, that
of a training that nothing disturbed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from pipeline.store import Store
from pipeline.store.records import blob_path
from tests.chain import open_at
from tests.chaos import strikes
from tests.chaos.strikes import Fault, Moment, Slice, cluster, ours, run_to_the_end
from tests.fault_proxy import FaultProxy, always, at_random, failing, never
from tests.faults import artifact, assert_sound, start
from tests.seaweed import serving

ROWS, STAGE = 60, "diffusion_prior"
STEPS, BATCH = 1500, 16
MODEL = {"width": 16, "depth": 1, "heads": 2}  # checkpoints are small: it is their number that counts
GONE_S = 20.0
SCRATCH = "48m"  # what a training needs there, and more


class Reference(strikes.Reference):
    @property
    def data(self) -> Store:
        """A store that has nothing but what a training reads."""
        return open_at(self.folder / "data")

    def of(self, folder: Path, store: str) -> Path:
        training = {"workers": 2, "threads": 1, "device": "cpu", "checkpoint_every_s": 0.5}
        here = {name: {"workers": 0} for name in ("pairs", "filter", "embeddings", "curation", "index", "codec")}
        recipe = {"samples": STEPS * BATCH, "batch": BATCH, "lanes": 4, "model": MODEL}
        return self.config(folder, store, {STAGE: training, **here}, **{STAGE: recipe})


def run_reference(folder: Path) -> Reference:
    """Make it, unless an earlier call has."""
    reference = Reference(folder)

    def make() -> None:
        run_to_the_end(reference.of(folder, str(folder / "data")), "curation")
        shutil.copytree(folder / "data", folder / "store")
        run_to_the_end(reference.of(folder, str(folder / "store")), STAGE)

    reference.make_once(range(ROWS), ["validation" if i % 10 == 7 else "train" for i in range(ROWS)], make)
    return reference


# --- where a slice plays ----------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """A store, on S3 behind ``proxy`` where the fault is one of the store's, the environment of the command, the nodes
    of its cluster if it has one, the folder of its temporary files if that may be full."""

    store: Store
    environment: dict[str, str] = field(default_factory=dict)
    nodes: list[Any] = field(default_factory=list)
    proxy: FaultProxy | None = None
    scratch: Path | None = None


def set_up(fault: str, reference: Reference, folder: Path, stack: ExitStack) -> Scene:
    """What a fault needs, for as long as ``stack``."""
    if "store" in fault:
        (folder / "weed").mkdir()
        server = stack.enter_context(serving(folder / "weed"))
        stack.enter_context(mock.patch.dict(os.environ, server.environment))
        proxy = stack.enter_context(failing(server.endpoint))
        store = open_at(server.url)
        for entry in reference.data.list(""):
            store.create(entry.path, reference.data.read(entry.path))
        return Scene(store, {"AWS_ENDPOINT_URL": proxy.endpoint}, proxy=proxy)
    shutil.copytree(reference.data.url, folder / "store")
    scene = Scene(open_at(folder / "store"))
    if fault == "kill node":
        scene.environment, scene.nodes = stack.enter_context(cluster(nodes=3, cpus=1))  # one to spare
    if fault == "full disk":
        scene.scratch = Path(tempfile.mkdtemp(dir="/tmp"))  # a short name: sockets lie there
        stack.callback(scene.scratch.rmdir)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SCRATCH}", "chaos", scene.scratch], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", scene.scratch], check=True)
        scene.environment = {"TMPDIR": str(scene.scratch)}
    return scene


# --- faults ---------------------------------------------------------------------------------------------------------


def workers() -> list[int]:
    """Ray's processes that train."""
    return ours("RayTrainWorker")


def store_gone(now: Moment) -> str:
    assert now.place.proxy
    now.place.proxy.choose = always("reset")
    time.sleep(GONE_S)
    now.place.proxy.choose = never
    return f"no answer for {GONE_S:.0f} s"


def store_errors(now: Moment) -> str:
    assert now.place.proxy
    now.place.proxy.choose = at_random(now.draw.randrange(1 << 30), chance=0.1)
    return "every tenth request met a fault from then on"


def full_disk(now: Moment) -> str:
    """Fill the folder of temporary files until the command has ended."""
    assert now.place.scratch
    with suppress(OSError), open(now.place.scratch / "full", "wb", buffering=0) as f:
        while f.write(bytes(1 << 16)):
            pass
    return "filled the disk"


def damage_checkpoint(now: Moment) -> str:
    """Kill the driver, and cut a blob of the newest checkpoint in half."""
    now.process.kill()
    now.process.wait()
    for pid in now.workers():  # they may be saving
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    record = json.loads(now.place.store.read(checkpoints(now.place.store)[-1]))
    part, blob = now.draw.choice(sorted(record["blobs"].items()))
    file = Path(now.place.store.url, blob_path(blob))
    os.truncate(file, file.stat().st_size // 2)
    return f"killed the driver, damaged the newest checkpoint: {part}"


FAULTS: dict[str, Fault] = {
    "kill worker": strikes.kill_worker,
    "kill node": strikes.kill_node,
    "store gone": store_gone,
    "damage checkpoint": damage_checkpoint,
    "full disk": full_disk,
    "kill driver": strikes.kill_driver,
    "store errors": store_errors,
    "stop worker": strikes.stop_worker,
}


# --- slices ---------------------------------------------------------------------------------------------------------


def plan(number: int, seed: int, reference: Reference) -> tuple[Slice, random.Random]:
    """The slice of this number, and where its fault draws from: the same whenever it is asked for."""
    draw = random.Random(f"training {seed} {number}")
    fault = list(FAULTS)[number % len(FAULTS)]
    return Slice(number, fault, STAGE, draw.randrange(1, 4)), draw


def checkpoints(store: Store) -> list[str]:
    """Paths of the records of checkpoints, the oldest first."""
    return sorted(e.path for e in store.list("checkpoints/") if e.path.split("/")[2][0].isdigit())


def run_slice(chosen: Slice, draw: random.Random, reference: Reference, folder: Path) -> dict[str, object]:
    """One faulted run and one to the end. Raises AssertionError if they do not end as the reference."""
    with strikes.slice_folder(folder) as said, ExitStack() as stack:
        scene = set_up(chosen.fault, reference, folder, stack)
        config = reference.of(folder, scene.store.url)
        process = start("run", config, "--until", STAGE, env=scene.environment)
        begun: set[str] = set()

        def due() -> bool:
            begun.update(checkpoints(scene.store))  # older ones are deleted
            return len(begun) >= chosen.after

        now = Moment(process, workers, scene.nodes, draw, scene)
        said["what"], said["exit"] = strikes.strike(now, FAULTS[chosen.fault], due)
        if scene.proxy:
            scene.proxy.choose = never
        if scene.scratch:
            (scene.scratch / "full").unlink()
        run_to_the_end(config, STAGE)
        if chosen.fault != "damage checkpoint":  # which stays until newer ones push it out
            assert_sound(scene.store)
        made, wanted = artifact(scene.store, STAGE), artifact(reference.store, STAGE)
        assert (made.key, made.blobs, made.metrics) == (wanted.key, wanted.blobs, wanted.metrics), "another model"
    return said
