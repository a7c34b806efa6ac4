"""map_shards in this process: what is there is not made again, counts balance, and damage and mistakes come through."""

import errno
import logging
import os
import pickle
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import (
    Artifact,
    Shard,
    ShardList,
    ShardRow,
    publish_shard,
    read_shards,
    write_shard_table,
)
from pipeline.graph.ray import start_ray
from pipeline.graph.shards import map_shards, run_shards
from pipeline.graph.shared import call_shared
from pipeline.graph.stages import Context
from pipeline.graph.workers import (
    Part,
    ShardOutput,
    ShardTask,
    Streamed,
    Timed,
    pack_part,
    publisher,
    read_answer,
    step,
)
from pipeline.ledger import Ledger
from pipeline.settings import EmbeddingsSettings, RaySettings, ShardSettings
from pipeline.store import Store, open_store
from pipeline.store.records import read_blob
from tests.counted import Counted


@dataclass(frozen=True)
class Recipe:
    value: int = 1


@dataclass
class Worker:
    """Keeps 10 rows a shard and rejects as many as its number, and remembers what it was asked."""

    asked: list[int] = field(default_factory=list)
    failure: Exception | None = None
    fails_at: int = -1

    def __call__(self, task: ShardTask) -> ShardOutput:
        self.asked.append(task.number)
        if task.number == self.fails_at and self.failure:
            raise self.failure
        ledger = Ledger(10, {"timeout": task.number} if task.number else {})
        return ShardOutput(ledger, {"data": f"shard {task.number}".encode()}, {"train/0": 10}, {"fetch": 2.5})


def _context(store: Store) -> Context:
    return Context(store, "pairs", 1, "the-key", Recipe(), ShardSettings(workers=0), {})


def _tasks(*numbers: int) -> list[ShardTask]:
    return [ShardTask(n, f"key-{n}", {}) for n in numbers]


def _never() -> Callable[[ShardTask], ShardOutput]:
    raise AssertionError("no worker is opened when there is nothing to do")


def test_every_shard_is_made_listed_and_counted(store: Store) -> None:
    worker = Worker()
    artifact = map_shards(_context(store), _tasks(2, 0, 100_000, 1), lambda: worker)
    assert worker.asked == [2, 0, 100_000, 1]
    shards = read_shards(store, artifact)
    assert [s.number for s in shards] == [0, 1, 2, 100_000]
    assert [read_blob(store, s.blobs["data"]) for s in shards[:2]] == [b"shard 0", b"shard 1"]
    assert artifact.ledger == Ledger(40, {"timeout": 100_003})
    assert {s.kept for s in shards} == {s.counts["train/0"] for s in shards} == {10}
    assert artifact.metrics == {"shards": 4}
    assert artifact.times["shards_made"] == 4


def test_what_is_there_is_not_made_again(store: Store) -> None:
    map_shards(_context(store), _tasks(0, 1), Worker)
    worker = Worker()
    store.delete(["artifacts/pairs/the-key.json"])
    artifact = map_shards(_context(store), _tasks(0, 1, 2), lambda: worker)
    assert worker.asked == [2]
    assert artifact.times["shards_made"] == 1
    store.delete(["artifacts/pairs/the-key.json"])
    assert len(read_shards(store, map_shards(_context(store), _tasks(0, 1, 2), _never))) == 3


def test_what_the_work_took_is_written_down_and_is_no_part_of_the_shards(store: Store) -> None:
    map_shards(_context(store), _tasks(0), Worker)
    store.delete(["artifacts/pairs/the-key.json"])
    artifact = map_shards(_context(store), _tasks(0, 1, 2), Worker)
    took = artifact.times
    assert took["workers"] == 1
    assert took["fetch_seconds"] == 2 * 2.5  # shard 0 was there
    assert took["made_rows"] == 11 + 12
    assert took["written_bytes"] == len(b"shard 1" + b"shard 2")
    assert 0 < took["write_seconds"] <= took["busy_seconds"]
    assert took["busy_seconds"] + took["wait_seconds"] <= took["made_seconds"] <= took["seconds"]
    assert b"fetch" not in b"".join(store.read(entry.path) for entry in store.list("shards/"))


def test_the_work_of_all_passes_counts(store: Store) -> None:
    ctx = _context(store)
    run_shards(ctx, _tasks(7, 8, 9), Worker, "rows", 30)
    took = map_shards(ctx, _tasks(0, 1), Worker).times
    assert (took["workers"], took["shards_made"]) == (1, 2)
    assert took["fetch_seconds"] == 5 * 2.5
    assert took["made_rows"] == 17 + 18 + 19
    assert took["written_bytes"] == 5 * len(b"shard 0")


def test_workers_count_for_rays_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util import metrics

    counted: dict[tuple[str, str], float] = {}

    class Spy(metrics.Counter):
        def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
            super().inc(value, tags)  # refuses unknown tags and what is not above 0
            name = self.info["name"], "/".join((tags or {}).values())
            counted[name] = counted.get(name, 0.0) + value

    monkeypatch.setattr(metrics, "Counter", Spy)
    made = publisher(open_store("never-written"), "pairs", dict, alone=True)()
    work = {"busy_seconds": 3.0, "wait_seconds": 0.0, "fetch_seconds": 2.5, "written_bytes": 7}
    for _ in range(2):
        made.count(Shard(1, "key-1", Ledger(10, {"timeout": 1, "truncated": 0})), work)
    assert counted == {
        ("unclip_rows", "pairs/kept"): 20,
        ("unclip_rows", "pairs/timeout"): 2,
        ("unclip_worker_seconds", "pairs/busy"): 6.0,
        ("unclip_worker_seconds", "pairs/fetch"): 5.0,
        ("unclip_written_bytes", "pairs"): 14,
    }


def test_the_shard_of_another_driver_is_adopted(store: Store) -> None:
    """It appears after the list of what is there was read, and before this worker comes to it."""

    class Overtaken(Worker):
        def __call__(self, task: ShardTask) -> ShardOutput:
            theirs = Ledger(7)
            for number in {0, 1} - {task.number}:
                publish_shard(store, "pairs", number, f"key-{number}", theirs, {"data": b"theirs"}, {"train/0": 7})
            return super().__call__(task)

    worker = Overtaken()
    artifact = map_shards(_context(store), _tasks(0, 1), lambda: worker)
    assert worker.asked == [0]
    assert [s.kept for s in read_shards(store, artifact)] == [10, 7]


@pytest.mark.parametrize("failure", [UserError("mend this"), CorruptObject("blobs/ab/abc", "is missing")])
def test_a_failure_keeps_what_was_made_and_publishes_nothing(store: Store, failure: Exception) -> None:
    worker = Worker(failure=failure, fails_at=1)
    with pytest.raises(type(failure)):
        map_shards(_context(store), _tasks(0, 1, 2), lambda: worker)
    assert [entry.path for entry in store.list("artifacts/")] == []
    again = Worker()
    map_shards(_context(store), _tasks(0, 1, 2), lambda: again)
    assert again.asked == [1, 2]


def test_failures_travel_from_a_ray_worker_as_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.graph.workers._counting_deaths", lambda *_, **__: nullcontext())  # no Ray here

    def answer(failure: Exception) -> bytes:
        worker = Worker(failure=failure, fails_at=0)
        make = publisher(open_store("never-written"), "pairs", lambda: lambda task, made: worker(task), alone=True)()
        [data] = make({"part": [pickle.dumps(Part(ShardTask(0, "key-0", {})))]})["answer"]
        return data

    with pytest.raises(UserError, match=r"^mend this$"):
        read_answer(answer(UserError("mend this")))
    with pytest.raises(CorruptObject, match=r"^blobs/ab/abc: is missing$") as caught:
        read_answer(answer(CorruptObject("blobs/ab/abc", "is missing")))
    assert caught.value.path == "blobs/ab/abc"
    with pytest.raises(ZeroDivisionError):
        answer(ZeroDivisionError())
    with pytest.raises(UserError, match=r"^pairs: the disk of /.* is full \(TMPDIR\); free space and run"):
        read_answer(answer(OSError(errno.ENOSPC, "No space left on device")))


@pytest.mark.parametrize("at", ["opening", "work"])
def test_damage_that_a_step_of_a_stream_finds_is_the_answer_to_its_shard(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a damaged CLIP or view: Ray would say that its process died."""
    monkeypatch.setattr("pipeline.graph.workers._counting_deaths", lambda *_, **__: nullcontext())  # no Ray here

    def damaged(*_: object) -> Any:
        raise CorruptObject("blobs/ab/abc", "is damaged")

    store, open_it = open_store("never-written"), damaged if at == "opening" else lambda: damaged
    [part] = step("pairs", lambda _: 1, open_it, True)()(pack_part(Part(ShardTask(0, "key-0", {}))))["part"].to_pylist()
    for join in (lambda: _join, damaged):
        [data] = publisher(store, "pairs", join, alone=False)()({"part": [part]})["answer"]
        with pytest.raises(CorruptObject, match="is damaged"):
            read_answer(data)


def test_nothing_to_map_is_an_empty_artefact(store: Store) -> None:
    artifact = map_shards(_context(store), [], _never)
    assert artifact.ledger.rows == 0
    assert read_shards(store, artifact) == []


def test_a_listing_decides_and_records_are_read_last(store: Store) -> None:
    map_shards(_context(store), _tasks(0, 1), Worker)
    store.delete(["artifacts/pairs/the-key.json"])
    counted: Any = Counted(store)

    class Looking(Worker):
        def __call__(self, task: ShardTask) -> ShardOutput:
            seen.append(counted.calls["read"])
            return super().__call__(task)

    seen: list[int] = []
    map_shards(_context(counted), _tasks(0, 1, 2), Looking)
    assert seen == [1]  # the look whether another driver has made this one meanwhile
    assert (counted.calls["list"], counted.calls["read"]) == (1, 3)


@pytest.mark.parametrize("count", [0, 1, 400])
def test_listed_shards_are_those_that_were_written(tmp_path: Path, count: int) -> None:
    """By place and by number, from several threads; with names that only some have, in any order."""
    store = open_store(str(tmp_path))
    rare = {"rare": "f" * 64, "note.time": "e" * 64}
    blobs = [{"data": f"{n:064x}"} | (rare if n % 7 == 3 else {}) for n in range(count)]
    shards = [Shard(3 * n, f"key-{n}", Ledger(n), blobs[n], {f"train/{n % 2}": n}) for n in range(count)]
    table, ledger = write_shard_table(store, shards)
    assert (table, ledger) == write_shard_table(store, iter(shards[::-1]))
    assert ledger == Ledger(sum(range(count)))
    made = Artifact("pairs", "k", {}, {}, ledger, shard_table=table)
    listed, read = ShardList(store, made), read_shards(store, made)
    assert len(listed) == len(read) == count
    for row, shard in zip(read, shards, strict=True):
        assert (row.number, row.key, row.kept, row.lost) == (shard.number, shard.key, shard.ledger.kept, 0)
        assert row.blobs == {name: blob for name, blob in shard.blobs.items() if not name.startswith("note.")}
        assert +Counter(row.counts) == +Counter(shard.counts)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(listed.__getitem__, range(count))) == read
        assert list(pool.map(listed.find, range(0, 3 * count, 3))) == read
    assert [listed.find(number) for number in (-1, 1, 3 * count)] == [None] * 3
    for name in ("train/0", "train/1", "train/2"):
        assert listed.counts(name).tolist() == [row.counts.get(name, 0) for row in read]
    for place in (-1, count):
        with pytest.raises(IndexError):
            listed[place]


def _count(task: ShardTask) -> int:
    return task.number % 3 + 1


def _prepare(task: ShardTask, part: int) -> Timed:
    arrays = np.full((2, 1 << 20), part, np.uint8), np.zeros((0, 7))
    return (f"{task.number}.{part}", os.getpid(), *arrays), {"read": 1.0}


class Worked:
    """Works on parts. Another process's array is read where it lies."""

    def __call__(self, task: ShardTask, part: int, prepared: tuple[str, int, np.ndarray, np.ndarray]) -> Timed:
        name, prepared_by, array, empty = prepared
        assert (array == part).all()
        assert empty.shape == (0, 7)
        assert array.flags.writeable == (prepared_by == os.getpid())
        return f"<{name}>", {"encode": 2.0}


def _join(task: ShardTask, made: Sequence[str]) -> ShardOutput:
    return ShardOutput(Ledger(kept=len(made)), {"data": "".join(made).encode()}, seconds={"pack": 4.0})


STREAM = Streamed(_count, _prepare, Worked, _join)


@pytest.fixture(scope="module")
def two_cores() -> Iterator[Any]:
    """A Ray of two cores."""
    ray = start_ray(RaySettings(cpus=2))
    yield ray
    ray.shutdown()


@pytest.mark.usefixtures("two_cores")
def test_a_stream_makes_what_one_worker_makes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Shards of one to three parts, in two operators; on two cores one worker with a decoder has room."""
    shards, took = [], []
    for settings in (EmbeddingsSettings(workers=0), EmbeddingsSettings(workers=2, decoders=1)):
        store = open_store(str(tmp_path / f"{settings.decoders}"))
        with caplog.at_level(logging.INFO, "unclip"):
            artifact = map_shards(replace(_context(store), settings=settings), _tasks(*range(7)), STREAM)
        assert artifact.times["workers"] == 1
        shards.append([(shard.key, dict(shard.blobs)) for shard in read_shards(store, artifact)])
        took.append({name: artifact.times[f"{name}_seconds"] for name in ("read", "encode", "pack")})
        assert read_blob(store, read_shards(store, artifact)[2].blobs["data"]) == b"<2.0><2.1><2.2>"
    assert shards[0] == shards[1]
    assert took[0] == took[1] == {"read": 13.0, "encode": 26.0, "pack": 28.0}
    assert "run.pairs.workers: 2 requested, with room for 1; continuing with 1" in caplog.messages


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("decoders", [0, 1])
def test_a_worker_without_a_gpu_sees_none(decoders: int, store: Store) -> None:
    """Ray hides them only from one that has others: "auto" would open a CLIP per core on the first GPU."""

    def see() -> Callable[..., Timed]:
        seen = repr(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return lambda *_: (seen, {})

    ctx = replace(_context(store), settings=EmbeddingsSettings(workers=1, decoders=decoders))
    [shard], _ = run_shards(ctx, _tasks(0), Streamed(lambda _: 1, _prepare, see, _join), "rows", 1)
    assert read_blob(store, shard.blobs["data"]) == b"''"


@dataclass
class Deadly(Worker):
    """Kills its process at shard 1, and writes that down."""

    log: Path = Path()

    def __call__(self, task: ShardTask) -> ShardOutput:
        if task.number == 1:
            with open(self.log, "a") as file:
                file.write("dead\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(task)


@pytest.mark.usefixtures("two_cores")
def test_a_shard_that_kills_every_worker_ends_with_one_line(tmp_path: Path) -> None:
    """Which names it and its rows; the others are made, and the same command goes on with them."""
    store = open_store(str(tmp_path / "store"))
    tasks = [ShardTask(n, f"key-{n}", {"source": ShardRow(n, f"source-{n}", 240, 10, {}, {})}) for n in (0, 1, 2)]
    ctx = replace(_context(store), settings=ShardSettings(workers=1))
    with pytest.raises(UserError) as caught:
        map_shards(ctx, tasks, partial(Deadly, log=tmp_path / "log"))
    said = str(caught.value)
    assert said.startswith("pairs: shard 1 (250 rows, whose keys begin with 00000001) killed 3 workers;")
    assert "\n" not in said
    assert (tmp_path / "log").read_text() == "dead\n" * 3
    artifact = map_shards(_context(store), tasks, Worker)
    assert artifact.ledger.rows == 10 + 11 + 12


class Notes:
    def __init__(self) -> None:
        self.kept: list[str] = []

    def add(self, note: str) -> list[str]:
        self.kept.append(note)
        return self.kept


class Caller:
    def tell(self, note: str) -> list[str] | None:
        return call_shared(Notes, "add", note)


def test_workers_share_one_object_and_begin_anew_when_it_is_gone(two_cores: Any) -> None:
    ray = two_cores
    first, second = (ray.remote(Caller).options(num_cpus=0).remote() for _ in range(2))
    assert ray.get(first.tell.remote("a")) == ["a"]
    assert ray.get(second.tell.remote("b")) == ["a", "b"]
    assert ray.get(first.tell.remote("c")) == ["a", "b", "c"]
    ray.kill(first)  # which asked first, so that the object ends, too
    told: list[str] | None = None
    while not told or "a" in told:
        told = ray.get(second.tell.remote("d"))
    assert set(told) == {"d"}
