"""``python -m tests.machine.old``: keeps the store of a small finished project, as this version writes it, as a file.

Run it before ``pipeline.store.records.FORMAT`` is raised, so that the store of the format before stays here.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from pipeline.store import open_store
from pipeline.store.records import FORMAT, canonical, digest
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


def keep(folder: Path, version: int) -> None:
    """Packs a store; of another version than this one, its records are sealed as that one did."""
    FOLDER.mkdir(exist_ok=True)
    with tarfile.open(FOLDER / f"{version}.tar.xz", "w:xz") as tar:
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
            data = file.read_bytes()
            if version != FORMAT and file.suffix == ".json" and b'"checksum"' in data:
                body = {**json.loads(data), "format": version}
                del body["checksum"]
                data = canonical({**body, "checksum": digest(body)})
            info = tarfile.TarInfo(str(file.relative_to(folder)))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def main() -> None:
    """Makes, releases and pins, and keeps what is in the store then."""
    import tempfile

    made, clock = house()
    with tempfile.TemporaryDirectory() as folder, made.living():
        store = store_in(Path(folder), clock)
        made.run(store, "p")
        made.release(store, "p", "promote")
        made.data(store, "p", "retry", reason=None)
        made.data(store, "p", "forget", what=[ROWS[0]], file=None)
        made.data(store, "p", "gc", yes=True, keep_days=0.0, grace_hours=1.0)
        keep(Path(folder), FORMAT)
        if not (FOLDER / "1.tar.xz").exists():
            keep(Path(folder), 1)


if __name__ == "__main__":
    main()
