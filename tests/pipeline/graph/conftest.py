"""One store, in a folder: what S3 does is tested beside the stores."""

from pathlib import Path

import pytest

from pipeline.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))
