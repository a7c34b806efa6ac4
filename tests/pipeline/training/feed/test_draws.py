"""What a feed computes beside the training is what the loss would have computed, to the bit."""

import threading
from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
import torch

from models.image_configs import UpsamplerConfig
from models.random_streams import RandomStreams, StreamsSlice
from models.upsampler import Upsampler, upsampler_loss
from pipeline.training.feed.draws import PrecomputedStreams, StreamCall, make_numbers, use_one_thread
from pipeline.training.feed.feed import Feed, LocalBatch
from pipeline.training.recipes import UpsamplerRecipe
from pipeline.training.tasks.upsampler import UpsamplerTask
from tests.pipeline.training.conftest import World

CPU = torch.device("cpu")
CONFIG = UpsamplerConfig(low_size=16, image_size=64, channels=16, depth=1, multipliers=(1, 2), dropout=0.0, crop=0.5)
RECIPE = UpsamplerRecipe(samples=64, batch=8, lanes=4, model=CONFIG)
CALLS: list[StreamCall] = [
    ("normal", ("noise", 3, 4)),
    ("uniform", ("drop",)),
    ("integers", ("t", 9)),
    ("integers", ("u", 9, 2)),
]


def test_numbers_that_lie_ready_are_those_of_the_draw() -> None:
    """Of every part of a batch, with none, some or all of them ready; what was not ready is asked for."""
    streams = [(1, 2), (2, 3), (3, 1)]
    for known in range(len(CALLS) + 1):
        numbers, asked = make_numbers(streams, CALLS[:known]), set[StreamCall]()
        for start in range(6):
            for stop in range(start + 1, 7):
                part = StreamsSlice(RandomStreams(streams), start, stop)
                ready = PrecomputedStreams(part, start, stop, numbers, asked)
                assert ready.rows == stop - start
                for name, arguments in CALLS:
                    assert torch.equal(getattr(ready, name)(*arguments), getattr(part, name)(*arguments))
                assert torch.equal(ready.keep("drop", 0.3), part.keep("drop", 0.3))
                moved = ready.on("meta")
                assert all(getattr(moved, name)(*arguments).device.type == "meta" for name, arguments in CALLS)
                assert (ready.device.type, ready.part.device.type) == ("cpu", "cpu")
        assert asked == set(CALLS[known:])


def task(corruption: str) -> UpsamplerTask:
    return UpsamplerTask(replace(CONFIG, corruption=corruption))


def take(world: World, made: object, steps: int, rank: int = 0, size: int = 1) -> list[LocalBatch]:
    feed = Feed(world.store, world.inputs, made, RECIPE, rank, size)
    with closing(feed.batches(0)) as batches:
        return list(islice(batches, steps))


class Unprepared:
    """The same task without what it prepares."""

    def __init__(self, of: UpsamplerTask):
        self.columns, self.min_side, self.image_size = of.columns, of.min_side, of.image_size


@pytest.mark.parametrize("corruption", ["blur", "bsr", "bsr_light"])
def test_an_upsampler_s_loss_is_the_same_from_images_and_from_what_the_feed_made(
    shared_world: World, corruption: str
) -> None:
    made = task(corruption)
    model = Upsampler(made.config).eval()
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    plain = take(shared_world, Unprepared(made), 3)
    for before, after in zip(plain, take(shared_world, made, 3), strict=True):
        assert before.batch.keys() == {"image"}
        assert after.batch.keys() == {"crop", "low"}
        rng = RandomStreams(before.streams)
        with torch.no_grad():
            assert torch.equal(
                upsampler_loss(model, before.batch, rng).total, upsampler_loss(model, after.batch, rng).total
            )


@pytest.mark.parametrize("size", [2, 3])  # which share a lane, too
def test_workers_prepare_what_one_does(shared_world: World, size: int) -> None:
    alone = take(shared_world, task("bsr"), 3)
    together = zip(*(take(shared_world, task("bsr"), 3, rank, size) for rank in range(size)), strict=True)
    for one, parts in zip(alone, together, strict=True):
        for name, column in one.batch.items():
            assert torch.equal(column, torch.cat([part.batch[name] for part in parts]))


def test_a_loss_finds_its_numbers_ready_after_the_first_steps(
    shared_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = task("blur")
    model = Upsampler(made.config).eval()
    feed = Feed(shared_world.store, shared_world.inputs, made, RECIPE)
    with closing(feed.batches(0)) as batches:
        for step, local in enumerate(islice(batches, 9)):
            given = [
                (local.batch, local.rng(CPU, 0, 8)),
                ({n: c[3:5] for n, c in local.batch.items()}, local.rng(CPU, 3, 5)),
            ]
            expected = [
                upsampler_loss(model, rows, StreamsSlice(RandomStreams(local.streams), *cut)).total
                for (rows, _), cut in zip(given, [(0, 8), (3, 5)], strict=True)
            ]
            with monkeypatch.context() as patch:
                if step == 8:  # those that were ahead when the first loss was computed are through
                    patch.setattr(torch, "Generator", lambda: pytest.fail("drawn in the training's thread"))
                    patch.setattr("models.upsampler.corrupted_low", lambda *_: pytest.fail("damaged there"))
                found = [upsampler_loss(model, *each).total for each in given]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert feed.asked == {("integers", ("t", 1000)), ("normal", ("noise", 3, 32, 32))}


def test_one_thread_computes_on_one_thread() -> None:
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        for first in (use_one_thread, lambda: None):

            def work(first: object = first) -> None:
                first()
                torch.ones(4).sum()
                found.append(torch.get_num_threads())

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert found == [1, 3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
