"""What a collection finds is marked, and deleted by a later one once the grace is over; marks may be damaged."""

import gzip
import time
import tracemalloc
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.store import Store
from pipeline.store.records import blob_path, put_blob, read_blob
from pipeline.upkeep import collect as module
from pipeline.upkeep.collect import MOST_UNPACKED, TOMBSTONES
from tests.pipeline.upkeep.runs import DAY, NOW, look, paths


def test_nothing_is_deleted_before_the_grace_is_over_nor_without_being_asked(store: Store) -> None:
    put_blob(store, b"garbage")
    before = paths(store)
    for now in (NOW, NOW + DAY - 1):
        assert look(store, now).garbage["blobs"].objects == 1
    assert look(store, NOW + 2 * DAY, delete=False).garbage["blobs"].objects == 1
    assert paths(store) == before
    assert look(store, NOW + DAY).deleted["blobs"].objects == 1
    assert paths(store) == set()


def test_the_grace_goes_by_the_stores_clock_not_by_this_machines(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.cli import main

    blob = put_blob(store, b"garbage")
    config = tmp_path / "p.yaml"
    config.write_text(f"project: p\npreset: nano\nstore: {store.url}\nsource: {{paths: ['drawings:nano']}}\n")
    collect_it = ["data", "gc", str(config), "--yes"]
    assert main(collect_it) == 0
    ahead = time.time() + 2 * DAY
    monkeypatch.setattr(time, "time", lambda: ahead)
    assert main(collect_it) == 0
    assert read_blob(store, blob) == b"garbage"


def test_two_collections_at_once_are_one_too_many(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put_blob(store, b"garbage")
    original = module.find_live

    def meanwhile(*given: object) -> object:
        store.swap(TOMBSTONES, None, b"")
        return original(*given)

    monkeypatch.setattr(module, "find_live", meanwhile)
    with pytest.raises(UserError, match="another collection"):
        look(store)


DAMAGE = {
    "empty": b"",
    "plain": b"no gzip",
    "half": gzip.compress(b"{}")[:9],
    "no JSON": gzip.compress(b"[1"),
    "number": gzip.compress(b"1"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_with_damaged_marks_the_grace_period_begins_again(
    store: Store, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    blob = put_blob(store, b"garbage")
    look(store)
    marked = store.stat(TOMBSTONES)
    assert store.swap(TOMBSTONES, marked.version, damage)
    look(store, NOW + 2 * DAY)
    assert "tombstones.json.gz is damaged" in caplog.text
    assert read_blob(store, blob) == b"garbage"
    look(store, NOW + 4 * DAY)
    assert store.stat(blob_path(blob)) is None


def test_marks_that_unpack_to_gibibytes_are_damaged(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Else whoever may write to the store ends every collection, and with it forgetting, for want of memory."""
    blob = put_blob(store, b"garbage")
    spaces = gzip.compress(bytes([32]) * (64 << 20), 1)  # 64 MiB, which JSON passes over
    begin, end = (gzip.compress(data) for data in (f'{{"{blob_path(blob)}": 0.0'.encode(), b"}"))
    store.swap(TOMBSTONES, None, begin + spaces * 24 + end)
    tracemalloc.start()
    try:
        look(store)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 3 * MOST_UNPACKED
    assert "tombstones.json.gz is damaged" in caplog.text
    assert read_blob(store, blob) == b"garbage"
    look(store, NOW + DAY)
    assert store.stat(blob_path(blob)) is None
