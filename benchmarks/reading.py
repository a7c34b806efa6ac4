"""Compares our feed of a training with webdataset's loader, and from S3 with GETs of the same bytes.

Both give batches of views and tokens of the same tars, by the same functions, on as many workers as there are threads:
processes of a DataLoader there, threads here, where the order is exact, every picture is checked, and a training can go
on from any sample. Three epochs, as both begin what comes next before its turn; nothing is kept in memory from one to
the next. Shards have a thousand rows, as the pairs stage makes them. From S3 (SeaweedFS on this machine) tables are
read and joined, and pictures fetched and checked but not decoded; the other side sends the same requests by boto3, in
as many threads, and does nothing with the answers. Then the time until the first batch of a training that goes on in
the tenth epoch, over that of one that begins.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from benchmarks.images import publish
from benchmarks.timing import begin, finish, interleave, parser, ratio, show
from models.tokens import tokenize
from models.view import open_view
from pipeline.graph.artifacts import Artifact, read_shards
from pipeline.store import Store, open_store
from pipeline.store.records import blob_path
from pipeline.training.feed.feed import WINDOW_READERS, Feed, Windows
from pipeline.training.recipes import DecoderRecipe

SIDE, BATCH, LANES = 64, 32, 8
EPOCHS = 3
Inputs = dict[str, Artifact]


def make_feed(store: Store, inputs: Inputs) -> Feed:
    """Returns the feed of a training."""
    task: Any = SimpleNamespace(columns=("image", "tokens"), min_side=SIDE, image_size=SIDE)
    return Feed(store, inputs, task, DecoderRecipe(samples=BATCH, batch=BATCH, lanes=LANES), cache_mb=0)


def of_feed(store: Store, inputs: Inputs, steps: int) -> None:
    """Reads some steps by our feed."""
    with closing(make_feed(store, inputs).batches(0)) as shares:
        for _ in islice(shares, steps):
            pass


def of_webdataset(tars: list[str], steps: int, workers: int) -> None:
    """Reads in webdataset's usual way: shards in a new order, rows shuffled in a buffer of a window's length."""
    import webdataset
    from torch.utils.data import DataLoader

    def example(sample: dict[str, Any]) -> tuple[np.ndarray, str]:
        return open_view(sample["jpg"], SIDE).transpose(2, 0, 1), sample["txt"].decode()

    def batch(rows: list[tuple[np.ndarray, str]]) -> dict[str, torch.Tensor]:
        images, captions = zip(*rows, strict=True)
        return {"image": torch.from_numpy(np.stack(images)), "tokens": tokenize(list(captions))}

    dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(256).map(example)
    batches = dataset.batched(BATCH, collation_fn=batch, partial=False).repeat(EPOCHS)
    loader = DataLoader(batches, None, num_workers=workers, multiprocessing_context="fork")
    if (given := sum(1 for _ in islice(loader, steps))) < steps:
        raise ValueError(f"webdataset gave {given} batches of {steps}")


def fetch(store: Store, inputs: Inputs) -> None:
    """Reads the windows of all epochs as a training does, which drops an image after its turn."""
    feed = make_feed(store, inputs)
    with ThreadPoolExecutor(WINDOW_READERS) as readers:
        windows = Windows(feed._read, feed.lanes, readers, 0)
        for position in range(EPOCHS * feed.order.lane_rows):
            for lane in feed.lanes:
                window = windows.at(lane, position)
                if place := window.rows[position - window.start].place:
                    window.images.pop(place, None)


@dataclass
class Recording:
    """A store that remembers its requests: paths, with their first byte and the one after the last."""

    store: Store
    asked: list[tuple[str, int, int | None]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.store.url

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        self.asked.append((path, start, stop))
        return self.store.read(path, start, stop)

    def read_parts(self, path: str, parts: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        self.asked.append((path, parts[0][0], parts[-1][1]))
        return self.store.read_parts(path, parts)


def get(client: Any, bucket: str, prefix: str, asked: list[tuple[str, int, int | None]]) -> int:
    """Sends the same requests; returns the bytes of all answers."""

    def one(request: tuple[str, int, int | None]) -> int:
        path, start, stop = request
        part = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        return len(client.get_object(Bucket=bucket, Key=f"{prefix}/{path}", **part)["Body"].read())

    with ThreadPoolExecutor(WINDOW_READERS) as readers:
        return sum(readers.map(one, asked))


def first_batch(store: Store, inputs: Inputs, samples: int) -> None:
    """Reads the first batch after ``samples``."""
    with closing(make_feed(store, inputs).batches(samples)) as shares:
        next(shares)


def local(folder: Path, shards: int, rows: int, rounds: int) -> dict[str, float]:
    """Returns the ratios of reading from a folder."""
    store = open_store(str(folder))
    inputs = publish(store, shards, rows)
    tars = [f"{folder}/{blob_path(shard.blobs['images'])}" for shard in read_shards(store, inputs["pairs"])]
    size = sum(os.path.getsize(tar) for tar in tars)
    workers, steps = torch.get_num_threads(), max(1, EPOCHS * (shards * rows // BATCH) - LANES)
    print(f"  {shards * rows:,} pictures in {shards} tars, {size / 2**20:.0f} MiB; {workers} workers")
    cases: dict[str, Callable[[], object]] = {
        "ours": partial(of_feed, store, inputs, steps),
        "webdataset": partial(of_webdataset, tars, steps, workers),
    }
    seconds = interleave(cases, rounds)
    show(seconds, 1e3 / (steps * BATCH), "ms a picture")
    epoch = shards * rows // BATCH * BATCH
    places = {"begins": 0, "goes on in the tenth epoch": epoch * 99 // 10 // BATCH * BATCH}
    starts = interleave({name: partial(first_batch, store, inputs, at) for name, at in places.items()}, rounds)
    show(starts)
    return {
        "webdataset_over_ours": ratio(seconds, "webdataset", "ours"),
        "first_batch_late_over_early": ratio(starts, "goes on in the tenth epoch", "begins"),
    }


def on_s3(folder: Path, shards: int, rows: int, rounds: int) -> dict[str, float]:
    """Returns the ratio of reading from S3."""
    import boto3
    from botocore.config import Config

    from tests.seaweed import serving

    with serving(folder) as server:
        os.environ |= server.environment
        store = open_store(f"{server.url}/reading")
        inputs = publish(store, shards, rows)
        recording: Any = Recording(store)
        fetch(recording, inputs)
        where = urlsplit(store.url)
        client = boto3.client("s3", config=Config(max_pool_connections=WINDOW_READERS))
        gets = partial(get, client, where.netloc, where.path.strip("/"), recording.asked)
        print(f"  {len(recording.asked)} requests, {gets() / 2**20:.0f} MiB")
        seconds = interleave({"S3, ours": partial(fetch, store, inputs), "S3, GETs": gets}, rounds)
        show(seconds)
        return {"s3_gets_over_ours": ratio(seconds, "S3, GETs", "S3, ours")}


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__).parse_args()
    begin(__doc__, options)
    shards, rows, rounds = (2, 64, 1) if options.quick else (4, 1000, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("local", "weed"):
            Path(folder, name).mkdir()
        found = local(Path(folder, "local"), shards, rows, rounds)
        finish(found | on_s3(Path(folder, "weed"), shards, rows, rounds))


if __name__ == "__main__":
    main()
