"""Shards of pairs, captions and embeddings with vectors of one's own, without pictures or a CLIP."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.curation.rejected import Rejected
from pipeline.data.curation.stage import CURATION, CurationRecipe, run_curation
from pipeline.data.pairs.row_index import index_counts, index_table
from pipeline.graph.artifacts import (
    Artifact,
    publish_artifact,
    publish_shard,
    read_shards,
    read_table,
    write_shard_table,
    write_table,
)
from pipeline.graph.stages import Context, Stage, stage_key
from pipeline.ledger import Ledger
from pipeline.settings import RaySettings, ShardSettings
from pipeline.store import Store

SHARD_ROWS = 25


@dataclass(frozen=True)
class Listed:
    """Rows in order: vectors float16 [n, d], splits, and the sides of their square pictures, None without a picture."""

    vectors: np.ndarray
    splits: Sequence[str]
    sides: Sequence[int | None]

    def first(self, rows: int) -> "Listed":
        return Listed(self.vectors[:rows], self.splits[:rows], self.sides[:rows])

    @property
    def row_keys(self) -> list[str]:
        return [f"{i // SHARD_ROWS:08d}{i % SHARD_ROWS:04d}" for i in range(len(self.splits))]


class CountedStore:
    """A store that notes the path of every object that is read or created."""

    def __init__(self, store: Store):
        self._store, self.read_paths, self.created = store, list[str](), list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def fresh(self) -> "CountedStore":
        return self

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        self.read_paths.append(path)
        return self._store.read(path, start, stop)

    def create(self, path: str, data: bytes | Path, move: bool = False) -> bool:
        made = self._store.create(path, data, move)
        self.created += [path] * made
        return made


def publish(store: Store, listed: Listed, similarity: np.ndarray | None = None) -> dict[str, Artifact]:
    """The artefacts that curation reads. Shards with the same rows have the same keys. ``similarity`` [n] is 1 if not
    given; text embeddings are those of the images, with their numbers moved on by a place."""
    similarity = np.ones(len(listed.splits), np.float32) if similarity is None else similarity
    keys = listed.row_keys
    made: dict[str, list] = {"pairs": [], "captions": [], "embeddings": []}
    for number, start in enumerate(range(0, len(keys), SHARD_ROWS)):
        part = slice(start, start + SHARD_ROWS)
        rows = [
            {"key": key, "status": "kept", "split": split, "width": side, "height": side, "url": f"file:///{key}.png"}
            for key, split, side in zip(keys[part], listed.splits[part], listed.sides[part], strict=True)
        ]
        embeddings = {"key": keys[part]}
        for i, name in enumerate(("image_embedding", "text_embedding")):
            vectors = np.roll(listed.vectors[part], i, axis=1)
            embeddings[name] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        embeddings["similarity"] = pa.array(similarity[part])
        captions = {"key": keys[part], "captions": [[f"row {key}"] for key in keys[part]]}
        tables = {
            "pairs": {"index": write_table(index_table(rows))},
            "captions": {"captions": write_table(captions)},
            "embeddings": {"embeddings": write_table(embeddings, dictionary=False)},
        }
        for stage, blobs in tables.items():
            key = hashlib.sha256(f"{stage} {number}".encode() + b"".join(blobs.values())).hexdigest()
            counts = index_counts(rows) if stage == "pairs" else {}
            made[stage].append(publish_shard(store, stage, number, key, Ledger(kept=len(rows)), blobs, counts))
    inputs = {}
    for stage, shards in made.items():
        table, ledger = write_shard_table(store, shards)
        artifact = Artifact(stage, hashlib.sha256(f"{stage} {table}".encode()).hexdigest(), {}, {}, ledger)
        inputs[stage] = publish_artifact(store, Artifact(**{**vars(artifact), "shard_table": table}), 0.0)
    return inputs


def context(store: Store, stage: Stage, inputs: dict[str, Artifact], workers: int = 0) -> Context:
    """The context that the graph would give a stage."""
    key = stage_key(stage, {name: inputs[name].key for name in stage.inputs})
    chosen = {name: inputs[name] for name in stage.inputs}
    ray = RaySettings(cpus=4)
    return Context(store, stage.name, stage.version, key, stage.recipe, ShardSettings(workers), chosen, ray=ray)


def curate(store: Store, inputs: dict[str, Artifact], workers: int = 0, **recipe: float | None) -> Artifact:
    """Curation of published rows."""
    names = ("pairs", "captions", "embeddings", *({"thresholds"} & inputs.keys()))
    stage = replace(CURATION, recipe=CurationRecipe(**recipe), inputs=names)
    return run_curation(context(store, stage, inputs, workers))


def rejected(store: Store, curation: Artifact) -> list[Rejected]:
    """Everything that curation rejected, in order."""
    shards = read_shards(store, curation)
    return [Rejected(**row) for s in shards for row in read_table(store, s.blobs["rejected"]).to_pylist()]


def unit(vectors: np.ndarray) -> np.ndarray:
    """float16 vectors of unit norm."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def planted(rows: int, dim: int, pairs: int, seed: int, lowest: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random unit vectors of which some are near an earlier one: vectors float16 [rows, dim], and the places of the
    later and of the earlier rows. Their cosines are spread evenly from ``lowest`` to 1."""
    g = np.random.default_rng(seed)
    vectors = g.standard_normal((rows, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    later = np.sort(g.choice(np.arange(rows // 2, rows), pairs, replace=False))
    earlier = g.integers(0, rows // 2, pairs)
    cosine = g.uniform(lowest, 1, (pairs, 1))
    aside = g.standard_normal((pairs, dim))
    aside -= (aside * vectors[earlier]).sum(1, keepdims=True) * vectors[earlier]
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    vectors[later] = cosine * vectors[earlier] + np.sqrt(1 - cosine**2) * aside
    return vectors.astype(np.float16), later, earlier
