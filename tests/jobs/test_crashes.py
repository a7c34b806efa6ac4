"""A run that is killed or interrupted anywhere continues with the same command and ends as if nothing had happened."""

import os
import re
import signal
import socket
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
from tests.jobs.kills import IN_ARTIFACTS, IN_DRIVER, IN_SHARDS

# Where the first process to come by is killed: in Ray's workers here, and without them in test_every_crash.py.
IN_TRAINING = ("checkpoint.before_record", "checkpoint.after_record", "training.before_artifact")  # also test_stage.py
IN_COMMANDS = ("journal.before_swap", "gc.before_delete")  # of unclip data; see test_every_crash.py
IN_HEALING = ("damage.before_delete",)  # see test_every_crash.py
IN_TRAIN_WORKERS = ("blob.created", *IN_TRAINING, *IN_ARTIFACTS)  # three and three


def test_every_crash_point_is_tested() -> None:
    calls = [re.findall(r'crash_point\("(.*?)"', file.read_text()) for file in (ROOT / "pipeline").rglob("*.py")]
    tested = {*IN_SHARDS, *IN_ARTIFACTS, *IN_DRIVER, *IN_TRAINING, *IN_COMMANDS, *IN_HEALING}
    assert tested == {name for names in calls for name in names}


def _killing(folder: Path, points: tuple[str, ...]) -> dict[str, str]:
    """The environment in which one process is killed at each of some points, and leaves a file of that name."""
    return {"UNCLIP_CRASH": ",".join(f"{point}@{folder / point}" for point in points)}


def _assert_undisturbed(store: Store, undisturbed: Undisturbed) -> None:
    assert_sound(store)
    assert keys(store) == keys(undisturbed.trained)
    ours, theirs = artifact(store, "decoder"), artifact(undisturbed.trained, "decoder")
    assert ours.blobs["model.safetensors"] == theirs.blobs["model.safetensors"]


@pytest.mark.slow  # of workers that are killed and replaced, see graph/test_shards
def test_killed_ray_workers_are_replaced(undisturbed: Undisturbed, tmp_path: Path) -> None:
    store = copy(undisturbed.data, tmp_path)
    forget(store, "pairs")
    config = undisturbed.config(tmp_path, pairs={"workers": 1})
    done(unclip("run", config, "--until", "codec", env=_killing(tmp_path, IN_SHARDS)))
    assert all((tmp_path / point).exists() for point in IN_SHARDS)
    assert_sound(store)
    assert_each_shard_once(store, undisturbed.data)
    assert data_blobs(store) == data_blobs(undisturbed.data)


@pytest.mark.slow  # of the worker that dies after a checkpoint, see training/distributed/test_launch
@pytest.mark.parametrize(("points", "reached"), [(IN_TRAIN_WORKERS[:3], 8), (IN_TRAIN_WORKERS[3:], 48)])
def test_a_killed_ray_trainer_goes_on(
    points: tuple[str, ...], reached: int, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    store = copy(undisturbed.data, tmp_path)
    settings = {"workers": 1, "threads": 1, "checkpoint_every_s": 0}
    config = undisturbed.config(tmp_path, decoder=settings)
    run = unclip("run", config, "--until", "decoder", env=_killing(tmp_path, points))
    assert "decoder done" in done(run)
    assert all((tmp_path / point).exists() for point in points)
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
    said = "interrupted; what is done is kept, of trainings up to the last checkpoint: the same command goes on"
    # Behind it, a training on Ray may say once more how far it came.
    assert [line for line in result.stderr.splitlines() if not line.startswith("  decoder: ")][-1] == said


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


def test_ctrl_c_during_a_training(undisturbed: Undisturbed, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = copy(undisturbed.data, tmp_path)
    config = undisturbed.config(tmp_path)
    process = start("run", config, "--until", "decoder")
    wait_until(lambda: decoder_checkpoints(store, undisturbed), process)
    _interrupt(process)
    done(here("run", config, "--until", "decoder"))
    _assert_undisturbed(store, undisturbed)
    assert "resuming decoder at sample" in caplog.text


def test_ctrl_c_during_a_training_of_ray_workers(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """In the main thread Ray Train would take the signal for itself, and end the process without a word."""
    store = copy(undisturbed.data, tmp_path)
    settings = {"workers": 1, "threads": 1, "checkpoint_every_s": 0}
    process = start("run", undisturbed.config(tmp_path, decoder=settings), "--until", "decoder")
    wait_until(lambda: decoder_checkpoints(store, undisturbed), process)
    _interrupt(process)
    assert_sound(store)
