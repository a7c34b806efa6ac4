import fcntl
import os
import shutil
from collections.abc import Iterator

import pytest

from pipeline.data.source.drawings.server import serving
from tests.faults import Undisturbed, run_undisturbed


@pytest.fixture(scope="session")
def pictures() -> Iterator[str]:
    """The address of a server that draws."""
    with serving() as address:
        yield address


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pictures: str) -> Undisturbed:
    """Runs that nothing disturbed, for the tests of crashes, races and damage to compare with.

    The first process to come by makes them for all of pytest's; nobody writes to them.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own) / "undisturbed"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
            folder.mkdir()
            run_undisturbed(folder, pictures)
            (folder / "made").touch()
    return Undisturbed(folder, pictures)
