"""``python -m tests.machine.old``: keeps the store of a small finished project, as this version writes it, as a file.

Run it before ``pipeline.store.records.FORMAT`` is raised, so that the store of the format before stays here.
"""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

from pipeline.store import open_store
from pipeline.store.records import FORMAT
from tests.machine.driver import Clock, Driver, History, StepStore
from tests.machine.house import House

FOLDER = Path(__file__).parent / "formats"
ROWS = ("http://a.test/1.png", "http://a.test/slow2.png", "http://a.test/dead3.png")


def house() -> tuple[House, Clock]:
    """Returns the project ``p`` of every kept store, with its list."""
    clock = Clock()
    made = House(clock, ["p"])
    made.lists["p"].rows += ROWS
    return made, clock


def store_in(folder: Path, clock: Clock) -> StepStore:
    inner = open_store(str(folder))
    return StepStore(inner, Driver("old", clock), History(clock), inner.fresh)


def unpack(version: int, folder: Path) -> None:
    """Writes the kept store of a format into a folder."""
    with tarfile.open(FOLDER / f"{version}.tar.xz") as tar:
        tar.extractall(folder, filter="data")


def keep(folder: Path) -> None:
    """Packs a store."""
    with tarfile.open(FOLDER / f"{FORMAT}.tar.xz", "w:xz") as tar:
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
            tar.add(file, file.relative_to(folder))


def main() -> None:
    """Makes, releases and pins, and keeps what is in the store then."""
    made, clock = house()
    with tempfile.TemporaryDirectory() as folder, made.living():
        store = store_in(Path(folder), clock)
        made.run(store, "p")
        made.release(store, "p", "promote")
        made.data(store, "p", "retry", reason=None)
        made.data(store, "p", "forget", what=[ROWS[0]], file=None)
        made.data(store, "p", "gc", yes=True, keep_days=0.0, grace_hours=1.0)
        keep(Path(folder))


if __name__ == "__main__":
    main()
