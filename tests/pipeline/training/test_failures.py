"""What a training does about numbers that are none, and about too little memory."""

import logging
import re
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
from pipeline.training.checkpoints import open_checkpoints
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.memory import halved
from pipeline.training.recipes import DiffusionPriorRecipe
from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask
from pipeline.training.timing import NOT_MEASURED
from pipeline.training.train import BetweenSteps
from tests.pipeline.training.conftest import EMBED_DIM, World, rewritten
from tests.pipeline.training.trainings import MODEL, SETTINGS, make_state

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
def test_a_row_that_spoils_a_step_is_named(world: World, workers: int) -> None:
    ctx = with_a_nan(world).context("diffusion_prior", RECIPE, replace(SETTINGS, workers=workers))
    named = rf"the loss of rows {POISONED} is not finite after sample (\d+); lower learning_"
    with pytest.raises(UserError, match=named) as caught:
        stage.train(ctx)
    (samples,) = re.findall(named, str(caught.value))
    assert open_checkpoints(ctx, begin=False).newest(RECIPE.samples) == int(samples)


def test_nothing_of_a_step_that_failed_is_shown_or_saved(world: World) -> None:
    """Where all of it is due: a validation pass, a milestone and a checkpoint."""
    done: list[str] = []
    results: Any = SimpleNamespace(
        ctx=world.context("diffusion_prior", RECIPE, replace(SETTINGS, milestones=(16,))),
        group=ProcessGroup(),
        averaged=lambda state: state.ema,
        validate=lambda *_: done.append("validated"),
        publish=lambda *_: done.append("published"),
    )
    saver: Any = SimpleNamespace(due=lambda *_, **__: True, save=lambda state: done.append("saved"))
    state = make_state(steps=1)
    state.failed = torch.tensor(True)
    BetweenSteps(results, saver, None)(state)
    assert done == []
    state.failed = torch.tensor(False)
    BetweenSteps(results, saver, None)(state)
    assert done == ["validated", "published", "saved"]


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
    assert "16 rows at once did not fit into memory; resuming from the last checkpoint with 8." in caplog.text
    assert "run.diffusion_prior.micro_batch=4 to start there" in caplog.text
    assert made.metrics["samples_seen"] == 96
    assert len(read_blob(world.store, made.blobs["model.safetensors"])) > 0


def test_a_loss_that_needs_its_rows_together_is_told_of_recomputing(world: World) -> None:
    said = "clip: 64 rows, which this loss needs together, did not fit into memory; "
    for recompute, advice in ((False, "set run.clip.recompute=true, or take a smaller"), (True, "take a smaller")):
        ctx = world.context("clip", RECIPE, replace(SETTINGS, recompute=recompute))
        with pytest.raises(UserError, match=re.escape(said + advice)):
            halved(ctx, SimpleNamespace(splittable=False), "64 rows at once", 64)


@pytest.mark.parametrize(
    ("hungry", "words"),
    [
        ("pipeline.training.tasks.diffusion_prior.DiffusionPriorTask.loss", "one row did .*recompute=true, or take"),
        ("pipeline.training.results.Results.validate", "a validation pass, a milestone or a checkpoint"),
        ("pipeline.training.train.begin", "the model, with its average, its optimiser"),
    ],
)
def test_memory_for_less_than_a_step_or_for_one_row_is_a_mistake(
    world: World, monkeypatch: pytest.MonkeyPatch, hungry: str, words: str
) -> None:
    monkeypatch.setattr("pipeline.training.train.measure_speed", lambda *_: NOT_MEASURED)
    monkeypatch.setattr("pipeline.training.results.Results.validate", lambda *_: None)
    monkeypatch.setattr(hungry, lambda *_: torch.empty(1 << 50, dtype=torch.uint8))
    with pytest.raises(UserError, match=f"{words}.* a smaller model"):
        stage.train(world.context("diffusion_prior", RECIPE, SETTINGS))
