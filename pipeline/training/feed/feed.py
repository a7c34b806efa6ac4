"""Batches for one worker: what the order names, read and decoded ahead of the training in threads of their own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import torch

from models.draw import derive_seed
from pipeline.data.pairs.row_index import Place
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.store import Store
from pipeline.training.feed.order import Order, lanes_of
from pipeline.training.feed.pictures import CACHE_MB, Pictures, View, at_once
from pipeline.training.feed.read_ahead import read_ahead
from pipeline.training.feed.tables import Row, Tables
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.task import Batch, Contrastive, Task

READERS = 8  # windows that are read at once
AHEAD = 0.75  # of the windows in use, after which all lanes have begun to read the next


class Share(NamedTuple):
    """A worker's rows of one step.

    ``batch``: "image" uint8 [b, 3, s, s], "tokens" int64 [b, 77], "image_embedding" and "text_embedding" fp32 [b, d],
    as far as the task's columns ask. ``keys``: of the rows. ``streams``: (seed, rows) lane by lane, for a Draw.
    """

    batch: Batch
    keys: list[str]
    streams: list[tuple[int, int]]


class Begun(NamedTuple):
    """A share on its way: its rows, which of its captions each is told, and the views that are being decoded."""

    rows: list[Row]
    choices: list[int]
    views: list[View]
    streams: list[tuple[int, int]]


class Window(NamedTuple):
    """What a lane is reading: [start, stop) in lane positions, the rows there, and their pictures not yet decoded."""

    start: int
    stop: int
    rows: list[Row]
    pictures: dict[Place, bytes]


class Windows:
    """The windows of some lanes from ``position`` on, each read by a pool of threads before it is needed.

    All lanes come to the end of a window at the same step. Their next windows are read one lane after the other,
    while three quarters of the present ones are used: so reads are spread, and what waits in memory is at no time more
    than some five quarters of a window of every lane.
    """

    def __init__(self, read: Callable[[int, int], Window], lanes: range, pool: Executor, position: int):
        self._read, self._pool, self._lanes = read, pool, lanes
        self._coming = {lane: pool.submit(read, lane, position) for lane in lanes}
        self._present: dict[int, Window] = {}

    def at(self, lane: int, position: int) -> Window:
        """The window of a lane that holds a position; positions rise. Raises what reading it raised."""
        window = self._present.get(lane)
        if window is None or position >= window.stop:
            window = self._present[lane] = self._coming.pop(lane).result()
        turn = AHEAD * (lane - self._lanes.start) / len(self._lanes)
        due = position + 1 == window.stop or position - window.start >= turn * (window.stop - window.start)
        if due and lane not in self._coming:
            self._coming[lane] = self._pool.submit(self._read, lane, window.stop)
        return window


class Feed:
    """The training rows of a task in the order of its recipe, and its validation rows.

    The share of a step holds batch / lanes rows of every lane that this worker owns, lane after lane. Decoded pictures
    stay in memory up to ``cache_mb`` MiB. Rows without a caption are neither to a task that compares captions. Raises
    ValueError if there are no training rows, UserError if none of them has a caption.
    """

    def __init__(
        self,
        store: Store,
        inputs: Mapping[str, Artifact],
        task: Task,
        recipe: TrainingRecipe,
        rank: int = 0,
        world: int = 1,
        cache_mb: int = CACHE_MB,
    ):
        self.columns, self.recipe = task.columns, recipe
        self.lanes = lanes_of(rank, world, recipe.lanes)
        contrastive = isinstance(task, Contrastive)
        self.tables = Tables(
            store, inputs, task.columns, "train", task.min_side, 2 * len(self.lanes), captioned=contrastive
        )
        if self.tables.without_caption and not any(self.tables.counts):
            raise UserError(
                f"none of the {self.tables.without_caption:,} training rows has a caption to compare its image with; "
                "give them captions, or take a CLIP that exists (clip.weights)"
            )
        self.held_out = self.tables.of("validation")
        self.pictures = Pictures(store, task.image_size, cache_mb)
        self.order = Order(self.tables.counts, recipe.lanes, recipe.window, recipe.seed)

    def shares(self, samples: int) -> Generator[Share, None, None]:
        """This worker's share of every step, for ever, beginning after ``samples`` samples (a multiple of batch).

        Raises CorruptObject for a stored object that cannot be trusted.
        """
        return read_ahead(self._shares(samples // self.recipe.batch))

    def validation(self, rows: int, size: int) -> list[Share]:
        """At most ``rows`` validation rows, always the same ones, in batches of ``size``."""
        found = self.held_out.first(rows)
        shares = []
        for start in range(0, len(found), size):
            part = found[start : start + size]
            views = self._views(part, self.pictures.fetch(row.place for row in part if row.place))
            streams = [(derive_seed(self.recipe.seed, "validation", start), len(part))]
            shares.append(self._share(Begun(part, [0] * len(part), views, streams)))
        return shares

    def _shares(self, step: int) -> Iterator[Share]:
        # One more decoder than cores: one of them waits for the interpreter as a rule.
        readers = ThreadPoolExecutor(READERS, "read")
        decoders = ThreadPoolExecutor(torch.get_num_threads() + 1, "decode")
        windows = Windows(self._read, self.lanes, readers, step * self.recipe.batch // self.recipe.lanes)
        try:
            coming = self._begin(step, windows, decoders)
            while True:
                # The next share is decoded while this one is put together, so that decoders never stand still.
                step, present = step + 1, coming
                coming = self._begin(step, windows, decoders)
                yield self._share(present)
        finally:
            readers.shutdown(cancel_futures=True)
            decoders.shutdown()  # views are kept for whoever asks next: one that was cancelled would never come

    def _read(self, lane: int, position: int) -> Window:
        """What is left of a lane's window from a position on."""
        start, stop = position, self.order.window_at(position)[1]
        rows = self.tables.read(self.order.rows(lane, start, stop))
        return Window(start, stop, rows, self.pictures.fetch(row.place for row in rows if row.place))

    def _begin(self, step: int, windows: Windows, decoders: Executor) -> Begun:
        per_lane = self.recipe.batch // self.recipe.lanes
        rows: list[Row] = []
        choices: list[int] = []
        pictures: dict[Place, bytes] = {}
        for lane in self.lanes:
            for position in range(step * per_lane, (step + 1) * per_lane):
                window = windows.at(lane, position)
                row = window.rows[position - window.start]
                if row.place in window.pictures:
                    pictures[row.place] = window.pictures.pop(row.place)
                rows.append(row)
                choices.append(derive_seed(self.recipe.seed, "caption", lane, position))
        streams = [(derive_seed(self.recipe.seed, lane, step), per_lane) for lane in self.lanes]
        return Begun(rows, choices, self._views(rows, pictures, decoders.submit), streams)

    def _views(
        self, rows: Sequence[Row], pictures: dict[Place, bytes], submit: Callable[..., View] = at_once
    ) -> list[View]:
        return self.pictures.views(_places(rows), pictures, submit) if "image" in self.columns else []

    def _share(self, begun: Begun) -> Share:
        """The columns that the task asks for. Choices pick one of each row's captions.

        With text embeddings, one of those that were embedded, and its embedding.
        """
        from models.tokens import tokenize

        batch: Batch = {}
        rows = begun.rows
        picked = [choice % row.versions for row, choice in zip(rows, begun.choices, strict=True)]
        if "tokens" in self.columns:
            batch["tokens"] = tokenize([(row.captions or [""])[i] for row, i in zip(rows, picked, strict=True)])
        if "image_embedding" in self.columns:
            batch["image_embedding"] = torch.from_numpy(
                np.stack([row.image_embedding for row in rows if row.image_embedding is not None])
            )
        if "text_embedding" in self.columns:
            batch["text_embedding"] = torch.from_numpy(
                np.stack(
                    [r.text_embeddings[i] for r, i in zip(rows, picked, strict=True) if r.text_embeddings is not None]
                )
            )
        if "image" in self.columns:
            wait(begun.views)  # once for all: to be woken for each would disturb the decoders
            batch["image"] = torch.from_numpy(np.stack([view.result() for view in begun.views]))
        return Share(batch, [row.key for row in rows], begun.streams)


def _places(rows: Sequence[Row]) -> list[Place]:
    for row in rows:
        if row.place is None:
            raise UserError(
                f"row {row.key} has an imported embedding and no picture to learn from: take it off the list"
            )
    return [row.place for row in rows if row.place]
