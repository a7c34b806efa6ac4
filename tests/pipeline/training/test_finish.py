"""What is measured of a model before it is published, and what of that must never reach its training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from models.diffusion_prior import diffusion_prior_gamma
from models.folder import load_model
from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import trajectory_key
from pipeline.store.records import materialise, read_blob, read_record
from pipeline.training import stage
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.feed.feed import Feed
from pipeline.training.recipes import DiffusionPriorRecipe
from pipeline.training.records import CheckpointRecord
from pipeline.training.results import Results, first_rows
from pipeline.training.task import Examples
from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask
from pipeline.training.timing import Speed
from tests.pipeline.training.conftest import EMBED_DIM, World
from tests.pipeline.training.trainings import MODEL, SETTINGS

RECIPE = DiffusionPriorRecipe(samples=64, batch=16, lanes=8, precision="fp32", learning_rate=1e-3, model=MODEL)
KEEPING = replace(SETTINGS, keep_checkpoints=9, milestones=(32,))


def examples(shared: World, recipe: DiffusionPriorRecipe, rows: int) -> Examples:
    ctx = shared.context("diffusion_prior", recipe, KEEPING)
    feed = Feed(ctx.store, ctx.inputs, DiffusionPriorTask(recipe.model, EMBED_DIM), recipe)
    return first_rows(feed, recipe, rows, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(shared_world: World) -> Artifact:
    return stage.train(shared_world.context("diffusion_prior", RECIPE, KEEPING))


def test_a_published_prior_has_the_gamma_of_its_averaged_weights(
    shared_world: World, trained: Artifact, tmp_path: Path
) -> None:
    materialise(shared_world.store, trained.blobs, tmp_path)
    model = load_model(tmp_path)
    rows = examples(shared_world, RECIPE, DiffusionPriorTask.finish_rows)
    # To rounding: where weights lie in memory decides in which order a matrix product adds.
    torch.testing.assert_close(model.gamma, diffusion_prior_gamma(model, rows), rtol=1e-5, atol=0)


def test_gamma_is_in_no_checkpoint_and_the_training_goes_on_after_a_milestone(
    shared_world: World, trained: Artifact
) -> None:
    folder = f"checkpoints/{trajectory_key(shared_world.context('diffusion_prior', RECIPE, KEEPING))}/"
    records = [
        read_record(shared_world.store, entry.path, CheckpointRecord) for entry in shared_world.store.list(f"{folder}0")
    ]
    assert {record.samples for record in records if record} == {16, 32, 48, 64}
    for record in records:
        for name in ("model", "ema"):
            assert "gamma" not in load(read_blob(shared_world.store, record.blobs[name]))
    assert trained.metrics["samples_seen"] == 64


@pytest.mark.parametrize("batch", [16, 24, 160])
def test_it_is_measured_on_different_training_rows_from_all_lanes(shared_world: World, batch: int) -> None:
    """Whether the batch is smaller or larger than the number of rows."""
    (rows, draw), *rest = examples(shared_world, replace(RECIPE, batch=batch, samples=160), 40)
    assert not rest
    assert draw.rows == 40
    assert {name: len(column) for name, column in rows.items()} == dict.fromkeys(
        ("tokens", "image_embedding", "text_embedding"), 40
    )
    splits = {e.image_embedding.astype(np.float32).tobytes(): e for e in shared_world.examples.values()}
    found = [splits[embedding.numpy().tobytes()] for embedding in rows["image_embedding"]]
    assert {example.split for example in found} == {"train"}
    assert len({example.key for example in found}) >= 25  # of 58 that teach; a batch of 160 has most of them thrice
    assert len({example.key[:8] for example in found}) == 4


def measured_by_publishing(shared: World, recipe: DiffusionPriorRecipe, folder: Path, workers: int = 1) -> Examples:
    """The rows on which a worker of several measures a model that it publishes."""
    seen: list[Examples] = []
    task = DiffusionPriorTask(recipe.model, EMBED_DIM)
    measure = task.finish
    task.finish = lambda model, rows: seen.append(rows) or measure(model, rows)
    ctx = shared.context("diffusion_prior", recipe, KEEPING)
    feed = Feed(ctx.store, ctx.inputs, task, recipe, 0, workers)
    Results(ctx, task, feed, ProcessGroup(size=workers), Speed(0.0, 1.0)).save(task.model(0), folder)
    return seen[0]


def test_workers_and_the_stop_do_not_change_what_it_is_measured_on(shared_world: World, tmp_path: Path) -> None:
    (rows, draw), *_ = measured_by_publishing(shared_world, RECIPE, tmp_path)
    for other, workers in ((RECIPE, 2), (replace(RECIPE, samples=640), 1)):
        (again, again_draw), *_ = measured_by_publishing(shared_world, other, tmp_path, workers)
        assert all(torch.equal(column, again[name]) for name, column in rows.items())
        assert torch.equal(draw.normal("x", 3), again_draw.normal("x", 3))
    (_, seeded), *_ = measured_by_publishing(shared_world, replace(RECIPE, seed=1), tmp_path)
    assert not torch.equal(draw.normal("x", 3), seeded.normal("x", 3))
