"""An exchange brings every partition its rows in order, by requests that grow with the packs, and finds damage."""

import tempfile
from collections import Counter
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.curation.stage import CURATION, CurationRecipe
from pipeline.data.neighbours.exchange import Fan, exchange, read_columns, to_piece
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import Shard, publish_shard
from pipeline.graph.packs import HEAD, read_pieces, write_pack
from pipeline.ledger import Ledger
from pipeline.store import Store, open_store
from pipeline.store.records import blob_path, put_blob
from tests.pipeline.data.vectors import CountedStore, context

PIECES = [b"first", b"", bytes(range(256)) * 40, b"last"]


def put(store: Store, pieces: list[bytes]) -> str:
    output = write_pack(pieces, len(pieces))
    return put_blob(store, output.blobs["pack"])


def exchanged(store: Store, tables: list[np.ndarray], fan: Fan) -> list[list[dict[str, np.ndarray]]]:
    """Rows of each exchange and partition, of tables with numbers of rows [packs, partitions]; rows are numbered."""
    written = []
    for number, sizes in enumerate(tables):
        ends = np.cumsum(sizes.reshape(-1)).reshape(sizes.shape)
        packs: list[Shard] = []
        for pack, (own, counts) in enumerate(zip(ends.tolist(), sizes.tolist(), strict=True)):
            rows = [np.arange(end - count, end) for end, count in zip(own, counts, strict=True)]
            output = write_pack([to_piece({"row": row, "wide": np.stack([row, row], 1)}) for row in rows], len(rows))
            key = f"pack-{number}-{pack}"
            packs.append(publish_shard(store, "curation", pack, key, Ledger(kept=1), output.blobs, {}))
        written.append((packs, sizes.shape[1]))
    ctx = context(store, replace(CURATION, recipe=CurationRecipe(), inputs=()), {})
    return [[read_columns(store, each) for each in partitions] for partitions in exchange(ctx, written, fan, "merges")]


@settings(max_examples=20)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(st.integers(1, 17), st.integers(1, 9)), min_size=1, max_size=2),
    st.integers(2, 4),
    st.integers(1, 4),
)
def test_every_partition_gets_its_rows_in_order(
    seed: int, shapes: list[tuple[int, int]], packs: int, parts: int
) -> None:
    """Of several exchanges at once, however packs are merged, and where pieces, packs and partitions are empty."""
    g = np.random.default_rng(seed)
    tables = [g.integers(0, 4, shape) * (g.random(shape) < 0.6) for shape in shapes]
    with tempfile.TemporaryDirectory() as folder:
        found = exchanged(open_store(folder), tables, Fan(packs, parts))
    for sizes, partitions in zip(tables, found, strict=True):
        ends = np.cumsum(sizes.reshape(-1)).reshape(sizes.shape)
        for partition, columns in enumerate(partitions):
            each = [np.arange(end - n, end) for end, n in zip(ends[:, partition], sizes[:, partition], strict=True)]
            rows = np.concatenate(each)
            if len(rows):
                np.testing.assert_array_equal(columns["row"], rows)
                np.testing.assert_array_equal(columns["wide"], np.stack([rows, rows], 1))
            else:
                assert columns == {}


@pytest.mark.parametrize("many", [4, 16, 64])
def test_requests_and_objects_grow_with_the_packs(tmp_path: Path, many: int) -> None:
    """Were each piece read by itself, they would grow with the square."""
    store = CountedStore(open_store(str(tmp_path)))
    exchanged(store, [np.ones((many, many), int)], Fan(2, 4))
    merges = round(log(many / 4, 2))  # until there are four runs
    assert Counter(path.partition("/")[0] for path in store.created)["shards"] == many * (1 + 2 * merges)
    assert len(store.read_paths) <= many * (2 * 4 * (merges + 1) + 4 * merges + 1)


def test_each_piece_comes_back(store: Store) -> None:
    pack = put(store, PIECES)
    for start in range(4):
        for stop in range(start + 1, 5):
            assert read_pieces(store, pack, start, stop) == PIECES[start:stop]


def test_any_changed_byte_of_a_piece_or_of_its_place_is_found(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    pack = put(store, PIECES)
    file = tmp_path / blob_path(pack)
    whole = file.read_bytes()
    for number, start in ((0, 4 * HEAD), (3, len(whole) - len(PIECES[3]))):
        own = [*range(number * HEAD, (number + 1) * HEAD), *range(start, start + len(PIECES[number]))]
        for at in own:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :])
            with pytest.raises(CorruptObject, match=rf"(place for|in) piece {number}|piece {number} than"):
                read_pieces(store, pack, number, number + 1)
            with pytest.raises(CorruptObject):
                read_pieces(store, pack, 0, 4)
    file.write_bytes(whole[: len(whole) - 1])
    assert read_pieces(store, pack, 0, 3) == PIECES[:3]
    with pytest.raises(CorruptObject, match="other bytes in piece 3"):
        read_pieces(store, pack, 2, 4)
    file.write_bytes(whole[:HEAD])
    with pytest.raises(CorruptObject, match="damaged place for piece 1"):
        read_pieces(store, pack, 0, 2)
    file.unlink()
    with pytest.raises(CorruptObject, match="is missing"):
        read_pieces(store, pack, 0, 1)
