"""The feed: the right rows with the right images, captions and embeddings, on any number of workers."""

import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.tokens import tokenize
from models.view import open_view
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import Artifact, read_shards
from pipeline.store.records import blob_path
from pipeline.training.feed.feed import Feed, LocalBatch
from pipeline.training.recipes import DecoderRecipe
from tests.pipeline.training.conftest import World, make_world, rewritten

ALL = ("image", "tokens", "image_embedding", "text_embedding")
RECIPE = DecoderRecipe(samples=64, batch=16, lanes=8, window=5)


def make_feed(
    world: World,
    columns: tuple[str, ...] = ALL,
    rank: int = 0,
    size: int = 1,
    inputs: dict[str, Artifact] | None = None,
    recipe: DecoderRecipe = RECIPE,
    cache_mb: int = 512,
) -> Feed:
    task: Any = SimpleNamespace(columns=columns, min_side=64, image_size=24)
    return Feed(world.store, inputs or world.inputs, task, recipe, rank, size, cache_mb)


def before_curation(world: World) -> dict[str, Artifact]:
    """What CLIP trains on."""
    return {name: world.inputs[name] for name in ("pairs", "captions", "filter")}


def take(feed: Feed, steps: int, samples: int = 0) -> list[LocalBatch]:
    shares = feed.batches(samples)
    taken = list(islice(shares, steps))
    shares.close()
    return taken


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=SIZES, lanes=st.integers(1, 6), per_lane=st.integers(1, 3), size=st.integers(1, 9), seed=st.integers(0, 9))
def test_no_shape_hangs(tmp_path: Path, sizes: list[int], lanes: int, per_lane: int, size: int, seed: int) -> None:
    """Shards of one row, data sets smaller than a batch, unequal shares: every worker gets every step, within a minute,
    or all are told that no row teaches."""
    size = min(size, lanes * per_lane)
    recipe = DecoderRecipe(samples=64, batch=lanes * per_lane, lanes=lanes, window=2, seed=seed)
    world = make_world(Path(tempfile.mkdtemp(dir=tmp_path)), sizes)
    teaching = {e.key for e in world.examples.values() if e.split == "train" and e.key[-4:] != "0002"}
    teaching -= {f"{number:08d}{rows - 1:04d}" for number, rows in enumerate(sizes)}  # never fetched
    found: list[list[str]] = []

    def read() -> None:
        try:
            feeds = [make_feed(world, rank=rank, size=size, recipe=recipe) for rank in range(size)]
        except ValueError:
            found.append([])
            return
        for shares in zip(*(take(feed, 7) for feed in feeds), strict=True):
            found.append([key for share in shares for key in share.keys])

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if not teaching:
        assert found == [[]]
        return
    assert [len(keys) for keys in found] == [recipe.batch] * 7
    assert {key for keys in found for key in keys} <= teaching


def test_every_row_has_its_own_image_captions_and_embeddings(shared_world: World) -> None:
    for share in take(make_feed(shared_world), 6):
        for i, key in enumerate(share.keys):
            example = shared_world.examples[key]
            assert example.split == "train"
            view = open_view(example.jpeg, 24).transpose(2, 0, 1)
            assert np.array_equal(share.batch["image"][i].numpy(), view)
            assert np.array_equal(share.batch["image_embedding"][i].numpy(), example.image_embedding.astype(np.float32))
            told = zip(tokenize(example.captions or [""]), example.text_embeddings, strict=True)
            pairs = [(tokens.tolist(), embedding.tolist()) for tokens, embedding in told]
            assert (share.batch["tokens"][i].tolist(), share.batch["text_embedding"][i].tolist()) in pairs
        assert share.batch["image"].dtype == torch.uint8
        assert share.batch["image_embedding"].dtype == torch.float32


@pytest.mark.parametrize("size", [2, 3, 11, 16])
def test_workers_together_read_what_one_reads(shared_world: World, size: int) -> None:
    """Steps 0 to 7 cross an epoch's seam: 58 rows in 8 lanes of 8, two of each a step, which workers may share."""
    alone = take(make_feed(shared_world), 8)
    feeds = [make_feed(shared_world, rank=rank, size=size) for rank in range(size)]
    together = [take(feed, 8) for feed in feeds]
    for step, share in enumerate(alone):
        parts = [shares[step] for shares in together]
        assert share.keys == [key for part in parts for key in part.keys]
        drawn = [_drawn(part, 0, len(part.keys)) for part in (share, *parts)]
        assert torch.equal(drawn[0], torch.cat(drawn[1:]))
        last = parts[-1]
        assert torch.equal(_drawn(last, len(last.keys) - 1, len(last.keys)), drawn[0][-1:])
        for name, column in share.batch.items():
            assert torch.equal(column, torch.cat([part.batch[name] for part in parts]))


def _drawn(share: LocalBatch, start: int, stop: int) -> Tensor:
    return share.rng(torch.device("cpu"), start, stop).normal("noise", 2)


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


def test_a_feed_that_was_left_in_the_middle_of_a_share_begins_again(
    shared_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Does not wait for images that were still to be decoded then."""
    feed = make_feed(shared_world)
    expected = take(make_feed(shared_world), 3)

    def slowly(key: str, data: bytes, size: int, *, in_place: bool) -> np.ndarray:
        time.sleep(0.02)
        return open_view(data, size)

    monkeypatch.setattr("pipeline.training.feed.views.read_pair_pixels", slowly)
    take(feed, 1)
    again: list[LocalBatch] = []
    reader = threading.Thread(target=lambda: again.extend(take(feed, 3)), daemon=True)
    reader.start()
    reader.join(60)
    assert len(again) == 3
    assert all(torch.equal(a.batch["image"], b.batch["image"]) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("size", [1, 3])
def test_before_curation_rows_are_those_of_the_filter(shared_world: World, size: int) -> None:
    """On any number of workers all rows with a caption have their turn, and none without one."""
    inputs = before_curation(shared_world)
    feeds = [make_feed(shared_world, ("image", "tokens"), rank, size, inputs) for rank in range(size)]
    told = {key for key, example in shared_world.examples.items() if example.captions} - _last_rows(shared_world)
    wanted = {key for key in told if shared_world.examples[key].split == "train"}
    assert feeds[0].order.total == len(wanted) > 0
    taken = [take(feed, 2 * -(-len(wanted) // RECIPE.batch)) for feed in feeds]
    assert {key for shares in taken for share in shares for key in share.keys} == wanted
    assert set(taken[0][0].batch) == {"image", "tokens"}
    validation = {key for share in feeds[0].validation(100, 8) for key in share.keys}
    assert validation
    assert validation <= told


def with_captions(table: pa.Table, change: Callable[[int, list[str]], list[str]]) -> pa.Table:
    captions = [change(i, each) for i, each in enumerate(table["captions"].to_pylist())]
    return pa.table({"key": table["key"], "captions": captions})


@pytest.mark.parametrize("columns", [("tokens",), ("tokens", "text_embedding"), ("text_embedding",)])
def test_all_captions_of_a_row_have_their_turn(shared_world: World, columns: tuple[str, ...]) -> None:
    """With and without their embeddings; over 32 steps a row comes some nine times."""
    seen: dict[str, list[tuple[float, ...]]] = {}
    for share in take(make_feed(shared_world, columns), 32):
        for key, told in zip(share.keys, share.batch[columns[-1]].tolist(), strict=True):
            seen.setdefault(key, []).append(tuple(told))
    embedded, several, firsts = columns[-1] == "text_embedding", [], []
    for key, told in seen.items():
        example = shared_world.examples[key]
        there = example.text_embeddings if embedded else tokenize(example.captions or [""])
        expected = [tuple(each.tolist()) for each in there]
        assert set(told) <= set(expected)
        if len(expected) > 1:
            several.append(len(set(told)) == 2)
            firsts += [each == expected[0] for each in told]
    assert len(several) > 40
    assert np.mean(several) > 0.9
    assert 0.4 < np.mean(firsts) < 0.6


def test_a_recipe_may_read_the_first_caption_alone(shared_world: World) -> None:
    recipe = replace(RECIPE, captions="first")
    shares = take(make_feed(shared_world, ("tokens", "text_embedding"), recipe=recipe), 16)
    for share in shares:
        assert_first_captions(shared_world, share)
    assert sum(len(shared_world.examples[key].captions) > 1 for share in shares for key in share.keys) > 40


def assert_first_captions(world: World, share: LocalBatch) -> None:
    for key, tokens, text in zip(share.keys, share.batch["tokens"], share.batch["text_embedding"], strict=True):
        example = world.examples[key]
        assert torch.equal(tokens, tokenize((example.captions or [""])[:1])[0])
        assert np.array_equal(text.numpy(), example.text_embeddings[0].astype(np.float32))


def test_captions_that_were_not_embedded_are_not_chosen_with_embeddings(world: World) -> None:
    def with_one_more(table: pa.Table) -> pa.Table:
        return with_captions(table, lambda _, each: [*each, "never embedded"] if each else each)

    more = rewritten(world, "captions", with_one_more)
    for columns in (ALL, ("image", "tokens", "image_embedding")):  # a prior's, and the decoder's, which needs none
        feeds = (make_feed(each, columns) for each in (world, more))
        before, after = (torch.cat([share.batch["tokens"] for share in take(feed, 8)]) for feed in feeds)
        assert torch.equal(before, after) == ("text_embedding" in columns)


def test_validation_rows_are_always_the_same_and_have_their_first_caption(shared_world: World) -> None:
    first, second = (make_feed(shared_world, rank=rank, size=2).validation(9, 4) for rank in (0, 1))
    assert [share.keys for share in first] == [share.keys for share in second]
    assert [len(share.keys) for share in first] == [4, 4, 1]
    assert {shared_world.examples[key].split for share in first for key in share.keys} == {"validation"}
    assert len({seed for share in first for seed, _ in share.streams}) == 3
    for share in first:
        assert_first_captions(shared_world, share)


@pytest.mark.parametrize("missing", [False, True])
def test_a_changed_image_and_a_missing_blob_are_named(world: World, missing: bool) -> None:
    blob = blob_path(read_shards(world.store, world.inputs["pairs"])[1].blobs["images"])
    data = bytearray(world.store.read(blob))
    data[tarfile.BLOCKSIZE + 99] ^= 1  # in the first member, a training row
    world.store.delete([blob])
    if not missing:
        world.store.create(blob, bytes(data))
    with pytest.raises(CorruptObject, match="is missing" if missing else "another image") as caught:
        take(make_feed(world), 8)
    assert caught.value.path == blob


def test_a_row_without_embedding_is_named(world: World) -> None:
    fewer = rewritten(
        world, "captions", lambda table: table.filter([key[-4:] != "0000" for key in table["key"].to_pylist()])
    )
    with pytest.raises(ValueError, match="is in the index but not in its captions"):
        take(make_feed(fewer), 8)


def test_images_are_not_read_twice_while_there_is_room(shared_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = make_feed(shared_world, ("image",))
    epoch = take(feed, feed.order.lane_rows // 2)
    monkeypatch.setattr("pipeline.training.feed.views.read_pair_pixels", lambda *_, **__: pytest.fail("decoded again"))
    again = take(feed, len(epoch))
    assert all(torch.equal(a.batch["image"], b.batch["image"]) for a, b in zip(epoch, again, strict=True))


@pytest.mark.parametrize("room", [0, 3])
def test_a_full_cache_reads_again(shared_world: World, room: int) -> None:
    small, large = make_feed(shared_world, ("image",), cache_mb=0), make_feed(shared_world, ("image",))
    assert small.views.room == 0
    small.views.room = room
    for a, b in zip(take(small, 12), take(large, 12), strict=True):
        assert torch.equal(a.batch["image"], b.batch["image"])
    assert len(small.views._views) == room
