from pathlib import Path

import pytest

from tests.models import karlo


@pytest.fixture(scope="session")
def karlo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Karlo, as it is published. It is to be copied before anything in it changes."""
    folder = tmp_path_factory.mktemp("all") / "karlo"
    karlo.write_all(folder)
    return folder
