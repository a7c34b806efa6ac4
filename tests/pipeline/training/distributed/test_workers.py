"""Workers as processes: what they read of a checkpoint, how many rows they compute at once, and how they end."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from models.clip import Clip
from pipeline.graph.artifacts import Artifact
from pipeline.training import memory, stage
from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask
from tests.pipeline.training.conftest import World, make_world
from tests.pipeline.training.distributed.notes import lines, noting
from tests.pipeline.training.trainings import (
    CLIP_RECIPE,
    PRIOR_RECIPE,
    SETTINGS,
    assert_equal_trainings,
    made,
    train_together,
)


def noting_and_hungry(folder: Path, rank: int) -> None:
    """The second worker has no memory for more than three rows, and is told so as a GPU tells it."""
    noting(folder, rank)
    memory.refuses = lambda device: True
    loss = DiffusionPriorTask.loss

    def hungry(self: Any, model: Any, batch: Any, draw: Any) -> Any:
        losses = loss(self, model, batch, draw)
        if rank == 1 and draw.rows > 3:
            torch.empty(1 << 50, dtype=torch.uint8)
        return losses

    DiffusionPriorTask.loss = hungry


def test_the_first_worker_reads_a_checkpoint_and_all_compute_as_many_rows_as_fit(
    world: World, straight: tuple[World, Artifact], tmp_path: Path
) -> None:
    """From a checkpoint of one process: what comes out is what one process trains."""
    stage.train(world.context("diffusion_prior", replace(PRIOR_RECIPE, samples=16), SETTINGS))
    ctx = world.context("diffusion_prior", PRIOR_RECIPE, replace(SETTINGS, workers=2))
    train_together(ctx, tmp_path, partial(noting_and_hungry, tmp_path))
    assert [len(lines(tmp_path / f"read-{rank}")) for rank in (0, 1)] == [3, 0]
    assert [lines(tmp_path / f"rows-{rank}")[:2] for rank in (0, 1)] == [["8", "4"]] * 2  # of a share of eight
    assert [set(lines(tmp_path / f"rows-{rank}")[2:]) for rank in (0, 1)] == [{"2"}] * 2
    assert_equal_trainings((world, made(world, ctx)), straight)


def hungry_clip(folder: Path, rank: int) -> None:
    """No worker has memory for more than three captions at once."""
    memory.refuses = lambda device: True
    encode = Clip.encode_text

    def hungry(self: Any, tokens: Any) -> Any:
        if self.training:
            with open(folder / f"rows-{rank}", "a") as out:
                out.write(f"{len(tokens)}\n")
            if len(tokens) > 3:
                torch.empty(1 << 50, dtype=torch.uint8)
        return encode(self, tokens)

    Clip.encode_text = hungry


def test_a_contrastive_loss_encodes_as_many_rows_as_fit_and_compares_all(world: World, tmp_path: Path) -> None:
    """Of unequal shares, 7 and 8 rows of 15."""
    recipe, inputs = replace(CLIP_RECIPE, samples=60, batch=15), ("pairs", "captions", "filter")
    ctx = world.context("clip", recipe, replace(SETTINGS, workers=2), inputs)
    train_together(ctx, tmp_path, partial(hungry_clip, tmp_path))
    assert [lines(tmp_path / f"rows-{rank}")[:2] for rank in (0, 1)] == [["8", "4"]] * 2
    assert [set(lines(tmp_path / f"rows-{rank}")[2:]) for rank in (0, 1)] == [{"1", "2"}, {"2"}]
    straight = make_world(tmp_path / "straight")
    expected = stage.train(straight.context("clip", recipe, SETTINGS, inputs))
    assert_equal_trainings((world, made(world, ctx)), (straight, expected))


def out_of_memory_later(rank: int) -> None:
    """The second worker runs out of memory in its third step, while the first waits for its gradients."""
    loss, calls = DiffusionPriorTask.loss, []

    def hungry(self: Any, model: Any, batch: Any, draw: Any) -> Any:
        calls.append(model.training)
        if rank == 1 and sum(calls) == 3:
            torch.empty(1 << 50, dtype=torch.uint8)
        return loss(self, model, batch, draw)

    DiffusionPriorTask.loss = hungry


@pytest.mark.timeout(180)
def test_where_one_worker_runs_out_of_memory_no_other_waits_for_it(world: World, tmp_path: Path) -> None:
    """Each ends by itself; what starts them ends nobody."""
    ctx = world.context("diffusion_prior", PRIOR_RECIPE, replace(SETTINGS, workers=2))
    started = train_together(ctx, tmp_path, out_of_memory_later, join=False)
    for process in started.processes:
        process.join(60)
    assert [process.exitcode for process in started.processes] == [1, 1]
    said = [Path(file).read_bytes().decode(errors="replace") for file in started.error_files]
    assert "OutOfMemory" in said[1]
    for file in started.error_files:
        Path(file).unlink()
