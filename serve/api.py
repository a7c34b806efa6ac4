"""OpenAI's image API over HTTP, and a page beside it."""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from models.tokens import check_captions
from serve import neighbours
from serve.door import Door
from serve.errors import ApiError
from serve.painter import Row, Work
from serve.requests import LARGEST_SEED, Common, Generation
from serve.settings import MOST_IMAGES

STUDIO = Path(__file__).parent / "studio"
PAGE = {  # the page asks nobody but this server, and nobody may frame it
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
router = APIRouter()


def make_api(door: Door) -> FastAPI:
    """Returns the application."""
    api = FastAPI(title="unclip serve", version="1", redoc_url=None)
    api.state.door = door
    api.add_exception_handler(ApiError, _told)
    api.add_exception_handler(RequestValidationError, _told)
    api.add_exception_handler(HTTPException, _told)
    api.include_router(router)
    api.include_router(neighbours.router)
    api.mount("/", StaticFiles(directory=STUDIO, html=True, check_dir=False))

    @api.middleware("http")
    async def headers(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        if request.url.path not in ("/docs", "/openapi.json"):  # that page loads its script from elsewhere
            response.headers.update(PAGE)
        return response

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
    return JSONResponse(error.body, error.status, headers=dict(error.headers))


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Says that the server answers, and how many wait."""
    door: Door = request.app.state.door
    about = await door.described()
    return {"status": "ok", "bundle": about["bundle"], "waiting": len(door.line.waiting)}


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """Lists the model, with its sizes, its priors and its sampling defaults."""
    door: Door = request.app.state.door
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
    _check_captions(asked.prompt)
    return await _answer(request, asked, "generation", asked.prompt, "image_generation")


def _check_captions(*captions: str | None) -> None:
    try:
        check_captions([caption for caption in captions if caption is not None])
    except ValueError as e:
        raise ApiError(400, "prompt_too_long", f"prompt: {e}", "prompt") from None


async def _answer(
    request: Request, asked: Common, kind: str, caption: str | None, event: str, images: tuple[bytes, ...] = (),
    **more: Any,
) -> Response:  # fmt: skip
    """Draws, and answers at once or by and by."""
    door: Door = request.app.state.door
    side = await door.side(asked.model, asked.size)
    seed = random.SystemRandom().randrange(LARGEST_SEED - MOST_IMAGES) if asked.seed is None else asked.seed
    partial = min(asked.partial_images, len([one for one in (await door.described())["sides"] if one < side]))
    rows = tuple(Row(caption, seed + i) for i in range(asked.n))
    work = Work(kind, asked.options(), side, rows, images, more, bool(asked.stream and partial))
    answer = _Answer(request, asked, side, partial, event, work)
    if asked.stream:
        return StreamingResponse(answer.events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
    return JSONResponse(await answer.whole())


class _Answer:
    """The answer to one request."""

    def __init__(self, request: Request, asked: Common, side: int, partial: int, event: str, work: Work):
        self.door: Door = request.app.state.door
        self.base, self.asked, self.side, self.partial = str(request.base_url), asked, side, partial
        self.event, self.work, self.created = event, work, int(time.time())

    async def whole(self) -> dict[str, Any]:
        """Returns all images at once."""
        data: list[Any] = [None] * len(self.work.rows)
        async with aclosing(self.door.draw(self.work, lambda _: None)) as events:
            async for event in events:
                if event[0] == "image":
                    data[event[1]] = self._image(*event[2:])
        return {"created": self.created, "size": f"{self.side}x{self.side}", "output_format": "png", "data": data}

    async def events(self) -> AsyncGenerator[bytes]:
        """Yields server-sent events, as OpenAI's clients read them."""
        sent: dict[int, int] = {}
        try:
            async with aclosing(self.door.draw(self.work, lambda _: None)) as events:
                async for kind, *rest in events:
                    if kind == "partial" and sent.get(rest[0], 0) < self.partial:
                        index = sent[rest[0]] = sent.get(rest[0], 0) + 1
                        about = {"partial_image_index": index - 1, "index": rest[0], "size": f"{rest[1]}x{rest[1]}"}
                        yield self._event("partial_image", about | {"b64_json": _base64(rest[2])})
                    elif kind == "image":
                        about = {"index": rest[0], "size": f"{self.side}x{self.side}", "usage": _USAGE}
                        image = self._image(*rest[1:]) | {"b64_json": _base64(rest[2].png)}
                        yield self._event("completed", about | image)
                    elif kind == "place" and self.asked.progress:
                        yield self._event("queued", {"place": rest[0]})
                    elif kind == "step" and self.asked.progress:
                        yield self._event("step", dict(zip(("stage", "step", "steps"), rest, strict=True)))
        except ApiError as e:
            yield _sse("error", e.body)
        yield b"data: [DONE]\n\n"

    def _image(self, name: str, result: Any) -> dict[str, Any]:
        """Returns one image as the request wants it, with its seed and score besides."""
        where = (
            {"b64_json": _base64(result.png)}
            if self.asked.response_format == "b64_json"
            else {"url": f"{self.base}v1/images/files/{name}.png"}
        )
        return {**where, "seed": result.seed, "score": result.score}

    def _event(self, kind: str, about: dict[str, Any]) -> bytes:
        name = f"{self.event}.{kind}"
        common = {"type": name, "created_at": self.created, "quality": "auto", "background": "opaque"}
        return _sse(name, {**common, "output_format": "png", **about})


_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


def _sse(event: str, data: dict[str, Any]) -> bytes:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
