"""Makes objects of a store look older than they are, as its own clock says: no server lets a test set that."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from pipeline.store import Store
from pipeline.store.base import Entry


def aged(monkeypatch: pytest.MonkeyPatch, store: Store, path: str, age_s: float) -> None:
    """Makes listings say that an object was written ``age_s`` seconds earlier than it was."""
    original = type(store).list

    def listed(self: Store, prefix: str) -> Iterator[Entry]:
        for entry in original(self, prefix):
            old = entry.path == path and self.url == store.url
            yield replace(entry, modified=entry.modified - age_s) if old else entry

    monkeypatch.setattr(type(store), "list", listed)
