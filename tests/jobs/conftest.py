from collections.abc import Iterator

import pytest

from pipeline.data.source.emoji.server import serving
from tests.faults import Undisturbed, run_undisturbed


@pytest.fixture(scope="session")
def pictures() -> Iterator[str]:
    """The address of a server that draws emoji."""
    with serving() as address:
        yield address


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pictures: str) -> Undisturbed:
    """Runs that nothing disturbed, for the tests of crashes, races and damage to compare with."""
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed"), pictures)
