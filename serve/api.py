"""OpenAI's image API over HTTP, and a page beside it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Form, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from models.tokens import check_captions
from serve import neighbours
from serve.answer import Answer
from serve.errors import ApiError
from serve.gateway import Gateway
from serve.guard import Guard
from serve.requests import LARGEST_SEED, Common, Edit, Generation, Interpolation, Variation
from serve.settings import MOST_IMAGES
from serve.uploads import check_mask, read_image, read_mask
from serve.work import Work, drawn_side

STUDIO = Path(__file__).parent / "studio"
FORM = Form(media_type="multipart/form-data")
router = APIRouter()
log = logging.getLogger("unclip")


def make_api(door: Gateway, tokens: Mapping[str, str], figures: Callable[[], bytes]) -> FastAPI:
    """Returns the application."""
    api = FastAPI(title="unclip serve", version="1", docs_url=None, redoc_url=None)  # their pages load foreign scripts
    api.state.door, api.state.figures = door, figures
    api.add_exception_handler(ApiError, _told)
    api.add_exception_handler(RequestValidationError, _told)
    api.add_exception_handler(HTTPException, _told)
    api.include_router(router)
    api.include_router(neighbours.router)
    api.mount("/", StaticFiles(directory=STUDIO, html=True, check_dir=False))
    api.add_middleware(Guard, settings=door.settings, tokens=tokens, observe=door.observe, traffic=door.traffic)
    if door.settings.origins:
        api.add_middleware(
            CORSMiddleware, allow_origins=door.settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return api


async def _told(request: Request, error: Exception) -> JSONResponse:
    """Returns an error as OpenAI's clients read it."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in ("body", "query")]
        message = f"{'.'.join(where)}: {first['msg']}" if where else first["msg"]
        error = ApiError(400, "invalid_request", message, ".".join(where) or None)
    elif isinstance(error, HTTPException):
        error = ApiError(
            error.status_code, "not_found" if error.status_code == 404 else "invalid_request", error.detail
        )
    assert isinstance(error, ApiError)
    request.app.state.door.observe("refusals_total", code=error.code)
    return JSONResponse(error.body, error.status, headers=dict(error.headers))


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Says that the server is alive, and how many wait."""
    door: Gateway = request.app.state.door
    about = await door.described()
    return {"status": "ok", "bundle": about["bundle"], "waiting": len(door.line.waiting), "warning": about["warning"]}


@router.get("/ready")
async def ready(request: Request) -> dict[str, Any]:
    """Says that a request would be drawn: something that draws gave a sign of life, and the server is not ending."""
    door: Gateway = request.app.state.door
    if door.traffic.draining or not door.ready():
        raise ApiError(503, "unavailable", "Nothing can be drawn now", retry_after=5)
    return {"status": "ready"}


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """Returns the server's figures in Prometheus' text format."""
    return Response(request.app.state.figures(), media_type="text/plain; version=0.0.4")


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """Lists the model, with its sizes, its priors and its sampling defaults."""
    door: Gateway = request.app.state.door
    about = {**await door.described(), "most_images": MOST_IMAGES}
    return {
        "object": "list",
        "data": [{"id": door.name, "object": "model", "created": 0, "owned_by": "you", "unclip": about}],
    }


@router.get("/v1/images/files/{name}.png")
async def file(request: Request, name: str) -> Response:
    """Returns a finished image, as long as the server keeps it."""
    found = request.app.state.door.results.get(name)
    if found is None:
        raise ApiError(404, "not_found", "This image is not kept any longer: send its request again")
    return Response(found.png, media_type="image/png", headers={"Cache-Control": "private, max-age=3600, immutable"})


@router.post("/v1/images/generations")
async def generations(request: Request, asked: Generation) -> Response:
    """Draws images of a caption."""
    return await _answer(request, asked, "generation", "image_generation")


@router.post("/v1/images/variations")
async def variations(request: Request, asked: Annotated[Variation, FORM]) -> Response:
    """Draws other images with the meaning of one."""
    images = [await read_image(asked.image, "image")]
    return await _answer(request, asked, "variation", "image_variation", images, eta=asked.eta)


@router.post("/v1/images/edits")
async def edits(request: Request, asked: Annotated[Edit, FORM]) -> Response:
    """Draws a part of an image again, or changes an image by words."""
    images = [await read_image(asked.image, "image")]
    if asked.mask is None:
        return await _answer(request, asked, "difference", "image_edit", images, before=asked.before)
    images.append(await read_mask(asked.mask))
    await asyncio.to_thread(check_mask, *images)
    return await _answer(request, asked, "inpainting", "image_edit", images)


@router.post("/v1/images/interpolations")
async def interpolations(request: Request, asked: Annotated[Interpolation, FORM]) -> Response:
    """Draws images on the way from one image to another."""
    images = [await read_image(asked.first, "first"), await read_image(asked.second, "second")]
    return await _answer(request, asked, "interpolation", "image_interpolation", images)


async def _answer(
    request: Request, asked: Common, kind: str, event: str, images: Sequence[bytes] = (), **more: Any
) -> Response:
    """Draws, and answers with all images at once or with each as it is made."""
    door: Gateway = request.app.state.door
    side = await door.side(asked.model, asked.size)
    try:
        captions = [caption for caption in (asked.prompt, more.get("before")) if caption is not None]
        await asyncio.to_thread(check_captions, captions)  # one word of thousands of letters takes most of a second
    except ValueError as e:
        raise ApiError(400, "prompt_too_long", f"prompt: {e}", "prompt") from None
    spent = request.scope["allowance"].spend("megapixels", asked.n * drawn_side(side) ** 2 / 1e6)
    request.scope["drawing"] = asked.n, side
    if door.settings.log_prompts:
        log.info("%s: %r", kind, asked.prompt)
    seed = random.SystemRandom().randrange(LARGEST_SEED - MOST_IMAGES) if asked.seed is None else asked.seed
    smaller = len([one for one in (await door.described())["sides"] if one < side])
    partial = min(asked.partial_images, smaller) if asked.stream else 0
    work = Work(kind, asked.options(), side, asked.rows(seed), tuple(images), more, partial > 0)
    answer = Answer(door, asked, work, event, partial, str(request.base_url))
    try:
        if not asked.stream:
            return JSONResponse(await answer.whole())
        events = answer.events()
        first = await anext(events)  # a line that is full is said by the status
    except ApiError:
        request.scope["allowance"].give_back("megapixels", spent)
        raise
    return StreamingResponse(_chained(first, events), 200, {"X-Accel-Buffering": "no"}, "text/event-stream")


async def _chained(first: bytes, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event
