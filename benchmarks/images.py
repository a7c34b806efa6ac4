"""Makes up images with captions: a shard of pairs as the stages before would leave it."""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.data.pairs.row_index import index_counts, index_table
from pipeline.graph.artifacts import Artifact, Shard, ShardRow, read_table, write_shard_table, write_table
from pipeline.graph.workers import ShardTask
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.records import put_blob

EMBED_DIM = 512
WORDS = ["a", "red", "old", "photo", "of", "the", "heart", "dog", "tree", "under", "two", "sea"]


def random_fields(count: int, side: int) -> np.ndarray:
    """Returns random fields whose amplitudes fall with frequency as those of photographs do.

    They are of unit variance, fp32 [count, side, side].
    """
    g = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf  # no mean
    waves = np.exp(2j * np.pi * g.random((count, *frequency.shape))) / frequency**1.2
    fields = np.fft.irfft2(waves, s=(side, side)).astype(np.float32)
    return fields / fields.std(axis=(1, 2), keepdims=True)


SIDES = (256, 512)  # the shortest and the longest, in pixels


def pictures(
    count: int, fields: np.ndarray, seed: int, sides: tuple[int, int] = SIDES
) -> Iterator[tuple[bytes, int, int]]:
    """Returns JPEG files with sides between these, with their width and height."""
    g = np.random.default_rng(seed)
    for _ in range(count):
        height, width = g.integers(sides[0], sides[1] + 1, 2).tolist()
        top, left = (g.integers(0, fields.shape[1] - side) for side in (height, width))
        parts = fields[g.choice(len(fields), 4, replace=False), top : top + height, left : left + width]
        pixels = 128 + 45 * parts[0, ..., None] + 15 * np.moveaxis(parts[1:], 0, -1)
        out = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        yield out.getvalue(), width, height


def make_shard(store: Store, number: int, count: int, fields: np.ndarray, sides: tuple[int, int] = SIDES) -> ShardTask:
    """Returns a task of the embeddings stage; its shard of pairs is a webdataset tar that has the captions too."""
    g = np.random.default_rng(10_000 + number)
    out, rows, captions = io.BytesIO(), [], []
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (data, width, height) in enumerate(pictures(count, fields, number, sides)):
            key, caption = f"{number:08d}{i:04d}", " ".join(g.choice(WORDS, int(g.integers(6, 16))))
            place = {"offset": out.tell() + tarfile.BLOCKSIZE, "size": len(data)}
            for suffix, content in (("jpg", data), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            row = {"key": key, "url": "", "status": "kept", "split": "train", "width": width, "height": height}
            rows.append(row | place | {"sha256": hashlib.sha256(data).hexdigest()})
            captions.append([caption])
    blobs = {
        "pairs": {"index": write_table(index_table(rows)), "images": out.getvalue()},
        "captions": {"captions": write_table({"key": [row["key"] for row in rows], "captions": captions})},
    }
    inputs = {
        stage: ShardRow(number, f"{stage}-{number}", count, 0, {n: put_blob(store, b) for n, b in own.items()}, {})
        for stage, own in blobs.items()
    }
    return ShardTask(number, f"embeddings-{number}", inputs)


def publish(
    store: Store, shards: int, rows: int, sides: tuple[int, int] = SIDES, dim: int = EMBED_DIM
) -> dict[str, Artifact]:
    """Publishes the artefacts that trainings read.

    They have ``shards`` of equally many rows: images with captions, random embeddings of ``dim`` components, and a
    curation that keeps all.
    """
    fields = random_fields(8, max(1024, sides[1] + 256))
    made: dict[str, list[Shard]] = {"pairs": [], "captions": [], "embeddings": [], "curation": []}
    for number in range(shards):
        inputs = make_shard(store, number, rows, fields, sides).inputs
        index = read_table(store, inputs["pairs"].blobs["index"]).to_pylist()
        blobs = {stage: dict(inputs[stage].blobs) for stage in ("pairs", "captions")}
        blobs["curation"] = {"index": inputs["pairs"].blobs["index"]}
        blobs["embeddings"] = {
            "embeddings": put_blob(store, write_table(embeddings(index, number, dim), dictionary=False))
        }
        for stage, own in made.items():
            counts = index_counts(index) if stage in ("pairs", "curation") else {}
            own.append(Shard(number, f"{stage}-{number}", Ledger(kept=rows), blobs[stage], counts))
    return {
        stage: Artifact(stage, stage, {}, {}, Ledger(kept=rows * shards), shard_table=write_shard_table(store, own)[0])
        for stage, own in made.items()
    }


def embeddings(index: list[dict[str, Any]], seed: int, dim: int) -> dict[str, Any]:
    """Returns random unit vectors in the columns of the embeddings stage."""
    vectors = np.random.default_rng(seed).standard_normal((2, len(index), dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    image, text = (pa.FixedSizeListArray.from_arrays(pa.array(v.astype(np.float16).ravel()), dim) for v in vectors)
    empty = pa.array([[] for _ in index], pa.list_(pa.list_(pa.float16(), dim)))
    similarity = pa.array(np.ones(len(index), np.float32))
    keys = [row["key"] for row in index]
    return {
        "key": keys,
        "image_embedding": image,
        "text_embedding": text,
        "more_text_embeddings": empty,
        "similarity": similarity,
    }
