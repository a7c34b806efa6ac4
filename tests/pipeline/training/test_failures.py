"""What a training does about numbers that are none, and about too little memory."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.errors import UserError
from pipeline.store.records import read_blob
from pipeline.training import stage
from pipeline.training.attempts import halved
from pipeline.training.loop import NonFinite
from pipeline.training.recipes import DiffusionPriorRecipe
from pipeline.training.replay import replay
from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask
from pipeline.training.timing import NOT_MEASURED
from tests.pipeline.training.conftest import EMBED_DIM, World, rewritten
from tests.pipeline.training.trainings import MODEL, SETTINGS

RECIPE = DiffusionPriorRecipe(samples=320, batch=16, lanes=8, window=5, precision="fp32", ema_half_life=64, model=MODEL)


POISONED = "000000000007"  # a training row


def with_a_nan(world: World) -> World:
    """The same world, but for one number of one row's image embedding."""

    def spoil(table: pa.Table) -> pa.Table:
        values = table["image_embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False).copy()
        if POISONED in (keys := table["key"].to_pylist()):
            values[keys.index(POISONED) * EMBED_DIM + 3] = np.nan
        column = pa.FixedSizeListArray.from_arrays(pa.array(values), EMBED_DIM)
        return table.set_column(table.column_names.index("image_embedding"), "image_embedding", column)

    return rewritten(world, "embeddings", spoil)


@pytest.fixture
def ended_ray() -> Iterator[None]:
    """Ends the Ray that a training has started."""
    yield
    import ray

    ray.shutdown()


@pytest.mark.usefixtures("ended_ray")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_that_failed_can_be_done_again(world: World, workers: int) -> None:
    """The row is named when it happens, and by the replay, with the module that its number comes out of first."""
    ctx = with_a_nan(world).context("diffusion_prior", RECIPE, replace(SETTINGS, workers=workers))
    assert replay(ctx) is None
    with pytest.raises(NonFinite, match=f"the loss of rows {POISONED} is not finite .* --replay diffusion_prior"):
        stage.train(ctx)
    records = [entry.path for entry in world.store.list("checkpoints/")]
    found = replay(ctx)
    assert [key for key, _ in found.rows] == [POISONED]
    assert found.module
    assert found.parameters
    assert found.repeated
    assert [entry.path for entry in world.store.list("checkpoints/")] == records
    (failure,) = [path for path in records if "/failures/" in path]
    assert f"/{found.samples:012d}-" in failure


def test_a_replay_that_lacks_memory_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = with_a_nan(world).context("diffusion_prior", RECIPE, SETTINGS)
    with pytest.raises(NonFinite):
        stage.train(ctx)
    hungry = "pipeline.training.tasks.diffusion_prior.DiffusionPriorTask.loss"
    monkeypatch.setattr(hungry, lambda *_: torch.empty(1 << 50, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"16 rows at once did not fit .*; lower run\.diffusion_prior\.micro_batch"):
        replay(ctx)


def test_too_little_memory_halves_the_micro_batch(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After some steps went well; what comes out is what small pieces from the start give."""
    loss = DiffusionPriorTask.loss
    calls = []

    def hungry(self: DiffusionPriorTask, model: Any, batch: Any, draw: Any) -> Any:
        rows = len(batch["image_embedding"])
        calls.append(rows)
        if rows > 5 and len(calls) > 3 and model.training:
            torch.empty(1 << 50, dtype=torch.uint8)
        return loss(self, model, batch, draw)

    recipe = replace(RECIPE, samples=96)
    monkeypatch.setattr(DiffusionPriorTask, "loss", hungry)
    with caplog.at_level(logging.WARNING):
        made = stage.train(world.context("diffusion_prior", recipe, SETTINGS))
    assert "16 rows at once did not fit into memory; going on from the last checkpoint with 8." in caplog.text
    assert "run.diffusion_prior.micro_batch=4 begins so" in caplog.text
    assert made.metrics["samples_seen"] == 96
    assert len(read_blob(world.store, made.blobs["model.safetensors"])) > 0


def test_a_loss_that_needs_its_rows_together_is_told_of_fewer_workers(world: World) -> None:
    ctx = world.context("clip", RECIPE, replace(SETTINGS, workers=8, min_workers=2))
    with pytest.raises(UserError, match=r"or raise run\.clip\.min_workers: fewer workers have more"):
        halved(ctx, SimpleNamespace(splittable=False), "64 rows at once", 64)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hungry", "words"),
    [
        ("pipeline.training.tasks.diffusion_prior.DiffusionPriorTask.loss", "one row"),
        ("pipeline.training.between_steps.BetweenSteps.validate", "a validation pass, a milestone or a checkpoint"),
        ("pipeline.training.worker.begin", "the model, with its average, its optimiser"),
    ],
)
def test_memory_for_less_than_a_step_or_for_one_row_is_a_mistake(
    world: World, monkeypatch: pytest.MonkeyPatch, hungry: str, words: str
) -> None:
    monkeypatch.setattr("pipeline.training.worker.measure_speed", lambda *_: NOT_MEASURED)
    monkeypatch.setattr("pipeline.training.between_steps.BetweenSteps.validate", lambda *_: None)
    monkeypatch.setattr(hungry, lambda *_: torch.empty(1 << 50, dtype=torch.uint8))
    with pytest.raises(UserError, match=f"{words}.* did not fit into memory; take a smaller model"):
        stage.train(world.context("diffusion_prior", RECIPE, SETTINGS))
