"""The machine: rules that let drivers go on, kill them, damage objects and write as a stranger, and what must hold."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import Artifact, artifact_path, publish_artifact
from pipeline.ledger import Ledger
from pipeline.store import open_store
from pipeline.upkeep.repair import protected_objects
from tests.machine import stranger
from tests.machine.bucket import Bucket
from tests.machine.driver import Clock, Driver, History, StepStore, files, outcome
from tests.machine.holders import find_holders, is_sound
from tests.machine.house import House
from tests.machine.settled import forgotten_is_gone, ledger_balances

PROJECTS = ("p", "q")
DRIVERS = ("a", "b")
COMMANDS = (
    "run", "run", "run", "plan", "retry", "forget", "gc", "gc", "check", "pin", "unpin", "promote", "rollback", "list"
)  # fmt: skip
DECISIONS = ("promote", "forget", "retry")  # which are swapped, so that two at once must not undo each other
FAULTY = 0.03  # of the requests to a bucket
GRACE_HOURS = 1.0
DEAD_S = 4 * 86_400.0  # without a sign of life, after which no lease keeps anything


class Machine(RuleBasedStateMachine):
    """Two drivers on one store in a folder."""

    strangers: ClassVar[bool] = False
    in_bucket: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.history = History(self.clock)
        self.house = House(self.clock, PROJECTS)
        self.drivers = {name: Driver(name, self.clock) for name in DRIVERS}
        self.watcher = Driver("watcher", self.clock)
        self.clock.pause = self._pause
        self.tainted = False  # whether a stranger's record may have been taken for work that was done
        self.moves: dict[str, list[Any]] = {name: [] for name in PROJECTS}
        self.decided: dict[str, tuple[set[str], int]] = {name: (set(), 0) for name in PROJECTS}
        self.asked_to_forget: dict[str, set[str]] = {name: set() for name in PROJECTS}
        self.spoiled: dict[str, tuple[bytes, bytes | None]] = {}  # by path: bytes before, and after; None for lost
        self.foreign: dict[str, bytes] = {}  # objects that a stranger wrote, as far as they stand
        self.kept: dict[str, set[str]] = {}  # objects that each pin or release named while it was whole
        self.rows = 0
        self.stack = ExitStack()
        self.folder = tempfile.mkdtemp(prefix="machine-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.stack.enter_context(self.house.living())
        if self.in_bucket:
            bucket = Bucket(FAULTY, self.clock.time)
            self.inner: Any = bucket.store()
            self.fresh = bucket.store
            self.raw = lambda: {key.removeprefix("machine/"): data for key, data in bucket.objects.items()}
        else:
            self.inner = open_store(self.folder)
            self.fresh = self.inner.fresh
            self.raw = lambda: files(self.folder)

    def _pause(self) -> None:
        for driver in (*self.drivers.values(), self.watcher):
            driver.pause_if_here("sleep")

    def store(self, driver: Driver) -> StepStore:
        return StepStore(self.inner, driver, self.history, self.fresh)

    @initialize(
        rows=st.lists(st.sampled_from(["", "slow", "dead"]), min_size=1, max_size=4),
        shared=st.booleans(),
        done=st.sampled_from(((), ("run p",), ("run p", "promote p"), ("run p", "run q", "promote q"))),
    )
    def begin(self, rows: list[str], shared: bool, done: tuple[str, ...]) -> None:
        """Lists of both projects, with equal rows where they are ``shared``, and what is done before."""
        for name in PROJECTS:
            self.rows = 0
            for kind in rows:
                self._append(name, kind, "" if shared else name)
        for what in done:
            self._do(*what.split())

    @rule(project=st.sampled_from(PROJECTS), kind=st.sampled_from(["", "slow", "dead"]))
    def append(self, project: str, kind: str) -> None:
        if len(self.house.lists[project].rows) < 8:
            self._append(project, kind, project)

    def _append(self, project: str, kind: str, owner: str) -> None:
        self.rows += 1
        self.house.lists[project].rows.append(f"http://a.test/{kind}{owner}{self.rows}.png")

    @rule(
        name=st.sampled_from(DRIVERS),
        command=st.sampled_from(COMMANDS),
        project=st.sampled_from(PROJECTS),
        steps=st.sampled_from((0, 1, 3, 10, 30, 100, 10_000)),
        row=st.integers(0, 7),
    )
    def start(self, name: str, command: str, project: str, steps: int, row: int) -> None:
        """Begins a command, if the driver has none, and goes on for some operations."""
        driver = self.drivers[name]
        if not driver.busy:
            driver.start(f"{command} {project}", self._command(driver, command, project, row))
        driver.step(steps)

    @rule(
        commands=st.tuples(*[st.sampled_from((*COMMANDS, *DECISIONS * 3))] * 2),
        alike=st.booleans(),
        project=st.sampled_from(PROJECTS),
        turns=st.lists(st.integers(1, 12), min_size=1, max_size=8),
        rows=st.tuples(*[st.integers(0, 7)] * 2),
    )
    def start_both(
        self, commands: tuple[str, str], alike: bool, project: str, turns: list[int], rows: tuple[int, int]
    ) -> None:
        """Begins two commands of one project at once, and lets them go on in turns."""
        for name, command, row in zip(DRIVERS, commands, rows, strict=True):
            self.start(name, commands[0] if alike else command, project, 0, row)
        for number, steps in enumerate(turns):
            self.drivers[DRIVERS[number % 2]].step(steps)

    @rule(name=st.sampled_from(DRIVERS), steps=st.sampled_from((1, 2, 5, 20, 60, 10_000)))
    @precondition(lambda self: any(driver.busy for driver in self.drivers.values()))
    def step(self, name: str, steps: int) -> None:
        self.drivers[name].step(steps)

    @rule(name=st.sampled_from(DRIVERS))
    @precondition(lambda self: any(driver.busy for driver in self.drivers.values()))
    def kill(self, name: str) -> None:
        """Kills a driver where it stands, or the other one."""
        driver = self.drivers[name] if self.drivers[name].busy else next(d for d in self.drivers.values() if d.busy)
        driver.kill()

    @rule(hours=st.sampled_from((0.5, 2.0, 30.0, 100.0)))
    def wait(self, hours: float) -> None:
        self.clock.seconds += hours * 3600

    @rule(choice=st.integers(0, 2**16), seed=st.integers(0, 2**32))
    @precondition(lambda self: self.strangers)
    def write(self, choice: int, seed: int) -> None:
        """A stranger writes at a path that is free, most often at one that somebody has just looked for."""
        draw = random.Random(seed)
        records = {path: data for path, data in self.raw().items() if path.endswith(".json")}
        sought = [path for path in list(self.history.missed)[-60:] if path not in records]
        paths = sought * 3 + list(stranger.PATHS) if draw.random() < 0.7 else list(stranger.PATHS)
        path = paths[choice % len(paths)]
        data = stranger.thing(path, records, draw)
        if self.inner.create(path, data):
            self.foreign[path] = data
            self.history.created(path, data)
            self.tainted |= path.startswith(("artifacts/", "shards/", "checkpoints/", "locks/list-", "runs/"))

    @rule(choice=st.integers(0, 2**16), way=st.sampled_from(("rot", "cut", "lose")))
    def spoil(self, choice: int, way: str) -> None:
        """Damages a record or a blob, or loses a blob."""
        kinds = ("blobs/",) if way == "lose" else ("blobs/", "artifacts/", "shards/")
        objects = self.raw()
        paths = sorted(path for path in objects.keys() - self.foreign.keys() if path.startswith(kinds))
        paths = [path for path in paths if not self.is_damaged(path, objects)]
        if not paths:
            return
        path = paths[choice % len(paths)]
        before = objects[path]
        now = {"rot": b"rot" + before[3:], "cut": before[: len(before) // 2], "lose": None}[way]
        if now != before:
            self._put(path, now)
            self.spoiled[path] = before, now
            self.kept = {holder: named - {path} for holder, named in self.kept.items()}

    def is_damaged(self, path: str, objects: dict[str, bytes]) -> bool:
        """Returns whether an object is as it was damaged: nobody has made it again since."""
        return path in self.spoiled and objects.get(path) == self.spoiled[path][1]

    def restore(self, paths: Container[str]) -> None:
        """Puts a sound copy in the place of those of some objects that were damaged."""
        objects = self.raw()
        for path, (before, now) in self.spoiled.items():
            if path in paths and objects.get(path) in (None, now):
                self._put(path, before)

    def _put(self, path: str, data: bytes | None) -> None:
        self.inner.delete([path])
        self.history.removed([path])
        if data is not None:
            assert self.inner.create(path, data)
            self.history.created(path, data)

    @rule(number=st.integers(0, 50))
    def race(self, number: int) -> None:
        """Somebody publishes, with other bytes, what is published already: nothing of that stays."""
        objects = self.raw()
        paths = sorted(path for path in objects.keys() - self.foreign.keys() if path.startswith("artifacts/"))
        paths = [path for path in paths if not self.is_damaged(path, objects)]
        if not paths or self.tainted:
            return
        path = paths[number % len(paths)]
        _, stage, file = path.split("/")
        before = self.inner.read(path)
        racer = Artifact(stage, file.removesuffix(".json"), {}, {"another": "recipe"}, Ledger(kept=number))
        stands = publish_artifact(self.store(self.watcher), racer, 1.0)
        assert self.inner.read(path) == before, f"{path} was overwritten"
        assert dict(stands.recipe) != {"another": "recipe"}, f"{path}: a racer has not adopted what stands"

    def _command(self, driver: Driver, command: str, project: str, row: int) -> Any:
        house, store = self.house, self.store(driver)
        rows = house.lists[project].rows
        days = (30.0, 0.0, 1.0)[row % 3]
        if command == "forget":
            url = rows[row % len(rows)]

            def forget() -> None:
                house.data(store, project, "forget", what=[url], file=None)
                self.asked_to_forget[project].add(url)
                self.no_decision_is_undone(self.raw())

            return forget
        if command in ("promote", "rollback", "retry"):

            def decide() -> None:
                if command == "retry":
                    house.data(store, project, "retry", reason=None)
                else:
                    house.release(store, project, command)
                self.no_decision_is_undone(self.raw())  # before anybody else goes on

            return decide
        if command == "gc":
            return lambda: house.data(store, project, "gc", yes=row != 7, keep_days=days, grace_hours=GRACE_HOURS)
        if command == "check":
            return lambda: house.data(store, project, "check", names=(), repair=row % 4 > 0, keep_days=30.0)
        return {
            "run": lambda: self._made(house.run(store, project)),
            "plan": lambda: house.plan(store, project),
            "pin": lambda: house.pin(store, project, "pin"),
            "unpin": lambda: house.pin(store, project, "unpin"),
            "list": lambda: house.release(store, project, "list"),
        }[command]

    def _made(self, artifacts: dict[str, Artifact]) -> None:
        """Says that a run has ended well. Its results are what the store has, also where another run was first."""
        objects = self.raw()
        for stage, made in artifacts.items():
            path = artifact_path(stage, made.key)
            standing = objects.get(path)
            if standing is None or self.tainted or path in self.foreign or self.is_damaged(path, objects):
                continue
            assert json.loads(standing)["blobs"] == dict(made.blobs), f"{path}: a racer has not adopted what stands"

    # --- what holds ---------------------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        self.commands_end_well()
        objects = self.raw()
        self.nothing_is_overwritten(objects)
        self.nothing_released_or_pinned_is_lost(objects)
        self.no_decision_is_undone(objects)

    def commands_end_well(self) -> None:
        for driver in (*self.drivers.values(), self.watcher):
            for what, ended in driver.ended:
                how = outcome(ended)
                if how not in ("value", "refused", "killed", *(["damaged"] if self.spoiled or self.strangers else [])):
                    raise AssertionError(f"{what} ended with {how}") from ended
            driver.ended.clear()

    def nothing_is_overwritten(self, objects: dict[str, bytes]) -> None:
        for path, digest in self.history.first.items():
            if path in objects:
                assert hashlib.sha256(objects[path]).hexdigest() == digest, f"{path} was overwritten"

    def nothing_released_or_pinned_is_lost(self, objects: dict[str, bytes]) -> None:
        holders = find_holders(objects, PROJECTS, self.foreign)
        for holder, named in holders.items():
            before = self.kept.get(holder, set())  # its record may be damaged now
            whole = {path for path in named | before if path in objects and is_sound(path, objects[path])}
            assert before <= whole, f"{holder} has lost {sorted(before - whole)}"
            self.kept[holder] = whole
        self.kept = {holder: paths for holder, paths in self.kept.items() if holder in holders}

    def no_decision_is_undone(self, objects: dict[str, bytes]) -> None:
        """Moves of a release, rows that are forgotten and rows that are tried again are added to, whoever is first."""
        for project in PROJECTS:
            pointer, journal = f"releases/{project}.json", f"locks/list-{project}.json"
            if pointer in objects and pointer not in self.foreign:
                before, now = self.moves[project], json.loads(objects[pointer])["moves"]
                assert now[: len(before)] == before, f"{pointer} has lost a move"
                self.moves[project] = now
            if journal in objects and journal not in self.foreign:
                said = json.loads(objects[journal])
                marks, retries = self.decided[project]
                assert marks <= set(said["forgotten"]), f"{journal} remembers again what was forgotten"
                assert retries <= len(said["retries"]), f"{journal} has lost rows that are to be tried again"
                self.decided[project] = set(said["forgotten"]), len(said["retries"])

    def teardown(self) -> None:
        try:
            if self.rows:
                self.settle()
        finally:
            for driver in self.drivers.values():
                if driver.busy:
                    driver.kill()
            self.stack.close()

    def settle(self) -> None:
        """Lets all end, takes away what the stranger wrote, and says what must be true of a store in peace."""
        for driver in self.drivers.values():
            driver.finish()
        self.holds()
        for path, data in self.foreign.items():
            if self.inner.stat(path) is not None and self.inner.read(path) == data:
                self.inner.delete([path])
                self.history.removed([path])
                if path in self.history.sound:  # which is what an operator is told to do
                    self.inner.create(path, self.history.sound[path])
        self.foreign = {}
        self.clock.seconds += DEAD_S
        self._repair()
        for project in PROJECTS:
            self._run(project)
            if not self.tainted:
                ledger_balances(self.house, self.store(self.watcher), project)
        for _ in range(2):
            self._do("gc", PROJECTS[0])
            self.clock.seconds += GRACE_HOURS * 3600 + 1
        if self.tainted:
            return
        forgotten_is_gone(self.house, self.store(self.watcher), self.asked_to_forget, self.raw())
        for project in PROJECTS:
            stale = [v for v in self._do("plan", project) if v.state == "stale"]
            assert not stale, f"{project}: gc has deleted what the last run needs: {stale}"

    def _repair(self) -> None:
        """Quarantines what is damaged. A sound copy is put in the place of what pins, releases and lists need."""
        for project in PROJECTS:
            self._do("check", project, row=1)
        for _ in range(2):  # a record first, which says what else is needed
            self.restore(protected_objects(self.store(self.watcher)))
        for project in PROJECTS:
            found = self._do("check", project, row=0)
            assert found == 0 or self.tainted, f"{project}: is damaged after a repair"

    def _run(self, project: str) -> None:
        """Runs in peace. What no run has asked for yet may still be damaged: the error says what to repair."""
        for _ in range(len(self.spoiled) + 1):
            damage = self._do("run", project, well=("value", "damaged") if self.spoiled else ("value",))
            if not isinstance(damage, CorruptObject):
                return
            words = {"names": [damage.path], "repair": True, "keep_days": 30.0}
            self._alone("repair", partial(self.house.data, self.store(self.watcher), project, "check", **words))
        assert self.tainted, f"{project}: still damaged: {damage}"

    def _do(self, command: str, project: str, row: int = 0, well: Sequence[str] = ("value",)) -> Any:
        """Runs a command alone; it must end ``well``, unless a stranger's work is among what it uses."""
        return self._alone(f"{command} {project}", self._command(self.watcher, command, project, row), well)

    def _alone(self, what: str, command: Callable[[], Any], well: Sequence[str] = ("value",)) -> Any:
        self.watcher.start(f"{what}, in peace", command)
        self.watcher.finish()
        _, ended = self.watcher.ended[-1]
        self.holds()
        how = outcome(ended)
        assert how in well or self.tainted, f"{what} ended with {how}: {ended}"
        return ended


class BucketMachine(Machine):
    """The same in a bucket whose answers are lost, late or errors."""

    in_bucket = True


class StrangerMachine(Machine):
    """The same with a stranger, who may add any object; what was taken from them need not come true."""

    strangers = True


class StrangerBucketMachine(StrangerMachine):
    """A stranger and a bucket whose answers are lost, late or errors."""

    in_bucket = True
