"""All six trainings: killed five times on the way and started again, they end bit for bit as in one go."""

import json
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline.graph.artifacts import load_artifact
from pipeline.graph.stages import trajectory_key
from pipeline.store.records import read_blob, read_record
from pipeline.training.records import CheckpointRecord
from tests.pipeline.training.killed import BATCH, KILLS, RECIPES, STEPS, context

pytestmark = pytest.mark.slow
KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.training import stage
from pipeline.training.train import BetweenSteps
from tests.pipeline.training.killed import BATCH, context

name, folder, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
pause = BetweenSteps.__call__

def dying(self, state):
    if state.samples == step * BATCH:
        os.kill(os.getpid(), signal.SIGKILL)
    pause(self, state)

BetweenSteps.__call__ = dying
stage.train(context(name, folder)[1])
"""


def run(name: str, folder: Path, step: int) -> int:
    """Train until killed at a step, -1 for never; the exit code."""
    program = [sys.executable, "-c", KILLED, name, str(folder), str(step)]
    return subprocess.run(program, check=False, stderr=subprocess.DEVNULL).returncode


def left(name: str, folder: Path) -> dict[str, Any]:
    """The blobs of the artefact, and what is in those of the last checkpoint: weights, average, optimiser."""
    world, ctx = context(name, folder)
    artifact = load_artifact(world.store, name, ctx.key)
    newest = max(entry.path for entry in world.store.list(f"checkpoints/{trajectory_key(ctx)}/0"))
    record = read_record(world.store, newest, CheckpointRecord)
    assert record.samples == STEPS * BATCH
    held = {part: tensors(read_blob(world.store, blob)) for part, blob in record.blobs.items()}
    return {"artefact": artifact.blobs, "checkpoint": held, "journal": json.dumps(asdict(record.journal))}


def tensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns what a safetensors file says of its tensors, and their bytes. Its metadata names the attempt."""
    end = 8 + int.from_bytes(data[:8], "little")
    about = json.loads(data[8:end])
    about.pop("__metadata__", None)
    return about, data[end:]


@pytest.mark.parametrize("name", RECIPES)
def test_five_kills_change_no_bit(name: str, tmp_path: Path) -> None:
    assert run(name, tmp_path / "straight", -1) == 0
    steps = sorted(random.Random(name).sample(range(1, STEPS), KILLS))
    for step in steps:
        assert run(name, tmp_path / "killed", step) == -9
    assert run(name, tmp_path / "killed", -1) == 0
    assert left(name, tmp_path / "killed") == left(name, tmp_path / "straight")
