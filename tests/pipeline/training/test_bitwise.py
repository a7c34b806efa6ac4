"""All six trainings: killed five times on the way and started again, they end bit for bit as in one go."""

import json
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from models.image_configs import UpsamplerConfig
from models.prior_configs import ARPriorConfig
from pipeline.graph.artifacts import load_artifact
from pipeline.graph.stages import Context, trajectory_key
from pipeline.settings import TrainingSettings
from pipeline.store.records import read_blob, read_record
from pipeline.training.recipes import ARPriorRecipe, DecoderRecipe, UpsamplerRecipe
from pipeline.training.records import CheckpointRecord
from tests.pipeline.training.conftest import World, make_world, with_codec
from tests.pipeline.training.test_stage import RECIPE
from tests.pipeline.training.trainings import CLIP_RECIPE, DECODER

pytestmark = pytest.mark.slow
STEPS, BATCH, KILLS = 200, 8, 5
HALF_LIFE = 10 * BATCH  # which the average has in the second half; in the first it is a tenth of the samples seen
SHARED: dict[str, Any] = {"samples": STEPS * BATCH, "batch": BATCH, "lanes": 8, "window": 5, "ema_half_life": HALF_LIFE}
DROPOUT = 0.1
UPSAMPLER = UpsamplerConfig(
    low_size=16, image_size=64, channels=8, depth=1, multipliers=(1, 2), steps=50, patch=2, dropout=DROPOUT
)
AR_PRIOR = ARPriorConfig(
    text_context=16, prefix=8, text_width=32, text_depth=1, text_heads=2, width=32, depth=1, heads=2, buckets=8,
    dropout=DROPOUT,
)  # fmt: skip
RECIPES = {
    "clip": replace(CLIP_RECIPE, precision="bf16", **SHARED),
    "ar_prior": ARPriorRecipe(model=AR_PRIOR, **SHARED),
    "diffusion_prior": replace(RECIPE, **SHARED),
    "decoder": DecoderRecipe(model=replace(DECODER, dropout=DROPOUT), **SHARED),
    "upsampler_256": UpsamplerRecipe(model=UPSAMPLER, **SHARED),
    "upsampler_1024": UpsamplerRecipe(model=replace(UPSAMPLER, corruption="bsr"), **SHARED),
}
INPUTS = {
    "clip": ("pairs", "captions", "filter"),
    "ar_prior": ("pairs", "captions", "embeddings", "curation", "codec"),
    "upsampler_256": ("pairs", "curation"),
    "upsampler_1024": ("pairs", "curation"),
}
KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.training import stage
from pipeline.training.train import BetweenSteps
from tests.pipeline.training.test_bitwise import BATCH, context

name, folder, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
pause = BetweenSteps.__call__

def dying(self, state):
    if state.samples == step * BATCH:
        os.kill(os.getpid(), signal.SIGKILL)
    pause(self, state)

BetweenSteps.__call__ = dying
stage.train(context(name, folder)[1])
"""


def context(name: str, folder: Path) -> tuple[World, Context]:
    """One of the trainings, in a world of its own. Time decides when it saves: twice a second."""
    world = with_codec(make_world(folder))
    settings = TrainingSettings(threads=1, device="cpu", checkpoint_every_s=0.5)
    return world, world.context(name, RECIPES[name], settings, INPUTS.get(name, ()))


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
