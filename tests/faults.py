"""What the tests of crashes, races and damage share: a chain that is cut off at the decoder, and ways to look at it."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.graph.artifacts import Artifact, load_artifact, read_shards
from pipeline.store import Store
from pipeline.store.records import digest
from tests.chain import MICRO, ROOT, Finished, done, here, open_at, write_config, write_list

Running = subprocess.Popen[str]
STEPS = 6  # of the decoder, with a checkpoint after each
FEW = {
    # Every row teaches: no look at validation rows takes time.
    "source": {"shard_rows": 10, "split_column": "none", "validation": 0.0, "test": 0.0},
    "clip": {"samples": 64, "batch": 32},
    "decoder": {"samples": 8 * STEPS, "batch": 8, "decay": 0},  # a rate that falls would make it two trajectories
}
RUN = {"lease_s": 3, "clip": {"threads": 1}, "decoder": {"threads": 1, "checkpoint_every_s": 0}}


@dataclass(frozen=True)
class Undisturbed:
    """Two runs that nothing disturbed: ``data`` is the store of one that ended with the codec, ``trained`` of one that
    went on to the decoder."""

    folder: Path
    pictures: str

    @property
    def data(self) -> Store:
        return open_at(self.folder / "data")

    @property
    def trained(self) -> Store:
        return open_at(self.folder / "trained")

    def config(self, folder: Path, store: str | None = None, **run: object) -> Path:
        """The same configuration for another store, by default ``folder``/store. ``run`` are run settings."""
        settings = json.loads(json.dumps(MICRO["run"])) | RUN | run
        return write_config(folder, store or str(folder / "store"), self.pictures, [self.list], **FEW, run=settings)

    @property
    def list(self) -> Path:
        return self.folder / "list.csv"


def run_undisturbed(folder: Path, pictures: str) -> None:
    reference = Undisturbed(folder, pictures)
    write_list(reference.list, 30, 60)
    done(here("run", reference.config(folder, str(folder / "data")), "--until", "codec"))
    shutil.copytree(folder / "data", folder / "trained")
    done(here("run", reference.config(folder, str(folder / "trained")), "--until", "decoder"))


def copy(store: Store, folder: Path) -> Store:
    """A copy of a store, in ``folder``/store."""
    shutil.copytree(store.url, folder / "store")
    return open_at(folder / "store")


def artifact(store: Store, stage: str) -> Artifact:
    """The only artefact of a stage."""
    (entry,) = store.list(f"artifacts/{stage}/")
    found = load_artifact(store, stage, entry.path.rpartition("/")[2].removesuffix(".json"))
    assert found is not None
    return found


def forget(store: Store, stage: str, shards: bool = True) -> None:
    """Delete the records of a stage and, if wanted, of its shards."""
    for prefix in (f"artifacts/{stage}/", *([f"shards/{stage}/"] if shards else [])):
        store.delete([entry.path for entry in store.list(prefix)])


def decoder_checkpoints(store: Store, reference: Undisturbed) -> list[str]:
    """Paths of the decoder's checkpoint records, the oldest first: those of a training that the data stages lack."""
    others = set(attempts(reference.data))
    found = (entry.path for entry in store.list("checkpoints/") if "/attempts/" not in entry.path)
    return sorted(path for path in found if path.split("/")[1] not in others)


def attempts(store: Store) -> Counter[str]:
    """How often each training was begun, by trajectory."""
    return Counter(e.path.split("/")[1] for e in store.list("checkpoints/") if "/attempts/" in e.path)


def assert_sound(store: Store) -> None:
    """Every record is whole, and every blob is what its name says."""
    for prefix in ("shards/", "artifacts/", "checkpoints/", "runs/"):
        for entry in store.list(prefix):
            if "/attempts/" not in entry.path:
                body = json.loads(store.read(entry.path))
                assert body.pop("checksum") == digest(body), entry.path
    for entry in store.list("blobs/"):
        assert hashlib.sha256(store.read(entry.path)).hexdigest() == entry.path.rpartition("/")[2]


def assert_each_shard_once(store: Store, reference: Store) -> None:
    """The shards of both stores are the same, and every one has one record."""
    for stage in ("source", "captions", "pairs", "embeddings", "curation"):
        assert {e.path for e in store.list(f"shards/{stage}/")} == {e.path for e in reference.list(f"shards/{stage}/")}
        ours, theirs = (read_shards(s, artifact(s, stage)) for s in (store, reference))
        assert ours == theirs
        assert len({shard.key for shard in ours}) == len(ours) == 3


def start(*words: object, env: Mapping[str, str] | None = None) -> Running:
    """A command in a process group of its own, as a terminal starts it. Its output is read by ``finish``."""
    command = [sys.executable, "-m", "jobs.cli", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | dict(env or {})
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def finish(process: Running, timeout: float = 600) -> Finished:
    """Wait for a command and take its output; one that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_until(event: Callable[[], object], process: Running, timeout: float = 600) -> None:
    """Wait for ``event`` while the process lives."""
    deadline = time.monotonic() + timeout
    while not event():
        if process.poll() is not None or time.monotonic() > deadline:
            result = finish(process, 1)
            raise AssertionError(f"no event before exit {result.returncode}\n{result.stdout}\n{result.stderr}")
        time.sleep(0.01)
