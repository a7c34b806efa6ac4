"""Sound records of every kind, names that are none, and what can be done to an object."""

from collections.abc import Callable
from typing import Any

from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.records import FORMAT, canonical, digest

BLOB = "0123456789abcdef" * 4
AWAY = ("../x", "../../x", "a/../../x", "/etc/x", "//x", "a//b", "a/", "", ".", "..", "a/./b", "a\\b", "a\0", "a\nb")


def forge(store: Store, path: str, body: dict[str, Any]) -> None:
    """Creates a record as anybody can who may write to the store: its checksum holds."""
    body = {**body, "format": FORMAT}
    assert store.create(path, canonical({**body, "checksum": digest(body)}))


LEDGER = Ledger(kept=1).as_json()
ARTIFACT = {
    "stage": "bundle", "key": "k", "inputs": {"clip": "c"}, "recipe": {}, "ledger": LEDGER, "blobs": {"a": BLOB},
    "shard_table": None, "metrics": {}, "environment": {}, "times": {"finished": 0.5, "seconds": 1},
}  # fmt: skip
SHARD = {"number": 0, "key": "k", "ledger": LEDGER, "blobs": {"index": BLOB}, "counts": {}}
CHECKPOINT = {
    "samples": 8, "attempt": 1, "seconds": 0.5, "laps": {}, "blobs": {"model": BLOB},
    "journal": {"lines": [{"samples": 8, "preview": BLOB}], "sums": {}, "steps": 0},
}  # fmt: skip
RUN = {
    "project": "p", "forgettings": 0, "wanted": ["clip"], "by": {"host": "h"}, "package": f"packages/{BLOB}.zip",
    "stages": {
        "clip": {"key": "k", "version": 1, "recipe": {}, "trajectory": "t", "trunk": "u", "inputs": {"pairs": "k"}}
    },
}  # fmt: skip
RELEASE = {"project": "p", "moves": [{"action": "promote", "bundle": "b", "evaluation": "e", "at": 0, "failed": []}]}


def acts(store: Store, path: str) -> tuple[Callable[[], object], ...]:
    """All that can be done to an object."""
    return (
        lambda: store.read(path),
        lambda: list(store.read_parts(path, [(0, 1)])),
        lambda: list(store.list(path)),
        lambda: store.create(path, b"1"),
        lambda: store.stat(path),
        lambda: store.swap(path, None, b"1"),
        lambda: store.delete([path]),
    )
