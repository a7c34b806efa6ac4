"""Counts what a store is asked for."""

from collections import Counter
from threading import Lock
from typing import Any

from pipeline.store import Store


class Counted:
    """Passes every call on to a store, and counts the calls of each method."""

    def __init__(self, store: Store):
        self.store, self.calls, self._lock = store, Counter[str](), Lock()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.store, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                self.calls[name] += 1
            return value(*arguments, **named)

        return call
