"""One request's answer: a body, or server-sent events as OpenAI's clients read them, in the format asked for."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from serve.errors import ApiError
from serve.gateway import Gateway, Result
from serve.requests import BEST, Common
from serve.work import Work

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
USAGE = {  # what OpenAI's clients require; nothing is counted in tokens here
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


@dataclass
class Answer:
    """Draws ``work`` and sends it to the client that ``asked``.

    Attributes:
        gateway: Draws.
        asked: The request.
        work: Images to draw.
        event: Prefix of the events' names.
        partial: Largest number of smaller images that are sent for each image.
        base: The server's address, for URLs.
        warnings: Lines that say which fields have no effect, and what was assumed.
    """

    gateway: Gateway
    asked: Common
    work: Work
    event: str
    partial: int
    base: str
    warnings: Sequence[str] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> dict[str, Any]:
        """Returns all images at once."""
        data: list[Any] = [None] * len(self.work.rows)
        async with aclosing(self.gateway.draw(self.work)) as events:
            async for event in events:
                if event[0] == "image":
                    _, i, name, result = event
                    data[i] = await self._image(name, result, self.asked.response_format)
        size = _size(self.work.recipe.side)
        return {"created": self.created, **self._common(), "size": size, "usage": USAGE, "data": data}

    async def events(self) -> AsyncGenerator[bytes]:
        """Yields server-sent events. Raises ApiError before the first, and sends a later one as an event."""
        sent: dict[int, int] = {}
        begun = False
        try:
            async with aclosing(self.gateway.draw(self.work)) as events:
                async for kind, *rest in events:
                    said = await self._said(kind, rest, sent)
                    yield b": drawing\n\n" if said is None else self._event(*said)
                    begun = True
        except ApiError as e:
            if not begun:
                raise
            self.gateway.observe("refusals_total", code=e.code)
            yield _sse("error", e.body)
        yield b"data: [DONE]\n\n"

    async def _said(self, kind: str, rest: list[Any], sent: dict[int, int]) -> tuple[str, dict[str, Any]] | None:
        """Returns name and content of an event, None for one that the client has not asked for."""
        if kind == "partial" and sent.get(rest[0], 0) < self.partial:
            index = sent[rest[0]] = sent.get(rest[0], 0) + 1
            about = {"index": rest[0], "size": _size(rest[1]), "partial_image_index": index - 1}
            return "partial_image", about | {"b64_json": await self._encoded(rest[2])}
        if kind == "image":
            i, name, result = rest
            image = await self._image(name, result, "b64_json") | {"url": self._url(name)}
            return "completed", {"index": i, "size": _size(self.work.recipe.side), "usage": USAGE, **image}
        if kind == "place" and self.asked.progress:
            return "queued", {"place": rest[0]}
        if kind == "step" and self.asked.progress:
            return "step", dict(zip(("stage", "step", "steps"), rest, strict=True))
        return None

    async def _image(self, name: str, result: Result, kind: str) -> dict[str, Any]:
        """Returns one image with its seed and score."""
        where = {"b64_json": await self._encoded(result.png)} if kind == "b64_json" else {"url": self._url(name)}
        return {**where, "seed": result.seed, "score": result.score}

    async def _encoded(self, png: bytes) -> str:
        """Returns an image in base64, in the format that is asked for."""
        asked = self.asked
        data = await asyncio.to_thread(encode, png, asked.output_format, asked.output_compression)
        return base64.b64encode(data).decode()

    def _url(self, name: str) -> str:
        asked = self.asked
        lossy = "" if asked.output_format == "png" else f"?compression={asked.output_compression}"
        return f"{self.base}v1/images/files/{name}.{asked.output_format}{lossy}"

    def _common(self) -> dict[str, Any]:
        """Returns what all answers have."""
        return {
            "background": "opaque",
            "output_format": self.asked.output_format,
            "quality": self.asked.said_quality,
            "warnings": list(self.warnings),
        }

    def _event(self, kind: str, about: dict[str, Any]) -> bytes:
        name = f"{self.event}.{kind}"
        return _sse(name, {"type": name, "created_at": self.created, **self._common(), **about})


def encode(png: bytes, output_format: str, compression: int = BEST) -> bytes:
    """Returns an image in one of MEDIA_TYPES; a PNG as it is, with its recipe, which the other formats do not carry.

    Equal arguments give equal bytes.

    Args:
        png: The finished image, a PNG of this server's.
        output_format: Name of the format.
        compression: Quality of JPEG and WebP, 0 to 100, where 100 is best; PNG is lossless.
    """
    if output_format == "png":
        return png
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        # Colours at full resolution, as a PNG has them; WebP knows no such choice.
        image.convert("RGB").save(out, output_format.upper(), quality=compression, subsampling=0)
    return out.getvalue()


def _size(side: int) -> str:
    return f"{side}x{side}"


def _sse(event: str, data: dict[str, Any]) -> bytes:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()
