"""Searches the index by caption or by image: embeds the query with CLIP and reads the rows found."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.clip import Clip
from models.tokens import check_captions
from models.view import view
from pipeline.data.embeddings.stage import EMBEDDINGS
from pipeline.data.neighbours.indices import search
from pipeline.data.neighbours.stage import INDEX
from pipeline.data.pairs.decoding import open_image
from pipeline.data.pairs.row_index import Place
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, ShardList, ShardRow, load_artifact, read_table
from pipeline.store import Store
from pipeline.store.records import materialise

SEARCHED = (*EMBEDDINGS.inputs, *INDEX.inputs, INDEX.name)  # stages whose artefacts a search reads


@dataclass(frozen=True)
class FoundRow:
    """A row of the index, with the cosine of its image embedding and the query, and its first caption.

    ``place`` is None for a row that imports embeddings and has no image.
    """

    similarity: float
    key: str
    split: str
    url: str
    caption: str
    license: str | None
    attribution: str | None
    place: Place | None


def embed_caption(store: Store, clip: Artifact, caption: str) -> np.ndarray:
    """Returns the text embedding of a caption, fp32 [1, d]. Raises UserError if it is empty or too long."""
    if not caption.strip():
        raise UserError("the caption is empty; describe the images to find")
    model = read_clip(store, clip)
    if model.own_tokenizer is None:
        try:
            check_captions([caption])
        except ValueError as e:
            raise UserError(str(e)) from None
    return _numbers(model.encode_text, model.tokenize([caption]))


def embed_image(store: Store, clip: Artifact, path: str) -> np.ndarray:
    """Returns the image embedding of an image in a file, fp32 [1, d]. Raises UserError as ``open_image`` does."""
    image = open_image(Path(path))
    return embed_opened(read_clip(store, clip), image)


def embed_opened(model: Clip, image: Image.Image) -> np.ndarray:
    """Returns the image embedding of an image that was opened already, fp32 [1, d]."""
    pixels = view(image, model.image_size).transpose(2, 0, 1)[None]
    return _numbers(model.encode_image, torch.from_numpy(pixels.copy()))


def look_up(
    store: Store, artifacts: Mapping[str, Artifact], query: np.ndarray, count: int, splits: Sequence[str]
) -> list[FoundRow]:
    """Finds the rows of ``splits`` nearest to a query fp32 [1, d], nearest first, at most ``count``.

    ``artifacts`` are those of SEARCHED, of one plan.
    """
    similarity, ids = search(store, artifacts["index"], query, count, splits)
    keys = [f"{number:012d}" for number in ids[0].tolist() if number >= 0]
    wanted = {int(key[:8]) for key in keys}
    rows = _rows(store, artifacts["curation"], wanted, "index")
    texts = _rows(store, artifacts["captions"], wanted, "captions")
    images = {shard.number: shard.blobs.get("images") for shard in _shards(store, artifacts["pairs"], wanted)}
    return [
        _found(value, rows[key], (texts[key]["captions"] or [""])[0], images[int(key[:8])])
        for value, key in zip(similarity[0].tolist(), keys, strict=False)
    ]


def searched_with(store: Store, index: Artifact) -> dict[str, Artifact] | None:
    """Returns the artefacts of SEARCHED that an index was made from, and itself; None where one has gone."""
    embeddings = load_artifact(store, "embeddings", index.inputs["embeddings"])
    made_from = {**index.inputs, **embeddings.inputs} if embeddings else {}
    # Captions that were written for the images are of another stage than the one that embeddings declare.
    makers = {name if name in SEARCHED else "captions": (name, key) for name, key in made_from.items()}
    found = {name: made for name, maker in makers.items() if (made := load_artifact(store, *maker)) is not None}
    return {INDEX.name: index, **found} if len(found) + 1 == len(SEARCHED) else None


def _found(similarity: float, row: Mapping[str, Any], caption: str, images: str | None) -> FoundRow:
    place = None if row["size"] is None else Place.of(row, images)
    known = {name: row[name] for name in ("key", "split", "url", "license", "attribution")}
    return FoundRow(similarity, caption=caption, place=place, **known)


def _rows(store: Store, artifact: Artifact, wanted: Collection[int], blob: str) -> dict[str, dict[str, Any]]:
    """Reads the rows of a table that every shard has, by key, from the shards of these numbers only."""
    shards = _shards(store, artifact, wanted)
    return {row["key"]: row for shard in shards for row in read_table(store, shard.blobs[blob]).to_pylist()}


def _shards(store: Store, artifact: Artifact, wanted: Collection[int]) -> list[ShardRow]:
    shards = ShardList(store, artifact)
    return [shard for number in wanted if (shard := shards.find(number)) is not None]


def read_clip(store: Store, clip: Artifact) -> Clip:
    """Returns the CLIP of an artefact, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        materialise(store, clip.blobs, folder)
        return Clip.from_folder(folder).eval()


def _numbers(encode: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return encode(batch).float().numpy()
