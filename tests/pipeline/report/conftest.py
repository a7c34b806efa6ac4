"""Publishes a whole made-up chain in a store, for the sections and the page."""

import pytest

from pipeline.graph.artifacts import Artifact
from pipeline.store import FolderStore
from tests.pipeline.report.made_up import chain


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FolderStore:
    return FolderStore(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def made(store: FolderStore) -> dict[str, Artifact]:
    return chain(store)
