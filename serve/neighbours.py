"""``POST /v1/unclip/neighbours``: the training images nearest to an image, with their licences and attributions."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Form, Request, UploadFile
from PIL import Image

from models.clip import Clip
from pipeline.data.fetch.references import shown
from pipeline.data.neighbours.search import FoundRow, embed_opened, look_up, read_clip
from pipeline.data.pairs.decoding import shared_decoder
from pipeline.data.pairs.image import MAX_PIXELS, Storing
from pipeline.data.pairs.row_index import read_images
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import Artifact, load_artifact, made_with
from pipeline.store import Store, open_store
from serve.bundle import ServedBundle
from serve.errors import ApiError
from serve.uploads import read_image

MOST = 24  # rows of one answer
THUMBNAIL = Storing(192, "jpg", 85)  # px of the short side, format and quality
SEARCHING = ThreadPoolExecutor(2)  # each holds a block of the index in memory, also for a client that has gone
MAKE = "unclip run CONFIG --until index makes it, and the bundle has to be served from that project's store"
log = logging.getLogger("unclip")
router = APIRouter()
Found = TypeVar("Found")


@router.post("/v1/unclip/neighbours")
async def neighbours(
    request: Request, image: UploadFile, count: Annotated[int, Form(ge=1, le=MOST)] = 8
) -> dict[str, Any]:
    """Returns the training images nearest to an image, nearest first."""
    opened = await read_image(image, "image")
    return {"object": "list", "data": await _ask(request, lambda training: training.nearest(opened, count))}


async def nearest_caption(request: Request, image: bytes) -> str:
    """Returns the caption of the training image nearest to an image, "" where the rows have no index."""
    try:
        return await _ask(request, lambda training: training.caption(image))
    except ApiError:
        return ""
    except UserError as e:  # an image can be changed without it
        log.warning("nearest caption: %s", e)
        return ""


async def _ask(request: Request, question: Callable[[TrainingSet], Found]) -> Found:
    """Returns the answer of the rows that the served bundle was trained on. Raises ApiError if they have no index."""
    gateway = request.app.state.gateway
    bundle = (await gateway.described())["bundle"]
    try:
        training = await asyncio.to_thread(training_set_of, gateway.served, bundle, gateway.settings.licenses)
        return await asyncio.get_running_loop().run_in_executor(SEARCHING, question, training)
    except CorruptObject as e:  # since it was looked up, such as by data forget and data gc
        training_set_of.cache_clear()
        log.warning("neighbours: %s", e)
        raise ApiError(
            404, "no_index", f"The rows that this bundle was trained on have no index any more: {MAKE}"
        ) from e


@dataclass(frozen=True)
class TrainingSet:
    """The rows that a bundle's decoder was trained on, and their index.

    Attributes:
        store: Store of the artefacts.
        artifacts: Artefacts that ``look_up`` takes, and the CLIP.
        licenses: Licences of the images that may be shown, all if none is named; other rows come without their image.
    """

    store: Store
    artifacts: Mapping[str, Artifact]
    licenses: Collection[str] = ()

    @cached_property
    def clip(self) -> Clip:
        """Returns the CLIP that made the embeddings in the index."""
        return read_clip(self.store, self.artifacts["clip"])

    def nearest(self, image: bytes, count: int) -> list[dict[str, Any]]:
        """Returns the training rows nearest to an image, a PNG as ``read_image`` gives it, nearest first, as JSON."""
        return [self._described(row) for row in self._found(image, count)]

    def caption(self, image: bytes) -> str:
        """Returns the caption of the training row nearest to an image, a PNG as ``read_image`` gives it."""
        return next((row.caption for row in self._found(image, 1)), "")

    def _found(self, image: bytes, count: int) -> list[FoundRow]:
        embedding = embed_opened(self.clip, Image.open(io.BytesIO(image)))
        return look_up(self.store, self.artifacts, embedding, count, ("train",))

    def _described(self, row: FoundRow) -> dict[str, Any]:
        # Paths of this machine stay private, and a URL may hold a password or a signature.
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
        if row.place is None or (self.licenses and row.license not in self.licenses):
            return None
        try:
            [data] = read_images(self.store, [row.place])
        except CorruptObject:
            return None
        found = shared_decoder().prepare(data, MAX_PIXELS, THUMBNAIL)
        return None if isinstance(found, str) else base64.b64encode(found.data).decode()


def find_training_set(store: Store, bundle: Artifact, licenses: Collection[str] = ()) -> TrainingSet | None:
    """Returns the rows that a bundle's decoder was trained on; None where the store has no index of them.

    The index is one of the decoder's own curated rows, and of embeddings by the bundle's CLIP.
    """
    decoder = load_artifact(store, "decoder", bundle.inputs["decoder"])
    if decoder is None:
        return None
    for index in made_with(store, "index", "curation", decoder.inputs["curation"]):
        embeddings = load_artifact(store, "embeddings", index.inputs["embeddings"])
        if embeddings is None or embeddings.inputs.get("clip") != bundle.inputs["clip"]:
            continue
        keys = {**embeddings.inputs, "curation": index.inputs["curation"]}
        found = {name: load_artifact(store, name, keys[name]) for name in ("captions", "clip", "curation", "pairs")}
        if all(found.values()):
            return TrainingSet(store, {"index": index, **{n: a for n, a in found.items() if a is not None}}, licenses)
    return None


@lru_cache(2)  # of the release and the one before it, whose requests may still run
def training_set_of(served: ServedBundle, key: str, licenses: tuple[str, ...]) -> TrainingSet:
    """Returns what the served bundle of a key was trained on. Raises ApiError if its rows have no index."""
    store = open_store(served.store) if served.store else None
    bundle = load_artifact(store, "bundle", key) if store else None
    found = find_training_set(store, bundle, licenses) if store and bundle else None
    if found is None:
        raise ApiError(
            404,
            "no_index",
            f"The rows that this bundle was trained on have no index: {MAKE}",
        )
    return found
