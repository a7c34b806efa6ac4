"""Stages one after another, and trainings side by side: who waits for whom, what a failure costs, and what is shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from threading import Barrier, Event, Thread, current_thread, main_thread
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import Run
from pipeline.errors import CorruptObject, UserError
from pipeline.graph import execute as execution
from pipeline.graph.artifacts import Artifact, artifact_path, publish_artifact
from pipeline.graph.execute import execute
from pipeline.graph.plan import plan
from pipeline.graph.stages import Context, Graph, Kind, Stage, stage_key, trunk_key
from pipeline.ledger import Ledger
from pipeline.settings import ShardSettings, TrainingSettings
from pipeline.store import Store, open_store
from pipeline.store.records import blob_path, put_blob

WAIT_S = 20.0  # for what must come, or the test fails
INPUTS = {
    "source": (),
    "curation": ("source",),
    "codec": ("curation",),
    "ar_prior": ("curation", "codec"),
    "decoder": ("curation",),
    "upsampler": ("curation",),
    "bundle": ("ar_prior", "decoder", "upsampler"),
}
TRAININGS = ("ar_prior", "decoder", "upsampler")
Does = Callable[[Context], None]


@dataclass(frozen=True)
class Recipe:
    samples: int = 1
    decay: int = 0
    batch: int = 8
    splitting = ()  # of the source


@dataclass
class House:
    """A graph whose stages note what they did, and an executor of it. ``does``: what a stage does besides."""

    store: Store
    does: dict[str, Does] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    looks: list[set[str]] = field(default_factory=list)  # what was shown of trainings that ran
    checks: dict[str, Does] = field(default_factory=dict)
    here: set[str] = field(default_factory=set)  # what ran in the main thread
    seconds: dict[str, float] = field(default_factory=dict)  # estimates

    def run(self, ctx: Context) -> Artifact:
        if current_thread() is main_thread():
            self.here.add(ctx.stage)
        self.does.get(ctx.stage, lambda _: None)(ctx)
        blobs = {"made": put_blob(self.store, f"{ctx.stage} of {sorted(ctx.inputs)}".encode())}
        return publish_artifact(self.store, ctx.publishable(ledger=Ledger(), blobs=blobs), 0.0)

    def graph(self) -> Graph:
        kinds: dict[str, Kind] = {"source": "source", **dict.fromkeys(TRAININGS, "training")}
        return {
            n: Stage(n, 1, Recipe(), i, self.run, kinds.get(n, "data"), check=self.checks.get(n))
            for n, i in INPUTS.items()
        }

    def execute(self, workers: int = 1) -> dict[str, Artifact]:
        settings = {name: TrainingSettings(workers=workers) for name in TRAININGS}
        graph = {n: replace(stage, settings=settings.get(n, ShardSettings())) for n, stage in self.graph().items()}
        config = SimpleNamespace(project="p", run=Run())
        verdicts = plan(graph, {"source": "s"}, "p", self.store, {})

        def on_look(running: Sequence[Artifact], artifacts: Mapping[str, Artifact]) -> None:
            self.looks.append({each.stage for each in running})

        on_stage = lambda stage, made: self.done.append(stage)  # noqa: E731
        return execute(graph, verdicts, set(INPUTS), self.store, config, self.seconds, on_stage, on_look)


@pytest.fixture
def house(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> House:
    """Ray has room for everything."""
    monkeypatch.setattr(execution, "room_beside", lambda stages, *_: list(stages))
    monkeypatch.setattr(execution, "start_ray", lambda _: None)
    return House(open_store(str(tmp_path)))


def test_trainings_run_at_once_and_give_what_they_give_one_after_another(house: House, tmp_path: Any) -> None:
    met = Barrier(3, timeout=WAIT_S)
    house.does = dict.fromkeys(TRAININGS, lambda _: met.wait())
    made = house.execute()
    assert list(made) == list(INPUTS)
    assert house.here == set(INPUTS) - set(TRAININGS)
    assert house.done[:3] == ["source", "curation", "codec"]
    assert house.done[-1] == "bundle"
    alone = House(open_store(str(tmp_path / "alone")))
    assert {n: (a.key, a.blobs) for n, a in alone.execute(workers=0).items()} == {
        n: (a.key, a.blobs) for n, a in made.items()
    }
    assert (alone.done, alone.here) == (list(INPUTS), set(INPUTS))
    assert house.execute() == made
    assert len(house.done) == len(INPUTS)  # nothing is made twice


def test_a_training_that_has_no_room_yet_begins_when_there_is_some(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one that runs, as soon as a look finds room, or after another one has ended."""
    monkeypatch.setattr(execution, "LOOK_S", 0.01)
    begun, room = Event(), iter([["ar_prior", "decoder"], [], [], ["upsampler"]])
    monkeypatch.setattr(execution, "room_beside", lambda *_: next(room))
    wait: Does = lambda _: pytest.fail("never began") if not begun.wait(WAIT_S) else None  # noqa: E731
    house.does = {"ar_prior": wait, "decoder": wait, "upsampler": lambda _: begun.set()}
    assert list(house.execute()) == list(INPUTS)


def test_what_takes_longest_is_asked_for_first(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(execution, "room_beside", lambda stages, *_: asked.append(list(stages)) or list(stages))
    house.seconds = {"ar_prior": 10.0, "decoder": 30.0, "upsampler": 20.0}
    assert list(house.execute()) == list(INPUTS)
    assert asked == [["decoder", "upsampler", "ar_prior"]]


@pytest.mark.parametrize("rooms", [[], [["ar_prior", "decoder"], []]], ids=["at once", "one waits for room"])
def test_one_that_fails_does_not_stop_the_others(
    house: House, rooms: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter(rooms)
    monkeypatch.setattr(execution, "room_beside", lambda stages, *_: next(found, list(stages)))
    failed = Event()

    def fail(_: Context) -> None:
        failed.set()
        raise UserError("decoder: mend this")

    def wait(_: Context) -> None:
        assert failed.wait(WAIT_S)

    house.does = {"decoder": fail, "ar_prior": wait}
    with pytest.raises(UserError, match=r"^decoder: mend this$"):
        house.execute()
    assert set(house.done) == {"source", "curation", "codec", "ar_prior", "upsampler"}
    house.done.clear()
    house.does = {}
    assert list(house.execute()) == list(INPUTS)
    assert house.done == ["decoder", "bundle"]


def test_one_that_cannot_be_made_ends_the_run_before_others_begin(house: House) -> None:
    """Such as an upsampler without large images, which comes last and needs only what came first."""

    def refuse(ctx: Context) -> None:
        raise UserError(f"{ctx.stage}: none of {sorted(ctx.inputs)} is large enough")

    house.checks["upsampler"] = refuse
    with pytest.raises(UserError, match=r"upsampler: none of .'curation'. is large enough"):
        house.execute(workers=0)
    assert house.done == ["source", "curation"]


@pytest.mark.parametrize("workers", [0, 1])
def test_one_that_runs_alone_ends_the_run(house: House, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "room_beside", lambda *_: [])

    def fail(_: Context) -> None:
        raise UserError("decoder: mend this")

    house.does = {"decoder": fail}
    with pytest.raises(UserError, match=r"^decoder: mend this$"):
        house.execute(workers)
    assert house.done == ["source", "curation", "codec", "ar_prior"]
    assert house.here == {*house.done, "decoder"} - (set(TRAININGS) if workers else set())  # without room, too


def test_damage_ends_the_run_after_the_others_have_ended(house: House) -> None:
    ended, raised = Event(), Event()

    def damaged(ctx: Context) -> None:
        raised.set()
        path = blob_path(ctx.inputs["curation"].blobs["made"])
        raise CorruptObject(path, "has other bytes")

    def work(ctx: Context) -> None:
        assert raised.wait(WAIT_S)
        assert house.store.stat(artifact_path("curation", ctx.inputs["curation"].key)) is not None
        ended.set()

    house.does = {"decoder": damaged, "upsampler": work}
    with pytest.raises(CorruptObject, match="has other bytes"):
        house.execute()
    assert ended.is_set()
    assert "bundle" not in house.done


def test_all_trainings_that_run_are_shown_together(house: House) -> None:
    met = Barrier(3, timeout=WAIT_S)

    def show(ctx: Context) -> None:
        met.wait()
        assert ctx.show is not None
        ctx.show(ctx.publishable(ledger=Ledger()))
        met.wait()

    house.does = dict.fromkeys(TRAININGS, show)
    house.execute()
    assert set(TRAININGS) in house.looks
    assert house.looks[-1] == set()


def test_trainings_that_differ_in_length_alone_take_turns(tmp_path: Any) -> None:
    """They share checkpoints, of which each attempt fences the one before: at once, neither would ever save one."""
    store = open_store(str(tmp_path / "store"))
    house, inside, most = House(store), [0], [0]
    beginning = Barrier(2)

    def run(ctx: Context) -> Artifact:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        Event().wait(0.5)  # time for the other to begin, if it could
        inside[0] -= 1
        return house.run(ctx)

    def make(samples: int) -> None:
        stage = Stage("decoder", 1, Recipe(samples), ("curation",), run, "training")
        beginning.wait(WAIT_S)
        made[samples] = execution._run_stage(stage, stage_key(stage, keys), inputs, store, config, lambda _: None)

    inputs = {"curation": Artifact("curation", "c" * 64, {}, {}, Ledger())}
    keys = {name: artifact.key for name, artifact in inputs.items()}
    config: Any = SimpleNamespace(project="p", run=Run())
    made: dict[int, Artifact] = {}
    threads = [Thread(target=make, args=(samples,)) for samples in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert made.keys() == {1, 2}
    assert most == [1]


def test_a_new_checkpoint_is_a_sign_of_life_and_an_attempt_is_none(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "store"))
    seen: list[str] = []

    def lead_or_wait(*words: Any, **named: Any) -> None:
        key, activity = words[1], words[4]
        for name in ("attempts/0001", "000000000016-0001", "attempts/0002", "000000000032-0001"):
            seen.append(activity())
            store.create(f"checkpoints/{trunk}/{name}.json", b"{}")
        seen.append(activity())
        stage.run(execution.make_context(stage, key, inputs, store, config))

    monkeypatch.setattr(execution, "lead_or_wait", lead_or_wait)
    stage = Stage("decoder", 1, Recipe(decay=1), ("curation",), House(store).run, "training")
    inputs = {"curation": Artifact("curation", "c" * 64, {}, {}, Ledger())}
    config: Any = SimpleNamespace(project="p", run=Run())
    key = stage_key(stage, {"curation": "c" * 64})
    trunk = trunk_key(execution.make_context(stage, key, inputs, store, config))
    execution._run_stage(stage, key, inputs, store, config, lambda _: None)
    assert [a == b for a, b in pairwise(seen)] == [True, False, True, False]
