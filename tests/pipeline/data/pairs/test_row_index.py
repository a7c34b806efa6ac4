import hashlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.pairs.row_index import GAP, READERS, STAGE_SIDES, Place, index_counts, read_images
from pipeline.errors import CorruptObject
from pipeline.store import Store
from pipeline.store.records import blob_path, put_blob
from tests.counted import Counted


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _row(data: bytes, offset: int, **changes: Any) -> dict[str, Any]:
    place = {"tar": None, "offset": offset, "size": len(data)}
    return {"key": f"{offset:012d}", "sha256": _sha256(data), **place} | changes


def _read(store: Store, blob: str, rows: Sequence[dict[str, Any]]) -> list[bytes]:
    return read_images(store, [Place.of(row, blob) for row in rows])


def _packed(sizes: list[int], gap: int) -> tuple[bytes, list[dict[str, Any]]]:
    """Members with ``gap`` bytes before each, and their rows."""
    packed, rows = b"", []
    for i, size in enumerate(sizes):
        packed += bytes(gap)
        member = bytes([i + 1]) * size
        rows.append(_row(member, len(packed)))
        packed += member
    return packed, rows


@pytest.mark.parametrize("gap", [0, 512, GAP, GAP + 1])
def test_pictures_come_in_the_order_of_the_rows(store: Store, gap: int) -> None:
    packed, rows = _packed([10, 700, 3, 4096, 1], gap)
    blob = put_blob(store, packed)
    wanted = [rows[i] for i in (3, 0, 4, 4, 1)]
    found = _read(store, blob, wanted)
    assert [_sha256(data) for data in found] == [row["sha256"] for row in wanted]
    assert _read(store, blob, []) == []


@pytest.mark.parametrize(("gap", "reads"), [(512, 1), (GAP, 1), (GAP + 1, 6)])
def test_neighbours_are_read_together(store: Store, gap: int, reads: int) -> None:
    packed, rows = _packed([100] * 6, gap)
    counted: Any = Counted(store)
    _read(counted, put_blob(store, packed), rows)
    assert counted.calls["read_parts"] == reads


def test_groups_are_read_at_once(store: Store) -> None:
    packed, rows = _packed([100] * READERS, GAP + 1)
    together = threading.Barrier(READERS, timeout=30)

    class Meeting(Counted):
        def read_parts(self, path: str, parts: Sequence[tuple[int, int]]) -> Iterator[bytes]:
            together.wait()
            return store.read_parts(path, parts)

    meeting: Any = Meeting(store)
    assert len(_read(meeting, put_blob(store, packed), rows)) == READERS


def test_rows_of_own_blob_and_of_tars_mix(store: Store, tmp_path: Any) -> None:
    packed, rows = _packed([5, 6], 10)
    (tmp_path / "a.tar").write_bytes(b"..." + b"theirs")
    theirs = _row(b"theirs", 3, tar=str(tmp_path / "a.tar"))
    found = _read(store, put_blob(store, packed), [rows[1], theirs, rows[0]])
    assert found == [bytes([2]) * 6, b"theirs", bytes([1]) * 5]


def test_damage_is_named(store: Store) -> None:
    packed, rows = _packed([5, 6], 10)
    blob = put_blob(store, packed)
    with pytest.raises(CorruptObject, match=rows[1]["key"]) as caught:
        _read(store, blob, [rows[0], rows[1] | {"sha256": "0" * 64}])
    assert caught.value.path == blob_path(blob)
    store.delete([blob_path(blob)])
    with pytest.raises(CorruptObject, match="is missing"):
        _read(store, blob, rows)


def test_counts_by_split_and_side() -> None:
    def row(split: str, width: int, height: int, status: str = "kept") -> dict[str, Any]:
        return {"split": split, "width": width, "height": height, "status": status}

    lost = {"split": "train", "width": None, "height": None, "status": "rejected"}
    rows = [row("train", 63, 2000), row("train", 64, 64), row("train", 1024, 1500), row("test", 300, 256), lost]
    counts = index_counts(rows)
    assert {k: n for k, n in counts.items() if n} == {
        "train/0": 3, "train/64": 2, "train/256": 1, "train/1024": 1, "test/0": 1, "test/64": 1, "test/256": 1,
    }  # fmt: skip
    assert len(counts) == 3 * len(STAGE_SIDES)


def test_an_index_names_no_file_but_tars(store: Store, tmp_path: Path) -> None:
    for name, sound in (("a.tar", True), ("a.png", False), ("tar", False)):
        (tmp_path / name).write_bytes(b"...mine...")
        place = Place.of(_row(b"mine", 3, tar=str(tmp_path / name)), None)
        if sound:
            assert read_images(store, [place]) == [b"mine"]
        else:
            with pytest.raises(CorruptObject, match="is not a tar"):
                read_images(store, [place])
