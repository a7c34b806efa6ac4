"""The store of the release, kept as a file, is read whole; one of an older format is refused in a line, and stays."""

import json
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.store.records import FORMAT, canonical, digest
from tests.machine.driver import files
from tests.machine.old import ROWS, house, store_in, unpack

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


def test_the_store_of_the_release_is_read_and_stays_as_it_is(tmp_path: Path) -> None:
    """Its last commands left rows to fetch again and one to forget, which a run does; nothing else changes."""
    unpack(FORMAT, tmp_path)
    before = files(str(tmp_path))
    made, clock = house()
    with made.living():
        store = store_in(tmp_path, clock)
        made.run(store, "p")
        assert not [verdict for verdict in made.plan(store, "p") if verdict.state == "stale"]
    stored = {
        path: data for path, data in before.items() if path.startswith(("artifacts/", "shards/", "blobs/", "runs/"))
    }
    assert stored
    assert stored.items() <= files(str(tmp_path)).items()


def test_every_command_works_on_the_store_of_the_release(tmp_path: Path) -> None:
    unpack(FORMAT, tmp_path)
    made, clock = house()
    with made.living():
        for name in ("run", "list", "pin", "gc", "retry", "run", "forget", "run", "promote", "rollback"):
            COMMANDS[name](made, store_in(tmp_path, clock))


def test_a_store_of_an_older_format_is_refused_in_a_line(tmp_path: Path) -> None:
    unpack(FORMAT, tmp_path)
    for path, data in files(str(tmp_path)).items():
        if path.endswith(".json") and "checksum" in (body := json.loads(data)):
            body = {name: value for name, value in body.items() if name != "checksum"} | {"format": FORMAT - 1}
            Path(tmp_path, path).write_bytes(canonical({**body, "checksum": digest(body)}))
    before = files(str(tmp_path))
    made, clock = house()
    with made.living():
        for command in COMMANDS.values():
            with pytest.raises(UserError, match=r"^[^\n]*older version of this software; name another store[^\n]*$"):
                command(made, store_in(tmp_path, clock))
    assert files(str(tmp_path)) == before
