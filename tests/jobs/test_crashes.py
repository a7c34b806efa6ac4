"""A run that is killed or interrupted anywhere continues with the same command and ends as if nothing had happened."""

import os
import re
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load

from pipeline.graph.artifacts import shard_path
from pipeline.store import Store
from pipeline.store.records import read_blob
from tests.chain import ROOT, data_blobs, done, here, keys, unclip
from tests.faults import (
    Running,
    Undisturbed,
    artifact,
    assert_each_shard_once,
    assert_sound,
    copy,
    decoder_checkpoints,
    finish,
    forget,
    start,
    wait_until,
)

# Where the first process to come by is killed: in the data stages, from an empty store on, or in the decoder.
IN_DATA = (
    "blob.created",
    "shard.before_record",
    "shard.after_record",
    "artifact.before_record",
    "artifact.after_record",
    "pin.before_swap",
    "report.before_replace",
)
IN_TRAINING = ("checkpoint.before_record", "checkpoint.after_record", "training.before_artifact")
IN_COMMANDS = ("journal.before_swap", "gc.before_delete")  # of unclip data; see test_every_crash
IN_HEALING = ("damage.before_delete",)  # see test_damage
# Those of them that are passed in Ray's workers. The rest, pin and report, are the driver's own.
IN_SHARD_WORKERS = ("blob.created", "shard.before_record", "shard.after_record")
IN_TRAIN_WORKERS = ("blob.created", *IN_TRAINING, "artifact.before_record", "artifact.after_record")  # three and three


def test_every_crash_point_is_tested() -> None:
    calls = [re.findall(r'crash_point\("(.*?)"', file.read_text()) for file in (ROOT / "pipeline").rglob("*.py")]
    assert {*IN_DATA, *IN_TRAINING, *IN_COMMANDS, *IN_HEALING} == {name for names in calls for name in names}


@dataclass(frozen=True)
class Kills:
    """Kills one process at each of some points, one after the other."""

    folder: Path
    points: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        return {"UNCLIP_CRASH": ",".join(f"{point}@{self.folder / point}" for point in self.points)}

    def all_happened(self) -> bool:
        return all((self.folder / point).exists() for point in self.points)

    def run(self, store: Store, *words: object) -> list[str]:
        """Runs a command until it was killed at every point, and once more; what each run said on stderr."""
        said = []
        for _ in self.points:
            killed = unclip("run", *words, env=self.environment)
            assert killed.returncode == -signal.SIGKILL, killed.stderr
            assert_sound(store)
            said.append(killed.stderr)
        assert self.all_happened()
        last = unclip("run", *words)
        done(last)
        return [*said, last.stderr]


@pytest.mark.slow  # the same without processes: test_every_crash.py
def test_killed_in_the_data_stages(undisturbed: Undisturbed, tmp_path: Path) -> None:
    store = copy(undisturbed.data, tmp_path)
    for entry in [e for prefix in ("artifacts/", "shards/", "locks/") for e in store.list(prefix)]:
        if entry.path.split("/")[1] not in ("source", "captions", "clip"):
            store.delete([entry.path])  # its blobs stay as what an earlier kill may leave: named by no record
    Kills(tmp_path, IN_DATA).run(store, undisturbed.config(tmp_path), "--until", "codec")
    assert_sound(store)
    assert_each_shard_once(store, undisturbed.data)
    assert keys(store) == keys(undisturbed.data)
    assert data_blobs(store) == data_blobs(undisturbed.data)
    assert (tmp_path / "out/report.html").exists()


@pytest.mark.slow  # the same without a run around it: tests/pipeline/training/test_stage.py
def test_killed_in_a_training(undisturbed: Undisturbed, tmp_path: Path) -> None:
    store = copy(undisturbed.data, tmp_path)
    said = Kills(tmp_path, IN_TRAINING).run(store, undisturbed.config(tmp_path), "--until", "decoder")
    _assert_undisturbed(store, undisturbed)
    assert [re.findall(r"resuming decoder at sample (\d+)\n", run) for run in said] == [[], [], ["8"], ["48"]]


def _assert_undisturbed(store: Store, undisturbed: Undisturbed) -> None:
    assert_sound(store)
    assert keys(store) == keys(undisturbed.trained)
    ours, theirs = artifact(store, "decoder"), artifact(undisturbed.trained, "decoder")
    assert ours.blobs["model.safetensors"] == theirs.blobs["model.safetensors"]


def test_killed_ray_workers_are_replaced(undisturbed: Undisturbed, tmp_path: Path) -> None:
    store = copy(undisturbed.data, tmp_path)
    forget(store, "pairs")
    kills = Kills(tmp_path, IN_SHARD_WORKERS)
    config = undisturbed.config(tmp_path, pairs={"workers": 1})
    done(unclip("run", config, "--until", "codec", env=kills.environment))
    assert kills.all_happened()
    assert_sound(store)
    assert_each_shard_once(store, undisturbed.data)
    assert data_blobs(store) == data_blobs(undisturbed.data)


@pytest.mark.slow  # of the worker that dies after a checkpoint, see training/distributed/test_launch
@pytest.mark.parametrize(("points", "reached"), [(IN_TRAIN_WORKERS[:3], 8), (IN_TRAIN_WORKERS[3:], 48)])
def test_a_killed_ray_trainer_goes_on(
    points: tuple[str, ...], reached: int, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    store = copy(undisturbed.data, tmp_path)
    kills = Kills(tmp_path, points)
    settings = {"workers": 1, "threads": 1, "checkpoint_every_s": 0}
    config = undisturbed.config(tmp_path, decoder=settings)
    run = unclip("run", config, "--until", "decoder", env=kills.environment)
    assert "decoder done" in done(run)
    assert kills.all_happened()
    assert f"resuming decoder at sample {reached}\n" in run.stderr
    assert_sound(store)
    assert keys(store) == keys(undisturbed.trained)
    ours, theirs = (
        load(read_blob(s, artifact(s, "decoder").blobs["model.safetensors"])) for s in (store, undisturbed.trained)
    )
    assert all((ours[name] - theirs[name]).abs().max() < 1e-4 for name in theirs)


def _interrupt(process: Running) -> None:
    """Ctrl-C as a terminal sends it: to the whole process group."""
    os.killpg(process.pid, signal.SIGINT)
    result = finish(process)
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    last = result.stderr.splitlines()[-1]
    assert last == "interrupted; what is done is kept: run the same command again to go on"


@pytest.mark.slow
def test_ctrl_c_during_pairs(undisturbed: Undisturbed, tmp_path: Path) -> None:
    store = copy(undisturbed.data, tmp_path)
    first, *others = (shard_path("pairs", e.path.rpartition("/")[2][:64]) for e in store.list("shards/pairs/"))
    store.delete([*others, *(e.path for e in store.list("artifacts/pairs/"))])
    kept = Path(store.url, first).stat()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        silent.settimeout(60)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        config = undisturbed.config(tmp_path)
        slow = f"run.pairs.hosts={{drawings.test: '{address}'}}"
        process = start("run", config, slow, "run.pairs.timeout_s=3", "--until", "pairs")
        silent.accept()
        _interrupt(process)
    assert_sound(store)
    done(here("run", config, "--until", "pairs"))
    assert_each_shard_once(store, undisturbed.data)
    assert data_blobs(store) == data_blobs(undisturbed.data)
    assert Path(store.url, first).stat().st_ino == kept.st_ino  # the shard that was done is not done again


def test_ctrl_c_during_a_training(undisturbed: Undisturbed, tmp_path: Path) -> None:
    store = copy(undisturbed.data, tmp_path)
    config = undisturbed.config(tmp_path)
    process = start("run", config, "--until", "decoder")
    wait_until(lambda: decoder_checkpoints(store, undisturbed), process)
    _interrupt(process)
    again = unclip("run", config, "--until", "decoder")
    done(again)
    _assert_undisturbed(store, undisturbed)
    assert "resuming decoder at sample" in again.stderr
