"""Thousands of operations of two drivers, collections and a stranger, in an order that a seed gives, step by step.

``python -m tests.machine --seed S --minutes M`` goes on with other seeds. Each mutant below breaks one rule of the
store, and the machine must notice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from pydantic import ValidationError

import jobs.data
from pipeline.store import records
from pipeline.store.folder import FolderStore
from tests.machine.machine import BucketMachine, Machine, StrangerMachine

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


@pytest.mark.parametrize(("machine", "programs"), [(Machine, 25), (StrangerMachine, 25), (BucketMachine, 3)])
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


def gc_ignores_pins_and_releases(patch: pytest.MonkeyPatch) -> None:
    whole, listed = jobs.data.collect, FolderStore.list

    def blind(*arguments: Any) -> Any:
        with mock.patch.object(FolderStore, "list", lambda s, p: iter(()) if p in KEEPING else listed(s, p)):
            return whole(*arguments)

    patch.setattr(jobs.data, "collect", blind)


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


def swap_compares_nothing(patch: pytest.MonkeyPatch) -> None:
    swap = FolderStore.swap

    def blind(self: FolderStore, path: str, old: str | None, new: bytes) -> bool:
        found = self.stat(path)
        return swap(self, path, found.version if found else None, new)

    patch.setattr(FolderStore, "swap", blind)


@pytest.mark.parametrize(
    ("mutant", "machine"),
    [
        (gc_ignores_pins_and_releases, Machine),
        (a_record_is_overwritten, Machine),
        (gc_does_not_count_what_was_forgotten, Machine),
        pytest.param(swap_compares_nothing, Machine, marks=pytest.mark.slow),
        (nobody_looks_at_shapes, StrangerMachine),
    ],
)
def test_a_store_that_breaks_a_rule_is_noticed(
    mutant: Patch, machine: type[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        run(machine, 300)
