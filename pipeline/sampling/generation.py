"""Images of many prompts: shard by shard, resumable, each image once.

A shard's prompts are sampled in batches of one size, cut inside the shard and padded, on one thread. So an image has
the same bytes whatever its neighbours and the number of workers are.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from pydantic import Field, PositiveInt
from webdataset.writer import TarWriter

from models.cascade import UnCLIP
from models.tokens import check_captions
from models.view import view
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, ShardRow, read_shards, read_table, write_table
from pipeline.graph.device import choose_device
from pipeline.graph.keys import artifact_key, flatten
from pipeline.graph.runs import record_stage_run
from pipeline.graph.shards import map_shards
from pipeline.graph.stages import Context, shard_key
from pipeline.graph.workers import ShardOutput, ShardTask
from pipeline.ledger import Ledger
from pipeline.progress import Steps, counted
from pipeline.sampling.drawing import read_bundle, refusals
from pipeline.settings import GenerationSettings, RaySettings
from pipeline.store import Store
from pipeline.store.records import digest, materialise, put_blob

STAGE, VERSION = "generation", 5
ROWS = 64  # of a shard
COLUMNS = ("key", "prompt", "seed")  # of a row, that its tables and JSON repeat
SETTINGS = "settings.json"
log = logging.getLogger("unclip")


@dataclass(frozen=True)
class GenerationRecipe:
    """Holds ``options``, which replace the bundle's sampling defaults, and ``batch``, the prompts sampled at once."""

    options: dict[str, Any] = field(default_factory=dict)
    batch: Annotated[PositiveInt, Field(le=ROWS)] = 8


def generate(
    store: Store,
    bundle: Artifact,
    parts: Iterable[Mapping[str, list[Any]]],
    recipe: GenerationRecipe,
    settings: GenerationSettings,
    ray: RaySettings,
    to: Path | None = None,
) -> Artifact:
    """Draws the images of prompts, in parts as ``read_prompts`` yields them; what is made is not made again.

    Its shards have a webdataset tar "images" (KEY.png, KEY.txt, KEY.json) and a table "rows" (key, prompt, seed,
    similarity of image and prompt by the bundle's CLIP, status, reason). Raises UserError for options that the bundle
    cannot take, and, before anything is drawn, for a folder ``to`` that ``export`` would refuse.
    """
    blobs, lost, first = [], Counter[str](), dict[str, list[Any]]()
    for part in parts:
        first = first or dict(part)
        blobs.append((put_blob(store, write_table(_typed(part))), len(part["key"])))
        lost.update(reason for reason in part["reject"] if reason)
    if lost:
        log.warning("not drawn: %s", ", ".join(f"{counted(n, 'row')} {reason}" for reason, n in lost.items()))
    inputs = {"bundle": bundle.key, "prompts": digest([blob for blob, _ in blobs])}
    listed = Artifact("prompts", inputs["prompts"], {}, {}, Ledger())
    key = artifact_key(STAGE, VERSION, recipe, inputs)
    if to is not None:
        check_folder(to, _about(key, inputs, flatten(recipe)), first)
    ctx = Context(store, STAGE, VERSION, key, recipe, settings, {"bundle": bundle, "prompts": listed}, ray=ray)
    tasks = [
        ShardTask(
            number,
            shard_key(ctx, {"bundle": bundle.key, "prompts": blob}),
            {"prompts": ShardRow(number, blob, rows, 0, {"prompts": blob}, {})},
        )
        for number, (blob, rows) in enumerate(blobs)
    ]
    record_stage_run(ctx, f"generate-{bundle.key[:12]}")
    device = "auto" if settings.gpus == "auto" else "cuda" if settings.gpus else "cpu"
    make = MakeGenerator(store, dict(bundle.blobs), recipe, device)
    return map_shards(ctx, tasks, make, "images", sum(rows for _, rows in blobs))


@dataclass(frozen=True)
class MakeGenerator:
    """Opens the bundle once in each worker process."""

    store: Store
    bundle: Mapping[str, str]
    recipe: GenerationRecipe
    device: str

    def __call__(self) -> Generator:
        torch.set_num_threads(1)  # sums of several threads round differently
        with tempfile.TemporaryDirectory() as folder:
            materialise(self.store, self.bundle, folder)
            unclip = read_bundle(folder, choose_device(self.device))
        return Generator(self.store, unclip, self.recipe)


class Generator:
    """Samples the prompts of one shard."""

    def __init__(self, store: Store, unclip: UnCLIP, recipe: GenerationRecipe):
        self.store, self.unclip, self.recipe = store, unclip, recipe

    def __call__(self, task: ShardTask) -> ShardOutput:
        steps = Steps()
        rows = read_table(self.store, task.inputs["prompts"].blobs["prompts"]).to_pylist()
        reasons = [row["reject"] or (None if self._short(row["prompt"]) else "prompt_too_long") for row in rows]
        kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
        similarity: dict[str, float] = {}
        out = io.BytesIO()
        with TarWriter(out, encoder=False, mtime=0) as tar:
            for start in range(0, len(kept), self.recipe.batch):
                part = kept[start : start + self.recipe.batch]
                with steps("sample"):
                    images = self._sample(part)
                with steps("score"):
                    scores = self._score(images, [row["prompt"] for row in part])
                for row, image, score in zip(part, images, scores, strict=True):
                    similarity[row["key"]] = score
                    tar.write(_packed({name: row[name] for name in COLUMNS}, image, score))
        columns = {
            **{name: [row[name] for row in rows] for name in COLUMNS},
            "similarity": [similarity.get(row["key"]) for row in rows],
            "status": ["kept" if reason is None else "rejected" for reason in reasons],
            "reason": reasons,
        }
        blobs = {"images": out.getvalue(), "rows": write_table(_typed(columns))}
        return ShardOutput(Ledger.count(reasons), blobs, seconds=steps.seconds)

    def _short(self, prompt: str) -> bool:
        try:
            check_captions([prompt])
        except ValueError:
            return False
        return True

    def _sample(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Returns images uint8 [n, side, side, 3], of a batch that is padded with empty prompts."""
        empty = self.recipe.batch - len(rows)
        prompts = [row["prompt"] for row in rows] + [""] * empty
        seeds = [row["seed"] for row in rows] + [0] * empty
        with refusals():
            made = self.unclip.generate(prompts, seeds, **self.recipe.options)
        return made.image[: len(rows)].numpy()

    def _score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """Returns the cosine of each image's and prompt's embeddings by the bundle's CLIP."""
        clip = self.unclip.clip
        views = np.zeros((self.recipe.batch, clip.image_size, clip.image_size, 3), np.uint8)
        for i, image in enumerate(images):
            views[i] = view(Image.fromarray(image), clip.image_size)
        device = clip.mean.device
        texts = list(prompts) + [""] * (self.recipe.batch - len(prompts))
        with torch.no_grad():
            image = clip.encode_image(torch.from_numpy(views).permute(0, 3, 1, 2).to(device))
            text = clip.encode_text(clip.tokenize(texts).to(device))
        return (image * text).sum(-1)[: len(images)].tolist()


def _packed(row: Mapping[str, Any], image: np.ndarray, score: float) -> dict[str, str | bytes]:
    """Returns a webdataset sample."""
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    about = json.dumps({**row, "similarity": round(score, 6)}, sort_keys=True)
    texts = {"json": about.encode(), "txt": row["prompt"].encode()}
    return {"__key__": row["key"], "png": png.getvalue(), **texts}


def _typed(columns: Mapping[str, list[Any]]) -> Any:
    types = {"seed": pa.int64(), "similarity": pa.float32()}
    return pa.table({name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()})


def _about(key: str, inputs: Mapping[str, str], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a folder's settings.json says of the images in it."""
    return {"key": key, **inputs, **recipe}


def check_folder(folder: Path, about: Mapping[str, Any], first: Mapping[str, Any] | None = None) -> None:
    """Raises UserError where a folder holds other images than those of ``about``, and says in what they differ.

    ``first`` is the first part of the prompts, which may be the same with other seeds.
    """
    try:
        there = json.loads((folder / SETTINGS).read_bytes())
        differing = [name for name in sorted({*about, *there} - {"key"}) if about.get(name) != there.get(name)]
        if first and "prompts" in differing and _other_seeds(folder, first):
            differing[differing.index("prompts")] = "seeds"
        why = f"of other {' and '.join(differing)}" if differing else "of another version of this program"
    except FileNotFoundError:
        there, why = (None if any(folder.glob("[0-9]" * 5 + ".*")) else about), f"without a {SETTINGS} that names them"
    except (ValueError, TypeError, AttributeError):
        there, why = None, f"and its {SETTINGS} cannot be read"
    if there != about:
        raise UserError(f"{folder} holds images {why}; name another folder with --to, or delete it")


def _other_seeds(folder: Path, first: Mapping[str, Any]) -> bool:
    """Returns whether a folder's first table has the prompts of ``first`` with other seeds."""
    try:
        there = pq.read_table(folder / f"{0:05d}.parquet", columns=["prompt", "seed"]).to_pydict()
    except (OSError, pa.ArrowException):
        return False
    return there["prompt"] == first["prompt"] and there["seed"] != first["seed"]


def export(store: Store, made: Artifact, folder: Path) -> Iterator[Path]:
    """Writes a tar and a table for each shard, and settings.json; yields the paths of the tars.

    Raises UserError where the folder holds the images of other prompts, or of other settings.
    """
    about = _about(made.key, made.inputs, made.recipe)
    check_folder(folder, about)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(about, indent=2, sort_keys=True))
    for shard in read_shards(store, made):
        names = {f"{shard.number:05d}.tar": "images", f"{shard.number:05d}.parquet": "rows"}
        materialise(store, {name: shard.blobs[blob] for name, blob in names.items()}, folder)
        yield folder / f"{shard.number:05d}.tar"
