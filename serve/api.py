"""OpenAI's image API over HTTP, and the studio, a page that uses it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Form, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from models.tokens import check_captions, cut_note
from pipeline.sampling.recipe import CHARACTERS, LARGEST_SEED, ImageRecipe, InputImage, drawn_side
from serve import nearest
from serve.answer import MEDIA_TYPES, Answer, encode
from serve.errors import ApiError, invalid, unreadable
from serve.gateway import Gateway
from serve.guard import Guard
from serve.requests import (
    ALIASES,
    BEST,
    Common,
    Edit,
    Generation,
    Interpolation,
    Variation,
    names_model,
)
from serve.settings import MOST_IMAGES
from serve.uploads import check_mask, file_name, read_caption, read_image, read_mask
from serve.work import Work

STUDIO = Path(__file__).parent / "studio"
FORM = Form(media_type="multipart/form-data")
router = APIRouter()
log = logging.getLogger("unclip")


def make_api(gateway: Gateway, tokens: Mapping[str, str], figures: Callable[[], bytes]) -> FastAPI:
    """Returns the application."""
    api = FastAPI(title="unclip serve", version="1", docs_url=None, redoc_url=None)  # their pages load foreign scripts
    api.state.gateway, api.state.figures, api.state.started = gateway, figures, int(time.time())
    api.add_exception_handler(ApiError, _answer_error)
    api.add_exception_handler(RequestValidationError, _answer_error)
    api.add_exception_handler(HTTPException, _answer_error)
    api.include_router(router)
    api.include_router(nearest.router)
    api.mount("/", StaticFiles(directory=STUDIO, html=True, check_dir=False))
    api.add_middleware(
        Guard, settings=gateway.settings, tokens=tokens, observe=gateway.observe, traffic=gateway.traffic
    )
    if gateway.settings.origins:
        api.add_middleware(
            CORSMiddleware, allow_origins=gateway.settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return api


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    """Returns an error as OpenAI's clients read it."""
    if isinstance(error, RequestValidationError):
        first, sent = error.errors()[0], request.headers.get("content-type", "")
        of_form = first["loc"][0] == "body" and not request.url.path.endswith("/generations")
        if sent.startswith("multipart/form-data") or not of_form:
            error = unreadable(first)
        else:
            error = invalid("The body is not a form: send multipart/form-data, with the image as a file")
    elif isinstance(error, HTTPException):
        missing = error.status_code in (404, 405)  # a path that no endpoint has is one of the page's files
        message = f"There is no {request.method} {request.url.path} here; /openapi.json lists what there is"
        error = ApiError(404, "not_found", message) if missing else invalid(error.detail)
    assert isinstance(error, ApiError)
    request.app.state.gateway.observe("refusals_total", code=error.code)
    return JSONResponse(error.body, error.status, headers=dict(error.headers))


@router.get("/health")
@router.head("/health", include_in_schema=False)
async def health(request: Request) -> dict[str, Any]:
    """Says that the server is alive, and how many wait."""
    gateway: Gateway = request.app.state.gateway
    about = await gateway.described()
    return {
        "status": "ok",
        "bundle": about["bundle"],
        "waiting": len(gateway.queue.waiting),
        "warning": about["warning"],
    }


@router.get("/ready")
async def ready(request: Request) -> dict[str, Any]:
    """Says that a request would be drawn: something that draws gave a sign of life, and the server is not ending."""
    gateway: Gateway = request.app.state.gateway
    if gateway.traffic.draining or not gateway.ready():
        raise ApiError(503, "unavailable", "Nothing can be drawn now", retry_after=5)
    return {"status": "ready"}


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """Returns the server's figures in Prometheus' text format."""
    return Response(request.app.state.figures(), media_type="text/plain; version=0.0.4")


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """Lists the model, with its sizes, its priors and its sampling defaults."""
    return {"object": "list", "data": [await _model(request)]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """Returns the model, by any of the names that a request for images may call it."""
    found = await _model(request)
    _check_model(request, name, found["unclip"])
    return found


async def _model(request: Request) -> dict[str, Any]:
    gateway: Gateway = request.app.state.gateway
    about = {**await gateway.described(), "most_images": MOST_IMAGES}
    common = {"object": "model", "created": request.app.state.started, "owned_by": "unclip"}
    return {"id": gateway.name, **common, "unclip": about}


def _check_model(request: Request, model: str, about: Mapping[str, Any]) -> None:
    """Raises ApiError for the name of another model."""
    own = request.app.state.gateway.name
    if not names_model(model, own, about["bundle"]):
        message = f"The model {model!r} is not served here: leave model out, or use {own!r}"
        raise ApiError(404, "model_not_found", message, "model")


@router.get("/v1/images/files/{name}.{output_format}")
async def file(
    request: Request, name: str, output_format: str, compression: Annotated[int, Query(ge=0, le=100)] = BEST
) -> Response:
    """Returns a finished image, as long as the server keeps it."""
    found = request.app.state.gateway.results.get(name)
    if found is None or output_format not in MEDIA_TYPES:
        raise ApiError(404, "not_found", "This image is no longer kept: send its request again")
    data = await asyncio.to_thread(encode, found.png, output_format, compression)
    kept = {"Cache-Control": "private, max-age=3600, immutable"}
    return Response(data, media_type=MEDIA_TYPES[output_format], headers=kept)


@router.post("/v1/images/generations")
async def generations(request: Request, asked: Generation) -> Response:
    """Draws images of a caption."""
    return await _answer(request, asked, "draw", "image_generation")


@router.post("/v1/images/variations")
async def variations(request: Request, asked: Annotated[Variation, FORM]) -> Response:
    """Draws other images with the meaning of one."""
    images = [await read_image(asked.image[0], "image")]
    return await _answer(request, asked, "vary", "image_variation", images, eta=asked.eta)


@router.post("/v1/images/edits")
async def edits(request: Request, asked: Annotated[Edit, FORM]) -> Response:
    """Draws a part of an image again, changes an image by words, or blends two."""
    images = [await read_image(image, "image") for image in asked.image]
    if asked.mask is not None:
        images.append(await read_mask(asked.mask))
        await asyncio.to_thread(check_mask, *images)
        return await _answer(request, asked, "inpaint", "image_edit", images)
    if len(images) == 2:
        why = "prompt has no effect: two images are blended by their embeddings"
        return await _answer(request, asked, "interpolate", "image_edit", images, [why])
    before, said = await _before(request, asked, images[0])
    return await _answer(request, asked, "change", "image_edit", images, said, before=before)


async def _before(request: Request, asked: Edit, image: bytes) -> tuple[str, list[str]]:
    """Returns the caption of the image as it is, and where it is from if the request does not say it."""
    if asked.before is not None:
        return asked.before, []
    why = "is used as the original caption: send before if another fits better"
    if await _differs(recipe := await read_caption(asked.image[0]), asked.prompt):
        return recipe, [f"before: {recipe!r}, the caption in the image's own recipe, {why}"]
    if await _differs(caption := await nearest.nearest_caption(request, image), asked.prompt):
        return caption, [f"before: {caption!r}, the caption of the nearest training image, {why}"]
    return "", [f"before: the empty caption {why}"]


async def _differs(caption: str, prompt: str) -> bool:
    """Returns whether there is a direction from a caption that nobody has checked to the prompt."""
    try:
        await asyncio.to_thread(check_captions, [caption[:CHARACTERS]])
    except ValueError:
        return False
    return caption.split() not in ([], prompt.split())


@router.post("/v1/images/interpolations")
async def interpolations(request: Request, asked: Annotated[Interpolation, FORM]) -> Response:
    """Draws images on the way from one image to another."""
    images = [await read_image(asked.first, "first"), await read_image(asked.second, "second")]
    return await _answer(request, asked, "interpolate", "image_interpolation", images)


async def _answer(
    request: Request,
    asked: Common,
    operation: str,
    event: str,
    images: Sequence[bytes] = (),
    warnings: Sequence[str] = (),
    **more: Any,
) -> Response:
    """Draws, and answers with all images at once or with each as it is made."""
    gateway: Gateway = request.app.state.gateway
    about = await gateway.described()
    warnings = [*warnings, *asked.warnings()]
    if asked.model is not None:
        _check_model(request, asked.model, about)
        if asked.model.startswith(ALIASES) and asked.model != gateway.name:
            warnings.append(f"model: {asked.model} is a name for {gateway.name!r} here")
    side = asked.side(about["sides"])
    try:
        captions = [caption for caption in (asked.prompt, more.get("before")) if caption is not None]
        await asyncio.to_thread(check_captions, captions)  # one word of thousands of letters takes most of a second
        warnings += filter(None, [await asyncio.to_thread(cut_note, captions, about["context"])])
    except ValueError as e:
        raise ApiError(400, "prompt_too_long", f"prompt: {e}", "prompt") from None
    options = asked.options(about["sampling"], about["timesteps"])
    own = about["sampling"]["decoder_steps"]
    cost = max(1, options.get("decoder_steps", own) / own)  # fewer steps save nothing of the upsamplers' work
    seed = random.SystemRandom().randrange(LARGEST_SEED - MOST_IMAGES) if asked.seed is None else asked.seed
    given = {"n": asked.n, "seed": seed, "shares": asked.shares(), "side": side, **more}
    given["images"] = tuple(InputImage("", file_name(upload)) for upload in asked.uploads())  # hashed when it is drawn
    options["size"] = drawn_side(side)
    try:
        caption = None if operation == "interpolate" else asked.prompt
        recipe = ImageRecipe(operation, caption, options=options, **given)
    except ValueError as e:
        raise invalid(str(e)) from None
    spent = request.scope["allowance"].spend("megapixels", asked.n * drawn_side(side) ** 2 / 1e6 * cost)
    request.scope["drawing"] = asked.n, side
    if gateway.settings.log_prompts:
        log.info("%s: %r", operation, asked.prompt)
    smaller = len([one for one in about["sides"] if one < side])
    partial = min(asked.partial_images, smaller) if asked.stream else 0
    work = Work(recipe, recipe.rows, tuple(images), partial > 0)
    answer = Answer(gateway, asked, work, event, partial, str(request.base_url), warnings)
    try:
        if not asked.stream:
            return JSONResponse(await answer.whole())
        events = answer.events()
        first = await anext(events)  # a full queue is said by the status
    except ApiError:
        request.scope["allowance"].give_back("megapixels", spent)
        raise
    return StreamingResponse(_chained(first, events), 200, {"X-Accel-Buffering": "no"}, "text/event-stream")


async def _chained(first: bytes, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event
