"""Stores of older formats, kept as files: those of releases are read, and the others are upgraded in place.

Until one is upgraded, every command says in a line that it is older and what upgrades it, and changes nothing.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.store import open_store
from pipeline.store.folder import FolderStore
from pipeline.store.records import FORMAT
from pipeline.upkeep.upgrade import UpgradeResult, upgrade_store
from tests.machine.driver import Killed, files
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
Files = dict[str, bytes]


def named(found: Files) -> set[str]:
    """Returns the paths of what has the same name in every format: all but runs, which were named by the time."""
    return {path for path in found if not path.startswith("runs/")}


def without_lengths(body: dict[str, Any]) -> dict[str, Any]:
    """Returns a record without what segments of lists got within a format: lengths of captions, versions of images."""
    got = {"lengths", "versions"}
    shards = [{name: value for name, value in each.items() if name not in got} for each in body.get("shards", ())]
    return {**body, "shards": shards}


class Dying:
    """A store whose process is killed before its Nth change."""

    def __init__(self, folder: Path, changes: int):
        self.inner, self.left = FolderStore(str(folder)), changes

    def _change(self, call: Callable[..., Any], *asked: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Killed
        return call(*asked)

    def create(self, path: str, data: bytes) -> bool:
        return bool(self._change(self.inner.create, path, data))

    def swap(self, path: str, old: str | None, new: bytes) -> bool:
        return bool(self._change(self.inner.swap, path, old, new))

    def delete(self, paths: Iterable[str]) -> None:
        self._change(self.inner.delete, paths)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_every_format_is_kept() -> None:
    assert [*range(1, FORMAT + 1)] == KEPT


@pytest.mark.parametrize("version", range(1, RELEASED))
def test_a_store_of_an_older_format_is_refused_in_a_line_that_names_the_upgrade(tmp_path: Path, version: int) -> None:
    unpack(version, tmp_path)
    before = files(str(tmp_path))
    made, clock = house()
    with made.living():
        for command in COMMANDS.values():
            with pytest.raises(UserError, match=r"^[^\n]*older version of this software; unclip data upgrade [^\n]*$"):
                command(made, store_in(tmp_path, clock))
    assert files(str(tmp_path)) == before


@pytest.mark.parametrize("version", range(1, FORMAT + 1))
def test_a_store_of_every_format_is_read_after_its_upgrade(tmp_path: Path, version: int) -> None:
    unpack(version, tmp_path)
    before = files(str(tmp_path))
    made, clock = house()
    with made.living():
        store = store_in(tmp_path, clock)
        if version < RELEASED:
            assert made.data(store, "p", "upgrade") == 0
        after = files(str(tmp_path))
        made.run(store, "p")
        assert not [verdict for verdict in made.plan(store, "p") if verdict.state == "stale"]
    # Nothing was made again: names are the same, of what is named by content the bytes, and of records all values.
    assert named(after) == named(before)
    assert {path: after[path] for path in after if path.startswith("blobs/")}.items() <= before.items()
    assert len(after) == len(before)
    for path in named(before):
        if path.endswith(".json") and "checksum" in (old := json.loads(before[path])):
            new = json.loads(after[path])
            assert (new.pop("format"), old.pop("format")) == (FORMAT, version)
            assert version == FORMAT or new.pop("checksum") != old.pop("checksum")
            assert without_lengths(old).items() <= without_lengths(new).items()


@pytest.mark.parametrize("version", range(1, RELEASED))
def test_every_command_works_on_an_upgraded_store(tmp_path: Path, version: int) -> None:
    unpack(version, tmp_path)
    made, clock = house()
    with made.living():
        made.data(store_in(tmp_path, clock), "p", "upgrade")
        for name in ("run", "list", "pin", "gc", "retry", "run", "forget", "run", "promote", "rollback"):
            COMMANDS[name](made, store_in(tmp_path, clock))


def test_an_upgrade_goes_on_wherever_it_was_killed(tmp_path: Path) -> None:
    unpack(1, tmp_path / "whole")
    whole = upgrade_store(open_store(str(tmp_path / "whole")))
    after = files(str(tmp_path / "whole"))
    assert not whole.current
    changes = 0
    while True:
        folder = tmp_path / str(changes)
        unpack(1, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.upkeep.upgrade.ordered_map", lambda work, items: map(work, items))
            try:
                found = upgrade_store(Dying(folder, changes))
            except Killed:
                upgrade_store(open_store(str(folder)))
                assert files(str(folder)) == after, changes
                changes += 1
                continue
        break
    assert changes > 2 * whole.upgraded
    assert found == whole


def test_what_is_damaged_stays_and_is_told(tmp_path: Path) -> None:
    unpack(1, tmp_path)
    first, second, newer = sorted(path for path in files(str(tmp_path)) if path.startswith("artifacts/"))[:3]
    whole = Path(tmp_path, second).read_bytes()
    Path(tmp_path, first).write_bytes(b"{")
    Path(tmp_path, second).write_bytes(whole.replace(b'"inputs"', b'"outputs"'))
    Path(tmp_path, newer).write_bytes(Path(tmp_path, newer).read_bytes().replace(b'"format":1', b'"format":99'))
    found = upgrade_store(open_store(str(tmp_path)))
    assert found.failed.keys() == {first, second, newer}
    assert found.failed[first] == found.failed[second] == "is corrupt"
    assert "newer version" in found.failed[newer]
    assert Path(tmp_path, first).read_bytes() == b"{"
    assert upgrade_store(open_store(str(tmp_path))) == UpgradeResult(0, found.upgraded, found.failed)


def test_a_record_that_lacks_what_this_version_needs_is_told_with_the_field(tmp_path: Path) -> None:
    from pipeline.store.records import canonical, digest

    unpack(1, tmp_path)
    path = min(path for path in files(str(tmp_path)) if path.startswith("artifacts/"))
    body = json.loads(Path(tmp_path, path).read_bytes())
    del body["checksum"], body["ledger"]
    Path(tmp_path, path).write_bytes(canonical({**body, "checksum": digest(body)}))
    found = upgrade_store(open_store(str(tmp_path)))
    assert found.failed == {path: "is not a record that belongs there (ledger: Field required)"}


def test_copies_of_an_upgrade_bring_no_release_and_no_blob(tmp_path: Path) -> None:
    """A right to write below upgrade/ is none to write elsewhere."""
    store = open_store(str(tmp_path))
    for path in ("releases/p.json", "blobs/aa/x", "locks/pin.json", "runs/p/00000001-00000000.json"):
        store.create(f"upgrade/{path}", b"{}")
    before = files(str(tmp_path))
    assert upgrade_store(store) == UpgradeResult()
    assert files(str(tmp_path)) == before
