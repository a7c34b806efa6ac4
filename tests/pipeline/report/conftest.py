"""Publishes a whole made-up chain in a store, for the sections and the page."""

from collections.abc import Iterator
from functools import cache

import pytest

from pipeline.graph.artifacts import Artifact
from pipeline.report import images
from pipeline.store import FolderStore
from tests.pipeline.report.made_up import chain


@pytest.fixture(autouse=True, scope="package")
def shrunk_once() -> Iterator[None]:
    """Pages show the same images again and again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "shrink", cache(images.shrink))
        yield


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> FolderStore:
    return FolderStore(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="session")
def made(store: FolderStore) -> dict[str, Artifact]:
    return chain(store)
