"""Checkpoints: what is saved comes back, damage costs one checkpoint, and attempts fence each other."""

import logging
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from models.prior_configs import DiffusionPriorConfig
from pipeline.errors import Superseded
from pipeline.store import Store
from pipeline.store.records import blob_path, read_record
from pipeline.training.checkpoints import Checkpoints, last_attempt, snapshot, take_attempt
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.records import CheckpointRecord
from pipeline.training.state import TrainState, begin, parts
from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask
from tests.conftest import folder_store
from tests.flips import flip_first_reads
from tests.pipeline.store.objects import CHECKPOINT, forge
from tests.pipeline.training.trainings import MUON_RECIPE, make_state
from tests.pipeline.upkeep.runs import released

store = folder_store  # stores are alike, and some tests here look at both


def save(checkpoints: Checkpoints, state: TrainState) -> None:
    checkpoints.publish(snapshot(state))


def same(a: TrainState, b: TrainState) -> bool:
    pairs = [(parts(a)[name], parts(b)[name]) for name in parts(a)]
    equal = all(x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in pairs)
    return equal and a.samples == b.samples and a.journal == b.journal


def test_a_state_comes_back_bit_by_bit(make_store: Callable[[], Store]) -> None:
    store = make_store()
    state, other = make_state(steps=3), make_state()
    state.journal.flush(state.samples)
    state.journal.add({"loss": 1 / 3})
    save(Checkpoints(store, "t", 1), state)
    assert Checkpoints(store, "t", 2).restore(other, at_most=100)
    assert same(state, other)


def test_the_newest_up_to_the_stop_wins(store: Store) -> None:
    checkpoints = Checkpoints(store, "t", 1, keep=5)
    for steps in (1, 2, 3):
        save(checkpoints, make_state(steps))
    state = make_state()
    assert checkpoints.restore(state, at_most=47)
    assert state.samples == checkpoints.newest(47) == 32


Damage = Callable[[Store, str], None]


def _cut_record(store: Store, path: str) -> None:
    data = store.read(path)
    store.delete([path])
    store.create(path, data[: len(data) // 2])


def _cut_blob(store: Store, path: str) -> None:
    blob = blob_path(read_record(store, path, CheckpointRecord).blobs["optimizer"])
    data = store.read(blob)
    store.delete([blob])
    store.create(blob, data[:-1] + bytes([data[-1] ^ 1]))


def _lose_blob(store: Store, path: str) -> None:
    store.delete([blob_path(read_record(store, path, CheckpointRecord).blobs["model"])])


@pytest.mark.parametrize("damage", [_cut_record, _cut_blob, _lose_blob])
def test_a_damaged_one_is_skipped_with_a_warning_and_stays(
    store: Store, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(store, "t", 1)
    save(checkpoints, make_state(1))
    save(checkpoints, make_state(2))
    newest = sorted(entry.path for entry in store.list("checkpoints/t/0"))[-1]
    damage(store, newest)
    before = list(store.list(""))
    state, later = make_state(), Checkpoints(store, "t", 2)
    with caplog.at_level(logging.WARNING):
        assert later.restore(state, at_most=100)
    assert same(state, make_state(1))
    (warning,) = caplog.records
    assert warning.getMessage().startswith("checkpoint at sample 32 is skipped, and the one before it is used: ")
    assert list(store.list("")) == before  # another machine may be able to read it
    save(later, make_state(2))  # and its work can be done again, with the very same state
    assert Checkpoints(store, "t", 3).restore(state, at_most=100)
    assert same(state, make_state(2))


def test_one_read_that_went_wrong_costs_no_checkpoint(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a record, and of a blob, as this process first reads them."""
    checkpoints = Checkpoints(store, "t", 1)
    save(checkpoints, make_state(1))
    save(checkpoints, make_state(2))
    flipped = flip_first_reads(monkeypatch, store)
    state = make_state()
    assert checkpoints.restore(state, at_most=100)
    assert same(state, make_state(2))
    assert any(path.startswith("checkpoints/t/") for path in flipped)
    assert sum(path.startswith("blobs/") for path in flipped) == 3
    assert not caplog.records


@pytest.mark.parametrize("place", [0, 7, 8, 9, 40, 2000])  # the length of the header, and what it says
def test_a_damaged_header_is_damage_like_any_other(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    """Of several parts, too; whatever it seems to say, the blob is read again, or the checkpoint skipped."""
    monkeypatch.setattr("pipeline.store.records.PART_BYTES", 1000)  # the header has 2,720
    checkpoints = Checkpoints(store, "t", 1)
    for steps in (1, 2):
        save(checkpoints, make_state(steps))
    newest = sorted(entry.path for entry in store.list("checkpoints/t/0"))[-1]
    blob = blob_path(read_record(store, newest, CheckpointRecord).blobs["model"])
    data = bytearray(store.read(blob))
    data[place] ^= 0x55
    state, sound = make_state(), store.read
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "read", lambda self, path, *where: (
            bytes(data)[slice(*where)] if (self, path) == (store, blob) else sound(path, *where)
        ))  # fmt: skip
        assert checkpoints.restore(state, at_most=100)
    assert same(state, make_state(2))
    assert not caplog.records
    store.delete([blob])
    store.create(blob, bytes(data))
    assert checkpoints.restore(state, at_most=100)
    assert same(state, make_state(1))
    assert "is skipped" in caplog.text


def test_a_blob_is_never_in_memory_as_a_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restore takes the memory of the state that it returns, not of its blobs and of copies out of them, too."""
    monkeypatch.setattr("pipeline.store.records.PART_BYTES", 64 << 10)
    recipe = replace(MUON_RECIPE, model=DiffusionPriorConfig(width=256, depth=2, heads=1))
    state = begin(DiffusionPriorTask(recipe.model, 4), recipe, ProcessGroup())
    state.samples = 16
    save(Checkpoints(store, "t", 1), state)
    largest = max(entry.size for entry in store.list("blobs/"))
    tracemalloc.start()  # counts bytes objects, and not what tensors themselves have
    try:
        assert Checkpoints(store, "t", 2).restore(state, at_most=100)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < largest / 4


def test_damaged_ones_do_not_push_out_what_is_made_in_their_place(store: Store) -> None:
    first = Checkpoints(store, "t", 1, keep=2)
    for steps in (1, 2, 3):
        save(first, make_state(steps))
    for entry in list(store.list("checkpoints/t/0")):
        if "000000000016" not in entry.path:
            _lose_blob(store, entry.path)
    second = Checkpoints(store, "t", 2, keep=2)
    assert not second.restore(make_state(), at_most=100)
    state = make_state(1)
    save(second, state)
    assert Checkpoints(store, "t", 3).restore(state, at_most=100)
    assert state.samples == 16


def test_an_unreadable_record_saves_the_blobs_that_it_may_name(store: Store) -> None:
    checkpoints = Checkpoints(store, "t", 1, keep=2)
    for steps in (1, 2):
        save(checkpoints, make_state(steps))
    blobs = {entry.path for entry in store.list("blobs/")}
    _cut_record(store, "checkpoints/t/000000000032-0001.json")
    save(checkpoints, make_state(3))
    assert [entry.path for entry in store.list("checkpoints/t/0")] == [
        "checkpoints/t/000000000032-0001.json", "checkpoints/t/000000000048-0001.json",
    ]  # fmt: skip
    assert blobs <= {entry.path for entry in store.list("blobs/")}


def test_old_ones_go_with_their_blobs(make_store: Callable[[], Store]) -> None:
    store = make_store()
    checkpoints = Checkpoints(store, "t", 1, keep=2)
    for steps in (1, 2, 3, 4):
        save(checkpoints, make_state(steps))
    records = [read_record(store, entry.path, CheckpointRecord) for entry in store.list("checkpoints/t/0")]
    assert [record.samples for record in records if record] == [48, 64]
    named = {blob_path(blob) for record in records if record for blob in record.blobs.values()}
    assert {entry.path for entry in store.list("blobs/")} == named


def test_trajectories_share_no_blobs(store: Store) -> None:
    for trajectory in ("t", "u"):
        save(Checkpoints(store, trajectory, 1, keep=1), make_state(1))
    save(Checkpoints(store, "t", 1, keep=1), make_state(2))
    assert Checkpoints(store, "u", 1).restore(make_state(), at_most=100)


def test_a_later_attempt_stops_an_earlier_one(store: Store) -> None:
    first, second = take_attempt(store, "t"), take_attempt(store, "t")
    assert (first, second, last_attempt(store, "t"), last_attempt(store, "u")) == (1, 2, 2, 0)
    save(Checkpoints(store, "t", second), make_state(1))
    with pytest.raises(Superseded, match="attempt 1 of this training stops: attempt 2 has begun"):
        save(Checkpoints(store, "t", first), make_state(2))
    assert Checkpoints(store, "t", second).newest(100) == 16


def test_the_number_of_an_attempt_has_bytes_of_its_own(store: Store) -> None:
    """Of two that send equal ones and whose answers are lost, S3 could not tell who was first."""
    for trajectory in "tu":
        take_attempt(store, trajectory)
    assert len({store.read(f"checkpoints/{trajectory}/attempts/0001.json") for trajectory in "tu"}) == 2


def test_an_overtaken_attempt_deletes_nothing_of_its_successor(store: Store) -> None:
    old, new = Checkpoints(store, "t", 1, keep=1), Checkpoints(store, "t", 2, keep=1)
    save(old, make_state(1))
    save(new, make_state(2))
    old._prune(100)
    assert new.newest(100) == 32
    assert new.restore(make_state(), at_most=100)


def test_a_forged_record_deletes_nothing_of_a_release_or_of_another_training(store: Store) -> None:
    save(Checkpoints(store, "u", 1), make_state(1))
    other = read_record(store, "checkpoints/u/000000000016-0001.json", CheckpointRecord)
    assert other
    blobs = released(store)["decoder"].blobs | {**other.blobs} | {"none": "0" * 64}
    forge(store, "checkpoints/t/000000000000-0001.json", CHECKPOINT | {"samples": 0, "blobs": blobs})
    checkpoints = Checkpoints(store, "t", 1, keep=1)
    for steps in (1, 2):
        save(checkpoints, make_state(steps))
    assert [entry.path for entry in store.list("checkpoints/t/0")] == ["checkpoints/t/000000000032-0001.json"]
    kept = {entry.path for entry in store.list("blobs/")}
    assert {blob_path(blob) for blob in blobs.values()} - kept == {blob_path("0" * 64)}
