"""An OpenAI-compatible endpoint on loopback whose captions are functions of the images that it is sent."""

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.asgi import running

KEY = "sk-a-key-of-nobody"


def completion(text: Any, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    said = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "message": said, "finish_reason": finish_reason}
    return {"object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 7}}


def caption_of(image: bytes, prompt: str = "", model: str = "") -> str:
    """What the endpoint says of an image."""
    pixels = np.asarray(Image.open(io.BytesIO(image)))
    name = hashlib.sha256(f"{prompt}\0{model}\0".encode() + image).hexdigest()[:12]
    return f"picture {name} of {pixels.shape[1]} by {pixels.shape[0]} pixels"


@dataclass
class Vision:
    """What the endpoint was asked, and how it answers.

    ``answer`` is called with an image and with how often it was sent before; None leaves the usual answer.
    """

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    images: Counter[bytes] = field(default_factory=Counter)
    answer: Callable[[bytes, int], Response | None] = lambda image, before: None
    under_way: int = 0
    most: int = 0

    @property
    def asked(self) -> Counter[bytes]:
        """How often each image was sent, without the grey ones that begin a worker's requests."""
        return Counter({image: count for image, count in self.images.items() if not grey(image)})

    def respond(self, headers: dict[str, str], body: dict[str, Any]) -> Response:
        text, picture = body["messages"][0]["content"]
        image = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,"), validate=True)
        with _lock:
            before = self.images[image]
            self.images[image] += 1
            self.requests.append(body)
            self.headers.append(headers)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        try:
            usual = JSONResponse(completion(caption_of(image, text["text"], body["model"])))
            return usual if grey(image) else self.answer(image, before) or usual
        finally:
            with _lock:
                self.under_way -= 1


_lock = Lock()


def grey(image: bytes) -> bool:
    """Whether an image has one colour, as the one that begins a worker's requests."""
    return bool(np.ptp(np.asarray(Image.open(io.BytesIO(image)))) == 0)


@contextmanager
def serving() -> Iterator[Vision]:
    """Serves on a port of its own while the block lasts."""
    vision = Vision()

    async def complete(request: Request) -> Response:
        body = json.loads(await request.body())
        return await run_in_threadpool(vision.respond, dict(request.headers), body)

    app = Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"])])
    with running(app, timeout_graceful_shutdown=1) as url:
        vision.url = f"{url}/v1"
        yield vision
