"""Compares the embeddings stage with the sum of its parts, and with clip-retrieval 2.45.0 on the same tars.

Every case has one process for each core, bound to it, with torch on one thread: the thread that decodes beside the
encoder, or the loader's process that does so for clip-retrieval, has its share of that core. All encode captions too,
in fp32 and in batches of one size, with the same random weights of the shape of ViT-B/32. clip-retrieval cannot share
an environment with us: ``--clip-retrieval-python`` names the interpreter of one that has it. Without it, pictures are
read as it reads them, with webdataset and open_clip's transform in a DataLoader, but in our environment.

Then what an encoder's process computes besides CLIP, for which a GPU would wait: the stage on Ray, with a decoder that
hands on black views and a network that returns at once.
"""

import argparse
import io
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks.images import make_shard, publish, random_fields
from benchmarks.timing import begin, finish, interleave, parser, ratio, show
from models.clip import CONFIG_FILE, WEIGHTS_FILE, Clip
from models.prior_configs import ClipConfig
from pipeline.config import preset_config
from pipeline.data.embeddings.encoder import OpenEncoder
from pipeline.data.embeddings.parts import ImageParts, captions_to_encode, parts_for, read_embeddings
from pipeline.data.embeddings.stage import PART_BYTES, EmbeddingsRecipe, run_embeddings
from pipeline.graph.artifacts import Artifact, publish_shard, read_table
from pipeline.graph.ray import start_ray
from pipeline.graph.stages import Context
from pipeline.graph.workers import ShardTask, Streamed, Timed
from pipeline.ledger import Ledger
from pipeline.progress import Steps
from pipeline.settings import EmbeddingsSettings, RaySettings
from pipeline.store import Store, open_store
from pipeline.store.records import blob_path, put_blob

VIT_B_32 = ClipConfig(
    embed_dim=512,
    image_size=224,
    tower="vit",
    layers=(12,),
    width=768,
    patch=32,
    text_width=512,
    text_layers=12,
    text_heads=8,
    text_context=77,
)
QUICK = preset_config("nano").clip.model
CHILD = Path(__file__).with_name("clip_retrieval_child.py")
STAGE = "embeddings"


# --- in a process of a core -------------------------------------------------------------------------------------------


class Core:
    """The process of one core: holds the encoder, and times the parts of every shard."""

    def __init__(self, core: int, store: Store, clip: dict[str, str], batch: int):
        os.sched_setaffinity(0, {core})
        self.store, self.batch = store, batch
        self.encoder = OpenEncoder(store, clip, batch, gpus=0, bf16=False)()
        self.cut = parts_for(store, clip, batch, {}, PART_BYTES)
        self.worker = Streamed(self.cut.count, self.cut.prepare, lambda: self.encoder, self.cut.join)()
        self.parts: dict[int, Any] = {}

    def prepare(self, task: ShardTask) -> None:
        """Reads views and captions of a shard."""
        first, _ = captions_to_encode(self.store, task)
        self.parts[task.number] = np.concatenate(list(self._views(task))), first

    def encode(self, task: ShardTask) -> None:
        """Encodes them, and nothing else."""
        views, texts = self.parts[task.number]
        self.encoder.images(views)()
        self.encoder.texts(self.encoder.clip.tokenize(texts).numpy())()

    def read(self, task: ShardTask) -> None:
        """Reads images from the tar as views."""
        for _ in self._views(task):
            pass

    def normalise(self, task: ShardTask) -> None:
        """Reads images from the tar as ``transform`` does, to what the image tower takes."""
        clip = self.encoder.clip
        for views in self._views(task):
            for start in range(0, len(views), self.batch):
                batch = torch.from_numpy(views[start : start + self.batch]).permute(0, 3, 1, 2).contiguous()
                _ = (batch / 255 - clip.mean) / clip.std

    def _views(self, task: ShardTask) -> Iterator[np.ndarray]:
        return (self.cut.read(task, part, Steps())[1] for part in range(self.cut.count(task)))

    def stage(self, task: ShardTask) -> None:
        """Does what a worker of the stage does, from the shards of pairs and captions to the published one."""
        made = self.worker(task)
        publish_shard(self.store, STAGE, task.number, task.key, made.ledger, made.blobs, made.counts)

    def transform(self, task: ShardTask) -> None:
        """Reads the same images as clip-retrieval reads them."""
        import open_clip
        import webdataset
        from torch.utils.data import DataLoader

        resize = open_clip.image_transform(self.encoder.clip.image_size, is_train=False)
        tar = f"{self.store.url}/{blob_path(task.inputs['pairs'].blobs['images'])}"
        dataset = webdataset.WebDataset([tar], shardshuffle=False).map(
            lambda sample: resize(Image.open(io.BytesIO(sample["jpg"])))
        )
        for _ in DataLoader(dataset, self.batch, num_workers=1, multiprocessing_context="fork"):
            pass


_core: list[Core] = []


def _open(*arguments: Any) -> None:
    _core.append(Core(*arguments))


def _call(method: str, tasks: Sequence[ShardTask]) -> None:
    for task in tasks:
        getattr(_core[0], method)(task)


# --- all cores --------------------------------------------------------------------------------------------------------


class Cores:
    """Yields a function that runs tasks in a process for each core."""

    def __init__(self, stack: ExitStack, cores: Sequence[int], *arguments: Any):
        spawn = get_context("spawn")
        self.pools = [
            stack.enter_context(ProcessPoolExecutor(1, spawn, initializer=_open, initargs=(core, *arguments)))
            for core in cores
        ]

    def __call__(self, method: str, tasks: Sequence[Sequence[ShardTask]]) -> None:
        for call in [pool.submit(_call, method, own) for pool, own in zip(self.pools, tasks, strict=True)]:
            call.result()


class Peers:
    """Runs clip-retrieval in a process for each core, which waits for a line before each task and answers with one."""

    def __init__(self, stack: ExitStack, cores: Sequence[int], python: str, told: dict[str, Any]):
        self.python = python
        self.children = [
            stack.enter_context(
                subprocess.Popen(
                    [python, str(CHILD), json.dumps(told | {"core": core})],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
            for core in cores
        ]
        stack.callback(lambda: [child.stdin.close() for child in self.children if child.stdin])

    def __call__(self, *tasks: Sequence[Any]) -> list[str]:
        """Runs one task for each core, or fewer."""
        busy = self.children[: len(tasks)]
        for child, task in zip(busy, tasks, strict=True):
            assert child.stdin is not None
            child.stdin.write(json.dumps(task) + "\n")
            child.stdin.flush()
        answers = [child.stdout.readline().strip() for child in busy if child.stdout]
        if not all(answers):
            raise SystemExit(f"{self.python} does not run {CHILD.name}: it needs clip-retrieval 2.45.0")
        return answers


def compare(peers: Peers, folder: Path, store: Store, task: ShardTask, batch: int) -> None:
    """Stops if clip-retrieval's embeddings of the same views and captions are not those that the stage published."""
    texts = read_table(store, task.inputs["captions"].blobs["captions"])["captions"].to_pylist()[:batch]
    size = json.loads((folder / "clip" / CONFIG_FILE).read_text())["model_cfg"]["vision_cfg"]["image_size"]
    np.save(folder / "views.npy", ImageParts(store, batch, size, 0, 0, {}, {}).read(task, 0, Steps())[1])
    out = str(folder / "theirs.npy")
    [said] = peers(["compare", str(folder / "views.npy"), [text[0] for text in texts], out])
    record = json.loads(store.read(f"shards/{STAGE}/{task.key}.json"))
    _, *ours, _ = read_embeddings(store, record["blobs"]["embeddings"])
    theirs = np.load(out).astype(np.float32)
    error = max(float(np.abs(a[:batch].astype(np.float32) - b).max()) for a, b in zip(ours, theirs, strict=True))
    print(f"  clip-retrieval {said}: of the same views and captions, embeddings differ by {error:.1e} at most")
    if error > 1e-3:
        raise SystemExit("the two disagree: timing them makes no sense")


def measure(options: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, float]:
    """Returns the ratios."""
    config, batch, rows = (QUICK, 4, 8) if options.quick else (VIT_B_32, options.batch, options.rows)
    cores = sorted(os.sched_getaffinity(0))
    model = Clip.build(config, seed=0)
    model.save(folder / "clip")
    (folder / "models").mkdir()
    (folder / "models" / "benchmark.json").write_text(json.dumps(model.model_config))
    del model
    store = open_store(str(folder / "store"))
    clip = {name: put_blob(store, folder / "clip" / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}

    # Every round has shards of its own, as nothing is made twice; those of the first one warm up and are short.
    fields = random_fields(8, 1024)
    warm, *parts = [
        [make_shard(store, len(cores) * part + i, count, fields) for i in range(len(cores))]
        for part, count in enumerate([batch] + [rows] * options.rounds)
    ]
    size = sum(len(store.read(blob_path(task.inputs["pairs"].blobs["images"]))) for part in parts for task in part)
    total = rows * options.rounds * len(cores)
    print(f"  {total:,} pictures of {size / total / 1024:.0f} KiB, batch {batch}; cores {cores}, one thread each")

    ours = Cores(stack, cores, store, clip, batch)
    for part in (warm, *parts):
        ours("prepare", [[task] for task in part])
    ours("stage", [[task] for task in warm])
    run: dict[str, Callable[[Sequence[Sequence[ShardTask]]], object]] = {
        name: partial(ours, name) for name in ("stage", "encode", "read", "normalise", "transform")
    }
    if options.clip_retrieval_python:
        told = {"models": str(folder / "models"), "name": "benchmark", "weights": str(folder / "clip" / WEIGHTS_FILE)}
        peers = Peers(stack, cores, options.clip_retrieval_python, told | {"batch": batch})
        compare(peers, folder, store, warm[0], batch)  # which warms it up, too
        run |= {f"clip-retrieval {task}": partial(_ask, peers, store, task) for task in ("infer", "read")}

    everything = [[part[i] for part in parts] for i in range(len(cores))]
    alone = ("normalise", "transform", "clip-retrieval read")
    reading = {name: partial(call, everything) for name, call in run.items() if name in alone}
    print("  pictures to normalised views, milliseconds of a core for each of them:")
    reads = interleave(reading, options.rounds)
    show(reads, 1e3 / (rows * options.rounds))

    def of_a_round(call: Callable[[Sequence[Sequence[ShardTask]]], object]) -> Callable[[], object]:
        own = iter(parts)
        return lambda: call([[task] for task in next(own)])

    print("  pairs to embeddings, milliseconds of a core for each of them:")
    whole = {name: of_a_round(call) for name, call in run.items() if name not in alone}
    seconds = interleave(whole, options.rounds, warmup=0)
    show(seconds, 1e3 / rows)
    bound = [sum(parts) for parts in zip(seconds["encode"], seconds["read"], strict=True)]
    ratios = {
        "stage_rate_over_bound": ratio(seconds | {"bound": bound}, "bound", "stage"),
        "transform_over_normalise": ratio(reads, "transform", "normalise"),
    }
    ratios["host_seconds_per_1000_rows"] = host_seconds(folder / "host", folder / "clip", 4 * rows, batch)
    if options.clip_retrieval_python:
        ratios["clip_retrieval_over_stage"] = ratio(seconds, "clip-retrieval infer", "stage")
        ratios["clip_retrieval_over_normalise"] = ratio(reads, "clip-retrieval read", "normalise")
    return ratios


# --- beside the network -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenIdle(OpenEncoder):
    """Opens an encoder whose network returns at once, and which counts the seconds that its process computes."""

    def __call__(self) -> Any:
        encoder = super().__call__()
        nothing = torch.zeros(self.batch, encoder.clip.embed_dim)
        encoder.clip.encode_image = encoder.clip.encode_text = lambda batch: nothing[: len(batch)]  # type: ignore
        until: list[float] = []  # from the first part: before it, Ray's threads wait for the decoder's process

        def work(task: ShardTask, part: int, prepared: Any) -> Timed:
            until[:] = until or [time.process_time()]
            made, seconds = encoder(task, part, prepared)
            until.append(time.process_time())
            return made, {**seconds, "host": until[-1] - until[-2]}

        return work


@dataclass(frozen=True)
class BlankParts(ImageParts):
    """Decodes nothing, so that the encoder's process has no time to be idle."""

    def read(self, task: ShardTask, part: int, steps: Steps) -> Any:
        """Returns the rows of one part and black views."""
        blank = np.zeros((self.size, self.size, 3), np.uint8)
        with mock.patch("pipeline.data.embeddings.parts.read_pair_pixels", return_value=blank):
            return super().read(task, part, steps)


def host_seconds(folder: Path, clip: Path, rows: int, batch: int) -> float:
    """Returns the seconds of a core that an encoder's process takes for 1,000 rows, besides its network."""
    store = open_store(str(folder))
    made = publish(store, 2, rows, (224, 256))
    blobs = {name: put_blob(store, clip / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    inputs = {name: made[name] for name in ("pairs", "captions")}
    inputs["clip"] = Artifact("clip", "clip", {}, {}, Ledger(), blobs=blobs)
    settings = EmbeddingsSettings(workers=1, gpus=0, decoders=1, batch=batch)
    ray = RaySettings(cpus=2, object_store_mb=1500)
    ctx = Context(store, STAGE, 0, "host", EmbeddingsRecipe(), settings, inputs, ray=ray)
    import benchmarks.embeddings as own  # which workers can import: this module may be __main__

    with (
        mock.patch("pipeline.data.embeddings.encoder.OpenEncoder", own.OpenIdle),
        mock.patch("pipeline.data.embeddings.stage.parts_for", lambda *how: own.BlankParts(**vars(parts_for(*how)))),
    ):
        found = run_embeddings(ctx)
    start_ray(ray).shutdown()
    return 1000 * found.times["host_seconds"] / found.ledger.kept


def _ask(peers: Peers, store: Store, task: str, tasks: Sequence[Sequence[ShardTask]]) -> None:
    tars = [[f"{store.url}/{blob_path(t.inputs['pairs'].blobs['images'])}" for t in own] for own in tasks]
    peers(*([task, own] for own in tars))


def main() -> None:
    """Runs the benchmark."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--clip-retrieval-python", help="interpreter of an environment with it")
    options_parser.add_argument("--batch", type=int, default=64, help="pairs encoded at once (64)")
    options_parser.add_argument("--rows", type=int, default=256, help="pairs of a round, on each core (256)")
    options_parser.set_defaults(rounds=3, threads=1)
    options = options_parser.parse_args()
    begin(__doc__, options)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        finish(measure(options, Path(folder), stack))


if __name__ == "__main__":
    main()
