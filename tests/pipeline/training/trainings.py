"""Models that train in a second, workers without a Ray, and what tests look at in what trainings leave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import load
from torch import Tensor

from models.image_configs import DecoderConfig
from models.prior_configs import ClipConfig, DiffusionPriorConfig
from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.graph.stages import Context
from pipeline.settings import TrainingSettings
from pipeline.store.records import read_blob
from pipeline.training.checkpoints import Checkpoints, open_checkpoints
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.recipes import ClipRecipe, DiffusionPriorRecipe
from pipeline.training.state import TrainState, begin
from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask
from pipeline.training.train import Worker
from tests.pipeline.training.conftest import EMBED_DIM, World

SETTINGS = TrainingSettings(threads=1, device="cpu", checkpoint_every_s=0.0)
MODEL = DiffusionPriorConfig(text_context=16, width=32, depth=1, heads=2)
CLIP_MODEL = ClipConfig(
    embed_dim=EMBED_DIM, image_size=32, layers=(1,), width=32, patch=16, text_width=32, text_layers=1, text_heads=1
)
DECODER = DecoderConfig(
    channels=8, depth=1, multipliers=(1, 2), head_channels=8, attention_resolutions=(8,), text_width=16, text_depth=1,
    text_heads=1, patch=4, steps=50,
)  # fmt: skip

PRIOR_RECIPE = DiffusionPriorRecipe(
    samples=48, batch=16, lanes=4, precision="fp32", learning_rate=1e-3, ema_half_life=64, clip_norm=1.0, model=MODEL
)
CLIP_RECIPE = ClipRecipe(
    samples=60, batch=12, lanes=3, precision="fp32", warmup_steps=2, learning_rate=1e-3, model=CLIP_MODEL
)


def lines(world: World, artifact: Artifact) -> list[dict[str, Any]]:
    """The journal."""
    return [json.loads(line) for line in read_blob(world.store, artifact.blobs["metrics.jsonl"]).splitlines()]


def made(world: World, ctx: Context) -> Artifact:
    """The artefact of a training that is there."""
    artifact = load_artifact(world.store, ctx.stage, ctx.key)
    assert artifact is not None
    return artifact


def weights(world: World, artifact: Artifact) -> dict[str, Tensor]:
    """The tensors of the model."""
    (blob,) = [blob for name, blob in artifact.blobs.items() if name.endswith(".safetensors")]
    return load(read_blob(world.store, blob))


def assert_equal_trainings(ours: tuple[World, Artifact], theirs: tuple[World, Artifact]) -> None:
    """Losses within 1e-5, weights within 1e-4: what adding in another order leaves."""
    for kind, rel in (("loss", None), ("gradient_norm", 1e-4)):
        found, wanted = ([line[kind] for line in lines(*both) if kind in line] for both in (ours, theirs))
        assert found == pytest.approx(wanted, abs=1e-5, rel=rel), kind
    assert_close(weights(*ours), weights(*theirs))


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    gaps = {name: (found[name] - wanted[name]).abs() for name in wanted}
    if "gamma" in gaps:  # at the first timesteps a square of what is divided by their little noise
        assert (gaps.pop("gamma") < 1e-4 + 1e-3 * wanted["gamma"].abs()).all()
    assert all(gap.max() < 1e-4 for gap in gaps.values())


def _work(rank: int, ctx: Context, own: Checkpoints, meeting: Path, before: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    before(rank)
    settings = ctx.settings
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=settings.workers)
    Worker(ctx, own)(ProcessGroup(rank, settings.workers, sharded=settings.sharded, offload=settings.offload))
    dist.destroy_process_group()


def as_it_is(rank: int) -> None:
    """Changes nothing in a worker."""


multiprocessing.set_forkserver_preload([__name__])  # so that not every worker has to import torch and all of this


def train_together(ctx: Context, folder: Path, before: Callable[[int], None] = as_it_is, join: bool = True) -> Any:
    """Trains as many workers as the settings say, as processes joined by gloo, from the newest checkpoint on.

    Each calls ``before`` with its rank first. Without ``join`` returns the processes as torch.multiprocessing does.
    """
    own = open_checkpoints(ctx, begin=True)
    meeting = folder / f"meeting-{own.attempt}"
    given, workers = (ctx, own, meeting, before), ctx.settings.workers
    return multiprocessing.start_processes(_work, given, workers, join, start_method="forkserver")


RECIPE = DiffusionPriorRecipe(
    samples=192, batch=16, lanes=8, window=5, learning_rate=1e-2, ema_half_life=64, warmup_steps=2, model=MODEL
)


MUON_RECIPE = DiffusionPriorRecipe(
    samples=64, batch=16, lanes=8, optimizer="muon", model=DiffusionPriorConfig(width=8, depth=1, heads=1)
)


def make_state(steps: int = 0, seed: int = 0) -> TrainState:
    """A state after some steps on noise."""
    state = begin(DiffusionPriorTask(MUON_RECIPE.model, 4), MUON_RECIPE, ProcessGroup())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in state.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.optimizer.step()
        state.samples += MUON_RECIPE.batch
        state.journal.add({"loss": 0.1 * state.samples})
    return state
