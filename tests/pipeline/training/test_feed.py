"""The feed: the right rows with the right pictures, captions and embeddings, on any number of workers."""

import tarfile
import threading
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from models.clip import tokenize
from models.view import open_view
from pipeline.artifacts import Artifact, Shard, read_shards, read_table, write_shard_table, write_table
from pipeline.errors import CorruptObject
from pipeline.ledger import Ledger
from pipeline.records import blob_path, put_blob
from pipeline.training.feed import Feed, Share
from pipeline.training.read_ahead import read_ahead
from pipeline.training.recipes import DecoderRecipe
from pipeline.training.tables import Tables, embedding_dim
from tests.pipeline.training.conftest import EMBED_DIM, World

ALL = ("image", "tokens", "image_embedding", "text_embedding")
RECIPE = DecoderRecipe(samples=64, batch=16, lanes=8, window=5)


def make_feed(
    world: World,
    columns: tuple[str, ...] = ALL,
    rank: int = 0,
    size: int = 1,
    inputs: dict[str, Artifact] | None = None,
) -> Feed:
    task: Any = SimpleNamespace(columns=columns, min_side=64, image_size=24)
    return Feed(world.store, inputs or world.inputs, task, RECIPE, rank, size)


def take(feed: Feed, steps: int, samples: int = 0) -> list[Share]:
    shares = feed.shares(samples)
    taken = list(islice(shares, steps))
    shares.close()
    return taken


def test_every_row_has_its_own_picture_captions_and_embeddings(shared_world: World) -> None:
    for share in take(make_feed(shared_world), 6):
        for i, key in enumerate(share.keys):
            example = shared_world.examples[key]
            assert example.split == "train"
            view = open_view(example.jpeg, 24).transpose(2, 0, 1)
            assert np.array_equal(share.batch["image"][i].numpy(), view)
            assert torch.equal(share.batch["tokens"][i], tokenize(example.captions[:1])[0])
            for name in ("image_embedding", "text_embedding"):
                assert np.array_equal(share.batch[name][i].numpy(), getattr(example, name).astype(np.float32))
        assert share.batch["image"].dtype == torch.uint8
        assert share.batch["image_embedding"].dtype == torch.float32


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_workers_together_read_what_one_reads(shared_world: World, size: int) -> None:
    """Steps 0 to 7 cross an epoch's seam: 58 rows in 8 lanes of 8, two of each a step."""
    alone = take(make_feed(shared_world), 8)
    feeds = [make_feed(shared_world, rank=rank, size=size) for rank in range(size)]
    together = [take(feed, 8) for feed in feeds]
    for step, share in enumerate(alone):
        parts = [shares[step] for shares in together]
        assert share.keys == [key for part in parts for key in part.keys]
        assert share.streams == [stream for part in parts for stream in part.streams]
        for name, column in share.batch.items():
            assert torch.equal(column, torch.cat([part.batch[name] for part in parts]))


def test_an_epoch_holds_every_curated_training_row(shared_world: World) -> None:
    feed = make_feed(shared_world)
    keys = {key for share in take(feed, feed.order.lane_rows // 2) for key in share.keys}
    wanted = {
        key
        for key, example in shared_world.examples.items()
        if example.split == "train" and not key.endswith("0002") and key not in _last_rows(shared_world)
    }
    assert keys == wanted


def _last_rows(world: World) -> set[str]:
    return {max(key for key in world.examples if key.startswith(f"{shard:08d}")) for shard in range(4)}


def test_a_feed_goes_on_from_any_position(shared_world: World) -> None:
    whole = take(make_feed(shared_world), 7)
    rest = take(make_feed(shared_world), 3, samples=4 * RECIPE.batch)
    for share, again in zip(whole[4:], rest, strict=True):
        assert share.keys == again.keys
        assert share.streams == again.streams
        assert all(torch.equal(share.batch[name], again.batch[name]) for name in ALL)


def test_before_curation_rows_are_those_of_pairs(shared_world: World) -> None:
    inputs = {name: shared_world.inputs[name] for name in ("pairs", "captions")}
    feed = make_feed(shared_world, ("image", "tokens"), inputs=inputs)
    assert feed.order.total == make_feed(shared_world).order.total + 4  # curation dropped one row a shard
    assert set(take(feed, 1)[0].batch) == {"image", "tokens"}


def test_without_text_embeddings_all_captions_have_their_turn(shared_world: World) -> None:
    seen: dict[str, set[tuple[int, ...]]] = {}
    for share in take(make_feed(shared_world, ("tokens",)), 32):
        for key, tokens in zip(share.keys, share.batch["tokens"].tolist(), strict=True):
            seen.setdefault(key, set()).add(tuple(tokens))
    for key, captions in seen.items():
        assert captions <= {tuple(t) for t in tokenize(shared_world.examples[key].captions).tolist()}
    assert sum(len(captions) == 2 for captions in seen.values()) > len(seen) / 2


def test_validation_rows_are_always_the_same(shared_world: World) -> None:
    first, second = (make_feed(shared_world, rank=rank, size=2).validation(9, 4) for rank in (0, 1))
    assert [share.keys for share in first] == [share.keys for share in second]
    assert [len(share.keys) for share in first] == [4, 4, 1]
    assert {shared_world.examples[key].split for share in first for key in share.keys} == {"validation"}
    assert len({seed for share in first for seed, _ in share.streams}) == 3


def test_small_pictures_do_not_teach(shared_world: World) -> None:
    tables = Tables(shared_world.store, shared_world.inputs, ("image",), "train", min_side=256)
    assert sum(tables.counts) == 0
    assert tables.first(5) == []


def test_a_changed_picture_is_found_and_named(world: World) -> None:
    blob = blob_path(read_shards(world.store, world.inputs["pairs"])[1].blobs["images"])
    data = bytearray(world.store.read(blob))
    data[tarfile.BLOCKSIZE + 99] ^= 1  # in the first member, a training row
    world.store.delete([blob])
    world.store.create(blob, bytes(data))
    with pytest.raises(CorruptObject) as caught:
        take(make_feed(world), 8)
    assert caught.value.path == blob


def test_a_missing_blob_is_named(world: World) -> None:
    blob = blob_path(read_shards(world.store, world.inputs["pairs"])[0].blobs["images"])
    world.store.delete([blob])
    with pytest.raises(CorruptObject, match="is missing") as caught:
        take(make_feed(world), 8)
    assert caught.value.path == blob


def test_a_row_without_embedding_is_named(world: World) -> None:
    shards = [replace(shard, blobs={"captions": _without_first(world, shard)}) for shard in _shards(world)]
    table, _ = write_shard_table(world.store, shards)
    captions = replace(world.inputs["captions"], shard_table=table)
    with pytest.raises(ValueError, match="is in the index but not in its captions"):
        take(make_feed(world, inputs=world.inputs | {"captions": captions}), 8)


def _shards(world: World) -> list[Shard]:
    rows = read_shards(world.store, world.inputs["captions"])
    return [Shard(row.number, row.key, Ledger(kept=row.kept), row.blobs, row.counts) for row in rows]


def _without_first(world: World, shard: Shard) -> str:
    table = read_table(world.store, shard.blobs["captions"])
    return put_blob(world.store, write_table(table.filter([key[-4:] != "0000" for key in table["key"].to_pylist()])))


def test_pictures_are_not_read_twice_while_there_is_room(shared_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = make_feed(shared_world, ("image",))
    epoch = take(feed, feed.order.lane_rows // 2)
    monkeypatch.setattr("pipeline.training.pictures.open_view", lambda data, size: pytest.fail("decoded again"))
    feed._windows.clear()
    again = take(feed, len(epoch))
    assert all(torch.equal(a.batch["image"], b.batch["image"]) for a, b in zip(epoch, again, strict=True))


def test_a_full_cache_reads_again(shared_world: World) -> None:
    small, large = make_feed(shared_world, ("image",)), make_feed(shared_world, ("image",))
    small.pictures.room = 3
    for a, b in zip(take(small, 12), take(large, 12), strict=True):
        assert torch.equal(a.batch["image"], b.batch["image"])
    assert len(small.pictures._views) == 3


def test_embedding_dimension_is_read(shared_world: World) -> None:
    assert embedding_dim(shared_world.store, shared_world.inputs["embeddings"]) == EMBED_DIM


def test_reading_ahead_passes_items_then_the_error() -> None:
    def source() -> Any:
        yield 1
        yield 2
        raise OSError("the disk is gone")

    items = read_ahead(source())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="disk is gone"):
        next(items)


def test_reading_ahead_stops_when_closed() -> None:
    made = []

    def source() -> Any:
        for i in range(1_000_000):
            made.append(i)
            yield i

    items = read_ahead(source(), depth=2)
    next(items)
    items.close()
    assert len(made) <= 5
    assert "read ahead" not in {thread.name for thread in threading.enumerate()}
