"""Stores of older formats, kept as files: those of releases are read.

Of one that no release wrote every command says in a line that it is older, and changes nothing.
"""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.store.records import FORMAT
from tests.machine.driver import files
from tests.machine.old import FOLDER, ROWS, house, store_in, unpack

RELEASED = 3  # the format of the first release
KEPT = sorted(int(file.name.partition(".")[0]) for file in FOLDER.glob("*.tar.xz"))
COMMANDS = {
    "run": lambda house, store: house.run(store, "p"),
    "plan": lambda house, store: house.plan(store, "p"),
    "retry": lambda house, store: house.data(store, "p", "retry", reason=None),
    "forget": lambda house, store: house.data(store, "p", "forget", what=[ROWS[1]], file=None),
    "gc": lambda house, store: house.data(store, "p", "gc", yes=True, keep_days=0.0, grace_hours=0.0),
    "pin": lambda house, store: house.pin(store, "p", "pin"),
    "promote": lambda house, store: house.release(store, "p", "promote"),
    "rollback": lambda house, store: house.release(store, "p", "rollback"),
    "list": lambda house, store: house.release(store, "p", "list"),
}


def test_every_format_is_kept() -> None:
    assert [*range(1, FORMAT + 1)] == KEPT


@pytest.mark.parametrize("version", range(1, RELEASED))
def test_a_store_of_a_format_that_no_release_wrote_is_refused_in_a_line(tmp_path: Path, version: int) -> None:
    unpack(version, tmp_path)
    before = files(str(tmp_path))
    made, clock = house()
    with made.living():
        for command in COMMANDS.values():
            with pytest.raises(UserError, match=r"^[^\n]*older version of this software[^\n]*$"):
                command(made, store_in(tmp_path, clock))
    assert files(str(tmp_path)) == before


@pytest.mark.parametrize("version", range(RELEASED, FORMAT + 1))
def test_a_store_of_a_released_format_is_read(tmp_path: Path, version: int) -> None:
    unpack(version, tmp_path)
    made, clock = house()
    with made.living():
        store = store_in(tmp_path, clock)
        made.run(store, "p")
        assert not [verdict for verdict in made.plan(store, "p") if verdict.state == "stale"]
