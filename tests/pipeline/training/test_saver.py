"""Saving holds up no training, and happens as often as it costs next to nothing."""

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import CorruptObject
from pipeline.graph.stages import trajectory_key
from pipeline.settings import SPARED
from pipeline.store.records import blob_parts, put_blob, read_record
from pipeline.training import checkpoints as module
from pipeline.training import stage
from pipeline.training.checkpoints import Checkpoints, snapshot
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.recipes import DiffusionPriorRecipe
from pipeline.training.records import CheckpointRecord
from pipeline.training.saver import Saver
from pipeline.training.state import learning_rate
from tests.flips import flip_first_reads
from tests.pipeline.training.conftest import World
from tests.pipeline.training.trainings import MODEL, SETTINGS, make_state


def test_steps_go_on_while_the_store_takes_its_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first checkpoint is written when the 70th step has been taken. What was due meanwhile is left out; only the
    validation pass of the 64th step is saved then, and the end."""
    recipe = DiffusionPriorRecipe(samples=16 * 80, batch=16, lanes=8, model=MODEL)
    taken, written, publish, rate = threading.Event(), threading.Event(), Checkpoints.publish, learning_rate

    def slow(self: Checkpoints, *given: Any) -> None:
        assert taken.wait(60)
        publish(self, *given)
        written.set()

    def noted(recipe: Any, samples: int) -> float:
        if samples == 16 * 70:
            taken.set()
            assert written.wait(60)  # so that some of the steps that are left find the saver free
        return rate(recipe, samples)

    monkeypatch.setattr(Checkpoints, "publish", slow)
    monkeypatch.setattr("pipeline.training.train.learning_rate", noted)
    settings = replace(SETTINGS, checkpoint_every_s=1e-9, keep_checkpoints=9)
    ctx = world.context("diffusion_prior", recipe, settings)
    stage.train(ctx)
    entries = world.store.list(f"checkpoints/{trajectory_key(ctx)}/0")
    records = [read_record(world.store, entry.path, CheckpointRecord) for entry in entries]
    first, *between, last = [record.samples // 16 for record in records if record]
    assert (first, last) == (1, 80)
    assert len(between) == 1
    assert between[0] >= 70


def test_the_next_save_waits_for_longer_than_the_last_one_took(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pipeline.training.saver.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Checkpoints, "publish", lambda *_: now.__setitem__(0, now[0] + 2.0))
    checkpoints = Checkpoints(world.store, "t", 1)
    with Saver(checkpoints, ProcessGroup(), every_s=10.0) as saver:
        now[0] = 9.9
        assert not saver.late()
        now[0] = 10.0
        assert saver.late()
        saver.save(make_state(1))
        saver.wait()
        assert saver.free()
        for seconds, late in ((10.0 + 2 * SPARED - 0.1, False), (10.0 + 2 * SPARED, True)):
            now[0] = seconds
            assert saver.late() == late


def test_all_parts_of_a_checkpoint_are_stored_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3, timeout=60)

    def put(*given: Any, **named: Any) -> str:
        together.wait()
        return put_blob(*given, **named)

    monkeypatch.setattr(module, "put_blob", put)
    state = make_state(2)
    Checkpoints(world.store, "t", 1).publish(snapshot(state))
    assert Checkpoints(world.store, "t", 2).restore(make_state(), at_most=100)


def test_a_large_blob_is_read_in_parts_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as threads; a part that was read wrong is told at the end, and read well past caches."""
    monkeypatch.setattr("pipeline.store.records.PART_BYTES", 1000)
    data = bytes(range(256)) * 15 + b"the rest"
    blob = put_blob(world.store, data)
    together, read = threading.Barrier(4, timeout=60), type(world.store).read

    def meeting(*given: Any) -> bytes:
        together.wait()
        return read(*given)

    with monkeypatch.context() as patch:
        patch.setattr(type(world.store), "read", meeting)
        assert b"".join(blob_parts(world.store, blob, threads=4)) == data
    assert flip_first_reads(monkeypatch, world.store) == []
    with pytest.raises(CorruptObject, match="has other bytes"):
        list(blob_parts(world.store, blob, threads=4))
    assert b"".join(blob_parts(world.store.fresh(), blob, threads=4)) == data
    with pytest.raises(CorruptObject, match="is missing"):
        list(blob_parts(world.store, "0" * 64, threads=4))
