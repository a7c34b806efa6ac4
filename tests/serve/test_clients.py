"""Requests of other programs, as their code writes them, sent to a real server, and read as that code reads an answer.

``bodies.txt`` holds the bodies of Open WebUI (aiohttp's forms), Vercel's AI SDK (undici's) and LiteLLM (httpx's), as
their sources of November 2026 build them.
"""

import base64
import io
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.images_response import Usage
from PIL import Image

from tests.serve.test_api import noise, png

BODIES = Path(__file__).with_name("bodies.txt").read_text()
REQUESTS = {name: text for name, _, text in (part.partition("\n") for part in BODIES.split("=== ")[1:])}


def photograph() -> bytes:
    out = io.BytesIO()
    noise(2, 96).save(out, "JPEG")
    return out.getvalue()


def half() -> Image.Image:
    mask = Image.new("RGBA", (80, 80), "black")
    mask.paste((0, 0, 0, 0), (40, 0, 80, 80))
    return mask


FILES = {b"{image}": png(noise()), b"{photograph}": photograph(), b"{mask}": png(half())}


def send(server: str, request: str) -> httpx.Response:
    """Sends a recorded request, with images in the places of their names."""
    head, _, body = request.strip().partition("\n\n")
    first, kind = head.split("\n")
    data = body.encode()
    if "multipart" in kind:
        data = data.replace(b"\n", b"\r\n") + b"\r\n"
        data = re.sub(rb"\{\w+\}", lambda name: FILES[name[0]], data)
    headers = {"Content-Type": kind.partition(": ")[2], "Authorization": "Bearer none"}
    return httpx.post(server + first.split()[1], content=data, headers=headers, timeout=60)


def read_as_open_webui(answer: dict[str, Any]) -> list[bytes]:
    """Open WebUI fetches an address where there is one, and takes only what is called an image."""
    found = []
    for image in answer["data"]:
        if url := image.get("url", None):
            fetched = httpx.get(url, headers={"Authorization": "Bearer none"})
            assert fetched.headers["content-type"].split("/")[0] == "image"
            found.append(fetched.content)
        else:
            found.append(base64.b64decode(image["b64_json"]))
    return found


def read_as_vercel(answer: dict[str, Any]) -> list[bytes]:
    """The SDK's schema wants a string b64_json of every image, and nothing else."""
    assert all(isinstance(image["b64_json"], str) for image in answer["data"])
    return [base64.b64decode(image["b64_json"]) for image in answer["data"]]


def read_as_litellm(answer: dict[str, Any]) -> list[bytes]:
    """LiteLLM makes OpenAI's own types of the answer, and counts costs by the usage."""
    assert isinstance(answer["created"], int)
    assert Usage.model_validate(answer["usage"], strict=True).total_tokens == 0
    (image,) = answer["data"]
    if image.get("url"):
        return [httpx.get(image["url"]).content]
    return [base64.b64decode(image["b64_json"])]


READERS = {"Open WebUI": read_as_open_webui, "Vercel's AI SDK": read_as_vercel, "LiteLLM": read_as_litellm}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_recorded_request_is_drawn_and_read(served: str, name: str) -> None:
    answer = send(served, REQUESTS[name])
    assert answer.status_code == 200, answer.text
    images = READERS[name.partition(",")[0]](answer.json())
    assert len(images) == (2 if re.search(r'"n": ?2|name="n"\s+2', REQUESTS[name]) else 1)
    assert {Image.open(io.BytesIO(image)).size for image in images} == {(256, 256)}
