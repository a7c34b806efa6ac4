"""Thousands of operations of two drivers, collections and a stranger, in an order that a seed gives, step by step.

``python -m tests.machine --seed S --minutes M`` goes on with other seeds. Each mutant below breaks one rule of the
store, and the machine must notice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from pydantic import ValidationError

import jobs.data
from pipeline.store import records
from pipeline.store.base import Entry
from pipeline.store.folder import FolderStore
from tests.machine.machine import BucketMachine, Machine, StrangerBucketMachine, StrangerMachine

KEEPING = ("locks/", "releases/")
Patch = Callable[[pytest.MonkeyPatch], None]


def run(machine: type[Machine], programs: int, steps: int = 30) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=programs,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            phases=(Phase.generate,),  # python -m tests.machine makes what fails as short as it can
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        ),
    )


@pytest.mark.parametrize("programs", [4, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.parametrize("machine", [Machine, StrangerMachine, BucketMachine, StrangerBucketMachine])
def test_nothing_is_lost_undone_or_left_and_every_command_ends_well(machine: type[Machine], programs: int) -> None:
    run(machine, programs)


def test_an_interrupted_run_of_one_project_keeps_no_row_that_another_has_forgotten() -> None:
    """Neither in a segment of a list nor in a shard of a stage that it has not finished."""
    for stopped_at in ("swap leases/", "create artifacts/source/", "create artifacts/pairs/"):
        machine = Machine()
        machine.begin(["", "", ""], shared=False, done=("run p", "run q"))
        machine.append("q", "")
        machine.start("a", "run", "q", 0, 0)
        while not machine.drivers["a"].at.startswith(stopped_at):
            machine.step("a", 1)
        machine.kill("a")
        machine.append("q", "")  # so that nobody ever finishes what the first one has begun
        machine.start("b", "forget", "p", 10_000, 0)
        machine.holds()
        machine.teardown()


def decide_at_once(first: str, second: str, path: str) -> None:
    """Two drivers decide: one does so while the other one stands before its swap."""
    machine = Machine()
    try:
        machine.begin(["slow", "slow"], shared=False, done=("run p",))
        machine.start("a", first, "p", 0, 0)
        while not machine.drivers["a"].at.startswith(f"swap {path}"):
            assert machine.drivers["a"].busy
            machine.step("a", 1)
        machine.start("b", second, "p", 10_000, 1)
        machine.step("a", 10_000)
        machine.holds()
    finally:
        machine.teardown()


AT_ONCE = pytest.mark.parametrize(
    ("first", "second", "path"),
    [
        ("promote", "promote", "releases/p"),
        ("forget", "forget", "locks/list-p"),
        ("retry", "forget", "locks/list-p"),
        ("forget", "retry", "locks/list-p"),
    ],
)


@AT_ONCE
def test_of_two_decisions_at_once_neither_is_undone(first: str, second: str, path: str) -> None:
    decide_at_once(first, second, path)


@pytest.mark.slow
@AT_ONCE
def test_a_swap_that_compares_nothing_is_noticed(
    first: str, second: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random programs seldom stop between a look and its swap, so that they take minutes to notice."""
    swap = FolderStore.swap

    def blind(self: FolderStore, path: str, old: str | None, new: bytes) -> bool:
        found = self.stat(path)
        return swap(self, path, found.version if found else None, new)

    monkeypatch.setattr(FolderStore, "swap", blind)
    with pytest.raises(AssertionError, match=r"has lost|remembers again"):
        decide_at_once(first, second, path)


def gc_ignores_pins_and_releases(patch: pytest.MonkeyPatch) -> None:
    whole, listed, here = jobs.data.collect, FolderStore.list, threading.local()

    def blind(*arguments: Any) -> Any:
        here.collects = True
        try:
            return whole(*arguments)
        finally:
            here.collects = False

    def list_most(self: FolderStore, prefix: str) -> Iterator[Entry]:
        return iter(()) if prefix in KEEPING and getattr(here, "collects", False) else listed(self, prefix)

    # Both by the test's own patch: one that a driver's thread made would outlive its test where two of them overlap.
    patch.setattr(jobs.data, "collect", blind)
    patch.setattr(FolderStore, "list", list_most)


def a_repair_ignores_pins_and_releases(patch: pytest.MonkeyPatch) -> None:
    for module in ("check", "repair"):
        patch.setattr(f"pipeline.upkeep.{module}.protected_objects", lambda _: {})


def a_record_is_overwritten(patch: pytest.MonkeyPatch) -> None:
    create = FolderStore.create

    def overwrites(self: FolderStore, path: str, data: Any, move: bool = False) -> bool:
        if path.startswith("artifacts/"):
            Path(self.url, path).unlink(missing_ok=True)
        return create(self, path, data, move)

    patch.setattr(FolderStore, "create", overwrites)


def gc_does_not_count_what_was_forgotten(patch: pytest.MonkeyPatch) -> None:
    forget = jobs.data.with_forgotten
    patch.setattr(jobs.data, "with_forgotten", lambda journal, marks: replace(forget(journal, marks), forgettings=0))


def nobody_looks_at_shapes(patch: pytest.MonkeyPatch) -> None:
    """A record of another shape ends its reader, as if fields were taken for what they should be."""
    parse = records.parse_object

    def trusting(data: bytes, kind: type[Any]) -> Any:
        try:
            return parse(data, kind)
        except ValidationError as e:
            raise TypeError(str(e)) from e

    patch.setattr(records, "parse_object", trusting)


@pytest.mark.slow  # of a swap that compares nothing, see above
@pytest.mark.parametrize(
    ("mutant", "machine", "number"),
    [
        (gc_ignores_pins_and_releases, Machine, 0),
        (a_repair_ignores_pins_and_releases, Machine, 0),
        (a_record_is_overwritten, Machine, 0),
        (gc_does_not_count_what_was_forgotten, Machine, 0),
        (nobody_looks_at_shapes, StrangerMachine, 3),
    ],
)
def test_a_store_that_breaks_a_rule_is_noticed(
    mutant: Patch, machine: type[Machine], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``number``: a seed whose first programs meet the rule."""
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        run(seed(number)(type("Seeded", (machine,), {})), 300)
