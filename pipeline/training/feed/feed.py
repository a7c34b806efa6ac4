"""Makes the batches of one worker in threads, ahead of the training.

They read the rows of the order, decode images, and prepare what a task computes without its model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from itertools import accumulate, pairwise, repeat
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from models.random_streams import RandomStreams, StreamsSlice, derive_seed
from models.tokens import tokenize
from pipeline.data.pairs.row_index import Place
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.store import Store
from pipeline.store.parallel import ordered_map
from pipeline.training.feed.order import Order, cut_by_lane, share_of
from pipeline.training.feed.tables import JoinedRow, Tables
from pipeline.training.feed.views import CACHE_MB, View, Views, at_once
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.task import Batch, Prepares, Task

Item = TypeVar("Item")
WINDOW_READERS = 8  # windows that are read at once
AHEAD = 0.75  # of the windows in use, after which all lanes have begun to read the next


class LocalBatch(NamedTuple):
    """Holds a worker's rows of one step.

    Attributes:
        batch: "image" uint8 [b, 3, s, s], "tokens" int64 [b, 77], "image_embedding" and "text_embedding" fp32 [b, d];
            those that the task's columns name.
            A task that prepares its batches has columns of its own in place of the images.
        keys: Keys of the rows.
        streams: Pairs (seed, rows), lane by lane, for RandomStreams; also of rows of its lanes that other workers have.
        before: Rows of the first lane that another worker has.
    """

    batch: Batch
    keys: list[str]
    streams: list[tuple[int, int]]
    before: int = 0

    def rng(self, device: torch.device, start: int, stop: int) -> RandomStreams:
        """Returns the random numbers of rows [start, stop)."""
        return StreamsSlice(RandomStreams(self.streams, device), start + self.before, stop + self.before)

    def pinned(self) -> LocalBatch:
        """Returns the same in pinned memory, from which a GPU copies while the host goes on."""
        return self._replace(batch={name: column.pin_memory() for name, column in self.batch.items()})


class Batches(Protocol):
    """Makes the batches that a training takes."""

    def batches(self, samples: int) -> Generator[LocalBatch, None, None]:
        """Yields this worker's batch of every step, without end, after ``samples`` samples (a multiple of batch)."""


class PendingBatch(NamedTuple):
    """Holds a batch that is being made.

    Attributes:
        rows: Rows of all lanes.
        choices: Number for each row that picks one of its captions.
        views: Views that are being decoded.
        streams: Pairs (seed, rows), as in LocalBatch.
        before: Rows that another worker has, as in LocalBatch.
        prepared: Columns that the task makes of the views, lane by lane; empty if it does not prepare.
    """

    rows: list[JoinedRow]
    choices: list[int]
    views: list[View]
    streams: list[tuple[int, int]]
    before: int = 0
    prepared: Sequence[Future[Batch]] = ()


class Window(NamedTuple):
    """Holds what a lane reads: [start, stop) in lane positions, the rows there, and their encoded images."""

    start: int
    stop: int
    rows: list[JoinedRow]
    images: dict[Place, bytes]


class Windows:
    """Reads the windows of some lanes, from ``position`` on, in a pool of threads before they are needed.

    All lanes reach the end of a window at the same step. Their next windows are read one lane after the other while
    three quarters of the current ones are used, so that reads are spread in time and memory holds at most about five
    quarters of a window of every lane.
    """

    def __init__(self, read: Callable[[int, int], Window], lanes: Iterable[int], pool: Executor, position: int):
        self._read, self._pool, self._turns = read, pool, {lane: turn for turn, lane in enumerate(lanes)}
        self._coming = {lane: pool.submit(read, lane, position) for lane in self._turns}
        self._present: dict[int, Window] = {}

    def at(self, lane: int, position: int) -> Window:
        """Returns the window of a lane that holds a position; positions rise. Raises what reading it raised."""
        window = self._present.get(lane)
        while window is None or position >= window.stop:
            if window and lane not in self._coming:  # whose last rows are another worker's
                self._coming[lane] = self._pool.submit(self._read, lane, window.stop)
            window = self._present[lane] = self._coming.pop(lane).result()
        turn = AHEAD * self._turns[lane] / len(self._turns)
        due = position + 1 == window.stop or position - window.start >= turn * (window.stop - window.start)
        if due and lane not in self._coming:
            self._coming[lane] = self._pool.submit(self._read, lane, window.stop)
        return window


class Feed:
    """Makes batches of a task's training rows in the order of its recipe, and of its validation rows.

    The batch of a step holds this worker's share of its batch / lanes rows of every lane, lane after lane.

    Args:
        store: Store of the rows.
        inputs: Input artefacts of the stage.
        task: Task, which names the columns of a batch.
        recipe: Recipe, which sets the batch, the lanes and the order.
        rank: Rank of this worker.
        size: Number of workers.
        cache_mb: MiB of decoded images that stay in memory.
        pin: Puts batches of training rows into pinned memory, for a GPU.

    Raises ValueError where the task has no training rows.
    """

    def __init__(
        self,
        store: Store,
        inputs: Mapping[str, Artifact],
        task: Task,
        recipe: TrainingRecipe,
        rank: int = 0,
        size: int = 1,
        cache_mb: int = CACHE_MB,
        pin: bool = False,
    ):
        self.columns, self.recipe, self.pin = task.columns, recipe, pin
        self.prepare = task.prepare if isinstance(task, Prepares) else None
        self.per_lane = recipe.batch // recipe.lanes
        self.lanes = cut_by_lane(share_of(rank, size, recipe.batch), self.per_lane)
        self.tables = Tables(store, inputs, task.columns, "train", task.min_side, 2 * len(self.lanes))
        self.held_out = self.tables.of("validation")
        self.views = Views(store, task.image_size, cache_mb)
        self.order = Order(self.tables.counts, recipe.lanes, recipe.window, recipe.seed)

    def batches(self, samples: int) -> Generator[LocalBatch, None, None]:
        """Yields this worker's batch of every step, without end, after ``samples`` samples (a multiple of batch).

        Raises CorruptObject for a stored object that cannot be trusted.
        """
        return read_ahead(self._batches(samples // self.recipe.batch))

    def validation(self, rows: int, size: int) -> list[LocalBatch]:
        """Returns at most ``rows`` validation rows, always the same ones, in batches of ``size``."""
        found = self.held_out.first(rows)
        batches = []
        for start in range(0, len(found), size):
            part = found[start : start + size]
            views = self._views(part, self.views.fetch(row.place for row in part if row.place))
            streams = [(derive_seed(self.recipe.seed, "validation", start), len(part))]
            batches.append(self._batch(PendingBatch(part, [0] * len(part), views, streams)))
        return batches

    def _batches(self, step: int) -> Generator[LocalBatch, None, None]:
        # One more decoder than cores: one of them waits for the interpreter as a rule.
        readers = ThreadPoolExecutor(WINDOW_READERS, "read")
        decoders = ThreadPoolExecutor(torch.get_num_threads() + 1, "decode", use_one_thread)
        use_one_thread()
        windows = Windows(self._read, self.lanes, readers, step * self.per_lane)
        try:
            coming = self._begin(step, windows, decoders)
            while True:
                # The next batch is decoded while this one is put together, so that decoders are never idle.
                step, present = step + 1, coming
                coming = self._begin(step, windows, decoders)
                local = self._batch(present)
                yield local.pinned() if self.pin else local
        finally:
            readers.shutdown(cancel_futures=True)
            # Views are cached for the next caller: one that was cancelled would never come.
            decoders.shutdown()

    def _read(self, lane: int, position: int) -> Window:
        """Reads the rest of a lane's window from a position on."""
        start, stop = position, self.order.window_at(position)[1]
        rows = self.tables.read(self.order.rows(lane, start, stop))
        own = (row for at, row in enumerate(rows, start) if at % self.per_lane in self.lanes[lane])
        return Window(start, stop, rows, self.views.fetch(row.place for row in own if row.place))

    def _begin(self, step: int, windows: Windows, decoders: Executor) -> PendingBatch:
        per_lane = self.per_lane
        rows: list[JoinedRow] = []
        choices: list[int] = []
        images: dict[Place, bytes] = {}
        for lane, own in self.lanes.items():
            for position in range(step * per_lane + own.start, step * per_lane + own.stop):
                window = windows.at(lane, position)
                row = window.rows[position - window.start]
                if row.place in window.images:
                    images[row.place] = window.images.pop(row.place)
                rows.append(row)
                first = self.recipe.captions == "first"
                choices.append(0 if first else derive_seed(self.recipe.seed, "caption", lane, position))
        streams = [(derive_seed(self.recipe.seed, lane, step), per_lane) for lane in self.lanes]
        views = self._views(rows, images, decoders.submit)
        prepared = []
        if self.prepare is not None:
            # A task that waits for its views never waits for long: they were submitted before it.
            ends = accumulate(map(len, self.lanes.values()), initial=0)
            lanes = (views[start:stop] for start, stop in pairwise(ends))
            given = zip(lanes, streams, self.lanes.values(), strict=True)
            prepared = [decoders.submit(self._prepared, *lane) for lane in given]
        return PendingBatch(rows, choices, views, streams, next(iter(self.lanes.values())).start, prepared)

    def _prepared(self, views: Sequence[View], stream: tuple[int, int], own: range) -> Batch:
        assert self.prepare is not None
        return self.prepare({"image": _stacked(views)}, StreamsSlice(RandomStreams([stream]), own.start, own.stop))

    def _views(
        self, rows: Sequence[JoinedRow], images: dict[Place, bytes], submit: Callable[..., View] = at_once
    ) -> list[View]:
        return self.views.views(_places(rows), images, submit) if "image" in self.columns else []

    def _batch(self, begun: PendingBatch) -> LocalBatch:
        """Returns the columns that the task names. Choices pick one of each row's captions, and its embedding."""
        batch: Batch = {}
        rows = begun.rows
        picked = [row.pick(choice) for row, choice in zip(rows, begun.choices, strict=True)]
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
        if begun.prepared:
            wait(begun.prepared)
            lanes = [future.result() for future in begun.prepared]
            batch |= {name: torch.cat([lane[name] for lane in lanes]) for name in lanes[0]}
        elif "image" in self.columns:
            batch["image"] = _stacked(begun.views)
        return LocalBatch(batch, [row.key for row in rows], begun.streams, before=begun.before)


def _stacked(views: Sequence[View]) -> Tensor:
    """Returns uint8 [b, 3, s, s]."""
    wait(views)  # one wait for all of them: waking for each would disturb the decoders
    return torch.from_numpy(np.stack([view.result() for view in views]))


def _places(rows: Sequence[JoinedRow]) -> list[Place]:
    for row in rows:
        if row.place is None:
            raise UserError(
                f"row {row.key} has an imported embedding and no image to train on: remove it from the list"
            )
    return [row.place for row in rows if row.place]


def use_one_thread() -> None:
    """Computes on one thread in the thread that calls it, and in no other.

    A feed has threads of its own, and OpenMP would give each of them a team as large as the training's.
    """
    torch.get_num_threads()  # sets the number of a new thread, which would undo the next line later
    threadpool_limits(1, user_api="openmp")


def read_ahead(source: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """Yields the items of an endless ``source``, made by a thread that is at most two items ahead.

    Raises the errors of ``source``, after the items before them. Closing the generator ends the thread, and closes
    ``source``.
    """
    try:
        yield from ordered_map(lambda _: next(source), repeat(None), threads=1)
    finally:
        source.close()
