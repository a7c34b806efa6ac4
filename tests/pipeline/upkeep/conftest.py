from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pipeline.store import Store
from pipeline.store.base import Entry
from pipeline.store.folder import FolderStore
from pipeline.store.s3 import S3Store
from tests.conftest import folder_store
from tests.pipeline.upkeep.runs import AGES

store = folder_store  # tests that ask for ``make_store`` run on S3, too


@pytest.fixture(autouse=True)
def _ages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings say that runs are as old as a test wants them: no server lets it set the time of an object."""
    for kind in (FolderStore, S3Store):

        def listed(self: Store, prefix: str, original: Any = kind.list) -> Iterator[Entry]:
            for entry in original(self, prefix):
                yield replace(entry, modified=entry.modified - AGES.get((self.url, entry.path), 0.0))

        monkeypatch.setattr(kind, "list", listed)
