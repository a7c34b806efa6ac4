"""``POST /v1/unclip/neighbours``: the training images nearest to an image, with their licences and attributions."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from pipeline.data.fetch.references import shown
from pipeline.data.neighbours.search import FoundRow, look_up
from pipeline.data.pairs.decoding import shared_decoder
from pipeline.data.pairs.image import MAX_PIXELS, Storing
from pipeline.data.pairs.row_index import read_images
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.store import Store

MOST = 24  # rows of one answer
THUMBNAIL = Storing(192, "jpg", 85)  # px of the short side, format and quality


@dataclass(frozen=True)
class TrainingSet:
    """The rows that a bundle's decoder was trained on, and their index.

    ``artifacts`` are those that ``look_up`` takes. ``licenses`` are those of the images that may be shown, None for
    any; of other rows everything but the image is told.
    """

    store: Store
    artifacts: Mapping[str, Artifact]
    licenses: Collection[str] | None = None

    def nearest(self, embedding: np.ndarray, count: int) -> list[dict[str, Any]]:
        """Returns the training rows nearest to an image embedding fp32 [1, d], nearest first, as JSON."""
        return [self._described(row) for row in look_up(self.store, self.artifacts, embedding, count, ("train",))]

    def _described(self, row: FoundRow) -> dict[str, Any]:
        # A path of the machine is nobody's business, and a reference may hold what lets others use it.
        url = shown(row.url) if row.url.startswith(("http://", "https://")) else None
        return {
            "object": "unclip.neighbour",
            "similarity": round(row.similarity, 4),
            "caption": row.caption,
            "license": row.license,
            "attribution": row.attribution,
            "url": url,
            "b64_json": self._thumbnail(row),
        }

    def _thumbnail(self, row: FoundRow) -> str | None:
        """Returns a small JPEG in base64; None for a row without an image, and for one that may not be shown."""
        if row.place is None or (self.licenses is not None and row.license not in self.licenses):
            return None
        try:
            [data] = read_images(self.store, [row.place])
        except CorruptObject:
            return None
        found = shared_decoder().prepare(data, MAX_PIXELS, THUMBNAIL)
        return None if isinstance(found, str) else base64.b64encode(found.data).decode()


def find_training_set(store: Store, bundle: Artifact, licenses: Collection[str] | None = None) -> TrainingSet | None:
    """Returns the rows that a bundle's decoder was trained on; None where the store has no index of them.

    The index is one of the decoder's own curated rows, and of embeddings by the bundle's CLIP.
    """
    decoder = load_artifact(store, "decoder", bundle.inputs["decoder"])
    if decoder is None:
        return None
    for entry in store.list("artifacts/index/"):
        index = load_artifact(store, "index", PurePosixPath(entry.path).stem)
        if index is None or index.inputs.get("curation") != decoder.inputs["curation"]:
            continue
        embeddings = load_artifact(store, "embeddings", index.inputs["embeddings"])
        if embeddings is None or embeddings.inputs.get("clip") != bundle.inputs["clip"]:
            continue
        keys = {
            "curation": index.inputs["curation"],
            **{name: embeddings.inputs[name] for name in ("captions", "pairs")},
        }
        found = {name: load_artifact(store, name, key) for name, key in keys.items()}
        if all(found.values()):
            return TrainingSet(store, {"index": index, **{n: a for n, a in found.items() if a is not None}}, licenses)
    return None
