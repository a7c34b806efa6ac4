"""Looking on at a training: its progress line, and what a report shows of it while it runs."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Context, trajectory_key
from pipeline.settings import TrainingSettings
from pipeline.training.follow import following, showing, so_far
from pipeline.training.recipes import DecoderRecipe
from pipeline.training.stage import train
from tests.pipeline.training.conftest import World
from tests.pipeline.training.trainings import DECODER


def test_it_ends_where_the_workers_ended(capsys: pytest.CaptureFixture[str]) -> None:
    samples = iter([16, 32, 64])
    last = 64
    with following("decoder", 96, lambda: next(samples, last), every_s=0.01):
        pass
    assert "decoder: " in capsys.readouterr().err
    assert "follow" not in {thread.name for thread in threading.enumerate()}


def test_a_store_that_does_not_answer_ends_no_training(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> int:
        raise OSError("no route to the store")

    silent: Callable[[], int] = broken
    with caplog.at_level(logging.WARNING), following("decoder", 96, silent, every_s=0.01):
        pass
    assert "decoder: its progress cannot be shown any more: no route to the store" in caplog.text


def test_errors_of_the_training_pass_through() -> None:
    with pytest.raises(KeyError), following("decoder", 96, lambda: 0, every_s=0.01):
        raise KeyError("x")


def context(world: World, steps: int, seed: int) -> Context:
    """A decoder that is saved only after a validation pass and at its end."""
    recipe = DecoderRecipe(samples=16 * steps, batch=16, lanes=8, learning_rate=1e-3, seed=seed, model=DECODER)
    return world.context("decoder", recipe, TrainingSettings(threads=1, device="cpu", checkpoint_every_s=1e9))


def test_every_look_is_saved_and_shown(shared_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.train.FIRST_VALIDATION", 4)
    ctx = context(shared_world, steps=6, seed=1)
    assert so_far(ctx) is None
    shown: list[Artifact] = []
    with showing(replace(ctx, show=shown.append), every_s=0.2):
        made = train(ctx)
        while not shown or shown[-1].metrics["samples_seen"] < ctx.recipe.samples:
            time.sleep(0.01)
    saved = [e.path for e in ctx.store.list(f"checkpoints/{trajectory_key(ctx)}/0")]
    assert [int(path.rpartition("/")[2][:12]) for path in saved] == [4 * 16, 6 * 16]
    assert [artifact.metrics["samples_seen"] for artifact in shown[-2:]] == [4 * 16, 6 * 16][-len(shown) :]
    running = so_far(ctx)
    assert running is not None
    assert replace(running, times={}) == replace(shown[-1], times={})  # their times differ
    assert running.blobs == {name: b for name, b in made.blobs.items() if name.endswith((".png", ".jsonl"))}
    assert {"metrics.jsonl", "preview.png", "previews/000000000000.png"} <= set(running.blobs)
    assert {name: made.metrics[name] for name in running.metrics} == running.metrics
    assert running.recipe == made.recipe


def test_what_cannot_be_shown_for_a_while_is_shown_later(shared_world: World, caplog: pytest.LogCaptureFixture) -> None:
    shown: list[Artifact] = []

    def broken(running: Artifact) -> None:
        shown.append(running)
        if len(shown) < 3:
            raise OSError("the disk is full")

    ctx = context(shared_world, steps=2, seed=2)
    with caplog.at_level(logging.WARNING), showing(replace(ctx, show=broken), every_s=0.1):
        train(ctx)
        while len(shown) < 3:
            time.sleep(0.01)
    assert caplog.text.count("decoder: not shown in report and trackers for now: the disk is full") == 1
