"""What a feed computes beside the training is what the loss would have computed, to the bit."""

import threading
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from models.image_configs import UpsamplerConfig
from models.random_streams import RandomStreams
from models.upsampler import Upsampler, upsampler_loss
from pipeline.training.feed.feed import Feed, LocalBatch, use_one_thread
from pipeline.training.recipes import UpsamplerRecipe
from pipeline.training.tasks.upsampler import UpsamplerTask
from tests.pipeline.training.conftest import World

CONFIG = UpsamplerConfig(low_size=16, image_size=64, channels=16, depth=1, multipliers=(1, 2), dropout=0.0, crop=0.5)
RECIPE = UpsamplerRecipe(samples=64, batch=8, lanes=4, model=CONFIG)


class Unprepared:
    """An upsampler's task without what it prepares."""

    columns, min_side, image_size = ("image",), 64, 64


def take(world: World, task: Any, rank: int = 0, size: int = 1) -> list[LocalBatch]:
    """The first three batches of a worker."""
    with closing(Feed(world.store, world.inputs, task, RECIPE, rank, size).batches(0)) as batches:
        return list(islice(batches, 3))


@pytest.mark.parametrize("corruption", ["blur", "bsr", "bsr_light"])
def test_an_upsamplers_loss_is_the_same_from_images_and_from_what_one_or_several_feeds_made(
    shared_world: World, corruption: str
) -> None:
    """Three workers share a lane, too."""
    task = UpsamplerTask(replace(CONFIG, corruption=corruption))
    model = Upsampler(task.config).eval()
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    plain, prepared = take(shared_world, Unprepared()), take(shared_world, task)
    for before, after in zip(plain, prepared, strict=True):
        assert (before.batch.keys(), after.batch.keys()) == ({"image"}, {"crop", "low"})
        rng = RandomStreams(before.streams)
        with torch.no_grad():
            expected, found = (upsampler_loss(model, batch, rng).total for batch in (before.batch, after.batch))
        assert torch.equal(found, expected)
    for size in (2, 3) if corruption == "bsr" else ():
        together = zip(*(take(shared_world, task, rank, size) for rank in range(size)), strict=True)
        for one, parts in zip(prepared, together, strict=True):
            for name, column in one.batch.items():
                assert torch.equal(column, torch.cat([part.batch[name] for part in parts]))


def test_one_thread_computes_on_one_thread() -> None:
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        for first in (use_one_thread, lambda: None):

            def work(first: Any = first) -> None:
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
