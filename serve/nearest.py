"""``POST /v1/unclip/nearest``: the training images nearest to an image, with their licences and attributions."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Form, Request, UploadFile
from PIL import Image

from pipeline.data.neighbours.search import embed_opened
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import load_artifact
from pipeline.sampling.nearest import NO_INDEX, TrainingImage, TrainingImages, find_carried, find_stored, web_address
from pipeline.store import open_store
from serve.bundle import ServedBundle
from serve.errors import ApiError
from serve.uploads import read_image

MOST = 24  # rows of one answer
SEARCHING = ThreadPoolExecutor(2)  # each holds a block of the index in memory, also for a client that has gone
log = logging.getLogger("unclip")
router = APIRouter()
Found = TypeVar("Found")


@router.post("/v1/unclip/nearest")
async def nearest(request: Request, image: UploadFile, n: Annotated[int, Form(ge=1, le=MOST)] = 8) -> dict[str, Any]:
    """Returns the training images nearest to an image, nearest first."""
    opened, licenses = await read_image(image, "image"), request.app.state.gateway.settings.licenses
    found = await _ask(request, lambda training: training.nearest(_embedded(training, opened), n, licenses))
    return {"object": "list", "data": [_as_json(each) for each in found]}


async def nearest_caption(request: Request, image: bytes) -> str:
    """Returns the caption of the training image nearest to an image, "" where those are not known."""
    try:
        found = await _ask(request, lambda training: training.nearest(_embedded(training, image), 1))
    except ApiError:
        return ""
    except UserError as e:  # an image can be changed without it
        log.warning("nearest caption: %s", e)
        return ""
    return found[0].caption if found else ""


async def _ask(request: Request, question: Callable[[TrainingImages], Found]) -> Found:
    """Returns the answer of the images that the served bundle was trained on. Raises ApiError if none are known."""
    gateway = request.app.state.gateway
    bundle = (await gateway.described())["bundle"]
    try:
        training = await asyncio.to_thread(training_images, gateway.served, bundle)
        if training is None:
            raise ApiError(404, "no_index", NO_INDEX)
        return await asyncio.get_running_loop().run_in_executor(SEARCHING, question, training)
    except CorruptObject as e:  # since it was looked up, such as by data forget and data gc
        training_images.cache_clear()
        log.warning("nearest: %s", e)
        raise ApiError(404, "no_index", f"{NO_INDEX}; part of it disappeared after the server started") from e


@lru_cache(2)  # of the release and the one before it, whose requests may still run
def training_images(served: ServedBundle, key: str) -> TrainingImages | None:
    """Returns the images that the served bundle of a key was trained on; None where they are not known."""
    if not served.store:
        return find_carried(Path(served.folder)) if served.folder else None
    store = open_store(served.store)
    bundle = load_artifact(store, "bundle", key)
    return find_stored(store, bundle) if bundle else None


def _embedded(training: TrainingImages, image: bytes) -> Any:
    """Returns the embedding of an image, a PNG as ``read_image`` gives it, fp32 [1, d]."""
    return embed_opened(training.clip, Image.open(io.BytesIO(image)))


def _as_json(found: TrainingImage) -> dict[str, Any]:
    return {
        "object": "unclip.training_image",
        "similarity": round(found.similarity, 4),
        "caption": found.caption,
        "license": found.license,
        "attribution": found.attribution,
        "url": web_address(found.url),
        "b64_json": None if found.data is None else base64.b64encode(found.data).decode(),
    }
