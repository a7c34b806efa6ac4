"""A small world: pairs, captions, embeddings and curation of coloured shapes, published as the data stages would."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw

from pipeline.data.pairs.row_index import index_counts, index_table
from pipeline.data.source.drawings.world import Drawing, drawing_url
from pipeline.graph.artifacts import (
    Artifact,
    Shard,
    publish_artifact,
    publish_shard,
    read_shards,
    read_table,
    write_shard_table,
    write_table,
)
from pipeline.graph.stages import Context, Stage, stage_key
from pipeline.ledger import Ledger
from pipeline.settings import RaySettings, TrainingSettings
from pipeline.store import Store, open_store
from pipeline.store.records import put_blob

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "bar")
EMBED_DIM = 16


@dataclass(frozen=True)
class Example:
    """One row of the small world."""

    key: str
    jpeg: bytes
    side: int
    captions: list[str]
    split: str
    image_embedding: np.ndarray
    text_embeddings: list[np.ndarray]


def make_example(shard: int, row: int, side: int) -> Example:
    """A shape on white whose colour and kind its caption names, and embeddings that know both."""
    rng = np.random.default_rng([shard, row])
    colour, shape = rng.integers(len(COLOURS)), rng.integers(len(SHAPES))
    image = Image.new("RGB", (side, side + 2 * int(rng.integers(8))), "white")
    box = [side // 4, side // 4, side // 2 + int(rng.integers(side // 4)), side // 2 + int(rng.integers(side // 4))]
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == 0 else draw.rectangle)(box, fill=COLOURS[colour])
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    direction = np.zeros(EMBED_DIM)
    direction[colour], direction[len(COLOURS) + shape] = 1, 1
    embeddings = [direction + 0.1 * rng.normal(size=EMBED_DIM) for _ in range(4)]
    image_embedding, *text_embeddings = ((e / np.linalg.norm(e)).astype(np.float16) for e in embeddings)
    split = "validation" if row % 7 == 3 else "test" if row % 7 == 5 else "train"
    captions = [f"a {COLOURS[colour]} {SHAPES[shape]}", f"a {SHAPES[shape]} in {COLOURS[colour]}", "once more"]
    captions = captions[: 2 if row % 5 else row % 3]  # every fifth row has none, one or two
    return Example(
        f"{shard:08d}{row:04d}",
        out.getvalue(),
        side,
        captions,
        split,
        image_embedding,
        text_embeddings[: max(1, len(captions))],
    )


@dataclass(frozen=True)
class World:
    """A store with the artefacts that trainings read, and the examples they were made from."""

    store: Store
    inputs: dict[str, Artifact]
    examples: dict[str, Example]

    def context(
        self, stage: str, recipe: Any, settings: TrainingSettings | None = None, inputs: tuple[str, ...] = ()
    ) -> Context:
        """The context that the graph would give a training stage."""
        names = inputs or ("pairs", "captions", "embeddings", "curation")
        chosen = {name: self.inputs[name] for name in names}
        node = Stage(stage, 1, recipe, names, lambda ctx: self.inputs["pairs"])
        key = stage_key(node, {name: artifact.key for name, artifact in chosen.items()})
        settings = settings or TrainingSettings(threads=1, device="cpu")
        return Context(self.store, stage, 1, key, recipe, settings, chosen, ray=RaySettings(cpus=2))


def make_world(
    folder: Path, shards: Sequence[int] = (21, 22, 23, 24), side: int = 72, drawings: Sequence[Drawing] = ()
) -> World:
    """Publishes a small world of shards with these numbers of rows.

    Every seventh row is held out for validation, another for test; the filter drops rows without a caption, curation
    one row, and the last row of a shard was rejected. References in the list name ``drawings``, one after the other,
    if there are any.
    """
    store = open_store(str(folder))
    examples: dict[str, Example] = {}
    made: dict[str, list[Shard]] = {
        name: [] for name in ("source", "pairs", "captions", "filter", "embeddings", "curation")
    }
    for number, rows in enumerate(shards):
        group = [make_example(number, row, side) for row in range(rows)]
        examples |= {example.key: example for example in group}
        index, tar = _pack(group)
        curated = [row for row in index if row["status"] == "kept" and not row["key"].endswith("0002")]
        kept = [example for example, row in zip(group, index, strict=True) if row["status"] == "kept"]
        captioned = {example.key for example in kept if example.captions}
        filtered = [row for row in index if row["key"] in captioned]
        other_way = kept[::-1]  # rows are joined by key, so their order must not matter
        tables = {
            "source": {"refs": write_table(_references(rows, drawings))},
            "pairs": {"index": write_table(index_table(index)), "images": tar},
            "captions": {
                "captions": write_table(
                    {"key": [e.key for e in other_way], "captions": [e.captions for e in other_way]}
                )
            },
            "filter": {"index": write_table(index_table(filtered))},
            "embeddings": {"embeddings": write_table(_embeddings(other_way))},
            "curation": {"index": write_table(index_table(curated))},
        }
        rows_of = {"pairs": index, "filter": filtered, "curation": curated}
        for stage, blobs in tables.items():
            key = hashlib.sha256(f"{stage} {number}".encode()).hexdigest()
            counts = index_counts(rows_of[stage]) if stage in rows_of else {}
            ledger = Ledger(kept=len({"filter": filtered, "curation": curated}.get(stage, kept)))
            made[stage].append(publish_shard(store, stage, number, key, ledger, blobs, counts))
    inputs = {}
    for stage, parts in made.items():
        table, ledger = write_shard_table(store, parts)
        key = hashlib.sha256(stage.encode()).hexdigest()
        artifact = Artifact(stage, key, {}, {}, ledger, shard_table=table)
        inputs[stage] = publish_artifact(store, artifact, 0.0)
    return World(store, inputs, examples)


def with_codec(world: World) -> World:
    """The same world, and a codec of 6 components in 8 buckets."""
    import torch
    from safetensors.torch import save

    from models.codec_fit import fit_codec

    z = torch.nn.functional.normalize(torch.randn(200, EMBED_DIM, generator=torch.Generator().manual_seed(0))).double()
    codec = fit_codec(z, z[:, 0], 6, 8).codec
    blobs = {"model.safetensors": put_blob(world.store, save(codec.tensors()))}
    artifact = publish_artifact(world.store, Artifact("codec", "c" * 64, {}, {}, Ledger(), blobs), 0.0)
    return replace(world, inputs=world.inputs | {"codec": artifact})


def rewritten(world: World, stage: str, change: Callable[[pa.Table], pa.Table]) -> World:
    """The same world, with another table of this stage in every shard."""
    shards = []
    for row in read_shards(world.store, world.inputs[stage]):
        blob = put_blob(world.store, write_table(change(read_table(world.store, row.blobs[stage]))))
        shards.append(Shard(row.number, row.key, Ledger(kept=row.kept), {stage: blob}))
    return listed(world, stage, shards)


def listed(world: World, stage: str, shards: Sequence[Shard]) -> World:
    """The same world, with other shards of this stage."""
    table, _ = write_shard_table(world.store, shards)
    return replace(world, inputs=world.inputs | {stage: replace(world.inputs[stage], shard_table=table)})


def _references(rows: int, drawings: Sequence[Drawing]) -> dict[str, list[str]]:
    urls = [
        drawing_url(drawings[i % len(drawings)], 256) if drawings else f"http://example.test/{i}" for i in range(rows)
    ]
    return {"url": urls, "group": [f"concept {i // 4}" for i in range(rows)]}


def _pack(group: list[Example]) -> tuple[list[dict[str, Any]], bytes]:
    """Index rows and a tar; the last row of a shard was rejected and has no image."""
    out = io.BytesIO()
    index: list[dict[str, Any]] = []
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for example in group:
            row = {"key": example.key, "url": f"http://example.test/{example.key}", "split": example.split}
            if example is group[-1]:
                index.append(row | {"status": "rejected", "reason": "http_4xx"})
                continue
            member = tarfile.TarInfo(f"{example.key}.jpg")
            member.size = len(example.jpeg)
            offset = out.tell() + tarfile.BLOCKSIZE
            tar.addfile(member, io.BytesIO(example.jpeg))
            width, height = Image.open(io.BytesIO(example.jpeg)).size
            place = {"offset": offset, "size": member.size, "width": width, "height": height}
            index.append(row | place | {"status": "kept", "sha256": hashlib.sha256(example.jpeg).hexdigest()})
    return index, out.getvalue()


def _embeddings(group: list[Example]) -> dict[str, Any]:
    def column(vectors: list[np.ndarray]) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(
            pa.array(np.concatenate([np.empty(0, np.float16), *vectors])), EMBED_DIM
        )

    return {
        "key": [e.key for e in group],
        "image_embedding": column([e.image_embedding for e in group]),
        "text_embedding": column([e.text_embeddings[0] for e in group]),
        "more_text_embeddings": pa.array(
            [list(e.text_embeddings[1:]) for e in group], pa.list_(pa.list_(pa.float16(), EMBED_DIM))
        ),
        "similarity": pa.array([float(e.image_embedding @ e.text_embeddings[0]) for e in group], pa.float32()),
    }


@pytest.fixture(scope="session")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world to read from; tests that train in it use recipes of their own."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Artifact]:
    """What one process makes of PRIOR_RECIPE in one go."""
    from pipeline.training.stage import train
    from tests.pipeline.training.trainings import PRIOR_RECIPE, SETTINGS

    world = make_world(tmp_path_factory.mktemp("straight"))
    return world, train(world.context("diffusion_prior", PRIOR_RECIPE, SETTINGS))


@pytest.fixture(scope="module", autouse=True)
def short_previews() -> Iterator[None]:
    """Draws previews in three steps."""
    from pipeline.training.tasks import decoder, upsampler

    with pytest.MonkeyPatch.context() as patch:
        for task in (decoder, upsampler):
            patch.setattr(task, "_PREVIEW_STEPS", 3)
        yield


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A world of the test's own, to damage at will."""
    return make_world(tmp_path / "store")
