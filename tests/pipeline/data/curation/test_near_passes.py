"""Many pieces in one blob: each comes back by itself, and damage anywhere that matters to it is found."""

from pathlib import Path

import pytest

from pipeline.data.curation.near_passes import HEAD, pack, read_piece
from pipeline.errors import CorruptObject
from pipeline.store import Store
from pipeline.store.records import blob_path, put_blob

PIECES = [b"first", b"", bytes(range(256)) * 40, b"last"]


def test_each_piece_comes_back(store: Store) -> None:
    blob = put_blob(store, pack(iter(PIECES), len(PIECES)))
    assert [read_piece(store, blob, i) for i in (2, 0, 3, 1)] == [PIECES[i] for i in (2, 0, 3, 1)]


def test_no_pieces_are_no_bytes() -> None:
    assert pack([], 0) == b""


def test_any_changed_byte_of_a_piece_or_of_its_place_is_found(tmp_path: Path) -> None:
    from pipeline.store import open_store

    store = open_store(str(tmp_path))
    blob = put_blob(store, pack(PIECES, len(PIECES)))
    file = tmp_path / blob_path(blob)
    whole = file.read_bytes()
    begins = len(pack([b""] * 4, 4))
    for number, start in ((0, begins), (3, len(whole) - len(PIECES[3]))):
        own = [*range(number * HEAD, (number + 1) * HEAD), *range(start, start + len(PIECES[number]))]
        for at in own:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :])
            with pytest.raises(CorruptObject, match=rf"(place for|in) piece {number}|piece {number} than"):
                read_piece(store, blob, number)
    file.write_bytes(whole[: len(whole) - 1])
    assert read_piece(store, blob, 2) == PIECES[2]
    with pytest.raises(CorruptObject, match="other bytes in piece 3"):
        read_piece(store, blob, 3)
    file.write_bytes(whole[:HEAD])
    with pytest.raises(CorruptObject, match="damaged place for piece 1"):
        read_piece(store, blob, 1)
    file.unlink()
    with pytest.raises(CorruptObject, match="is missing"):
        read_piece(store, blob, 0)
