"""Clients of the API, on a real server: OpenAI's own, and other programs by what their code sends.

Every value of every field that the installed openai client's own types name is sent by that client. A value that a new
version of it adds is answered with an image or the reason of a table, or fails until somebody decides what it gets.

``bodies.txt`` holds the bodies of Open WebUI (aiohttp's forms), Vercel's AI SDK (undici's) and LiteLLM (httpx's), as
their sources of November 2026 build them. The answers are read as that code reads them.
"""

import base64
import io
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import httpx
import openai
import pytest
import yaml
from openai.types import image_create_variation_params, image_edit_params, image_generate_params
from openai.types.image_edit_completed_event import ImageEditCompletedEvent
from openai.types.image_gen_completed_event import ImageGenCompletedEvent
from openai.types.images_response import ImagesResponse, Usage
from PIL import Image

from serve.requests import IGNORED, REFUSED
from tests.serve.clients import block
from tests.serve.images import noise, opened, png

pytestmark = pytest.mark.filterwarnings("ignore:deprecated")  # OpenAI has given up variations; we have not
# What stands for a field's value where the client's types leave it open.
OPEN: dict[str, Any] = {
    "prompt": "a red fox",
    "n": 1,
    "user": "somebody",
    "safety_identifier": "somebody",
    "frame_count": 2,
    "frame_duration_ms": 2,
    "output_compression": 50,
    "partial_images": 2,
    "svg": {"model": "an author", "reasoning": {"effort": "low"}},
    **dict.fromkeys(("image", "mask", "markup"), png(noise())),
}


def values(kind: Any) -> Iterator[Any]:
    """What a field may be: its literals, and what stands for an open type."""
    origin = get_origin(kind)
    if origin is typing.Required:
        yield from values(get_args(kind)[0])
    elif origin in (Union, types.UnionType):
        options = [each for each in get_args(kind) if each is not type(None)]
        closed = [each for each in options if get_origin(each) is Literal]
        for each in closed or options:
            yield from values(each)
    elif origin is Literal:
        yield from get_args(kind)
    else:
        yield kind


CALLS: dict[str, tuple[Any, ...]] = {
    "generate": get_args(image_generate_params.ImageGenerateParams),
    "edit": get_args(image_edit_params.ImageEditParams),
    "create_variation": (image_create_variation_params.ImageCreateVariationParams,),
}


def sent(call: str) -> Iterator[tuple[str, Any]]:
    """Every field of a call with every value that the client's types name for it, or one of ours where it is open."""
    found: dict[str, dict[Any, None]] = {}
    for kind in CALLS[call]:
        for name, annotation in get_type_hints(kind, include_extras=True).items():
            literals = [value for value in values(annotation) if isinstance(value, str | bool | int)]
            found.setdefault(name, {}).update(dict.fromkeys(literals))
    for name, literals in found.items():
        yield from ((name, value) for value in literals or [OPEN[name]])


def refusal(field: str, value: Any) -> str:
    """What the refusal of a value says, "" for one that is drawn."""
    if field == "size" and value not in ("auto", "256x256"):
        return "this bundle draws squares of 64, 256 px: use 256x256, the nearest, or auto"
    if field == "mask":
        return "is opaque in all of the square that is drawn, whatever its colours"
    return REFUSED.get(field) or REFUSED.get(f"{field}={value}", "")


@pytest.mark.parametrize("call", CALLS)
def test_every_value_of_the_clients_types_is_drawn_warned_of_or_refused_with_the_reason(
    client: openai.OpenAI, call: str
) -> None:
    method: Any = getattr(client.images, call)
    needed = {"generate": ["prompt"], "edit": ["prompt", "image"], "create_variation": ["image"]}[call]
    base = {"size": "64x64", "extra_body": {"seed": 7, "steps": 2}, **{name: OPEN[name] for name in needed}}
    plain = method(**base).data[0].b64_json
    for field, value in sent(call):
        asked = base | {field: value}
        if field == "quality":  # which steps would override
            asked["extra_body"] = {"seed": 7}
        if field == "partial_images":  # an image that is kept has no smaller ones before it
            asked |= {"stream": True, "extra_body": {"seed": 8, "steps": 2}}
        if said := refusal(field, value):
            with pytest.raises(openai.BadRequestError, match=re.escape(said)) as caught:
                method(**asked)
            assert caught.value.param == field
            continue
        made = method(**asked)
        kind: Any = ImagesResponse
        if asked.get("stream"):
            *partial, made = made
            assert len(partial) == (field == "partial_images")  # of a bundle of 16, 64 and 256 px
            kind = {"generate": ImageGenCompletedEvent, "edit": ImageEditCompletedEvent}[call]
        # The client takes what it is given without a look; its types say what may be there.
        kind.model_validate(made.model_dump(warnings=False), strict=True)
        side = 256 if field == "size" else 64
        assert (made.size, made.background) == (f"{side}x{side}", "opaque")
        one = made if asked.get("stream") else made.data[0]
        if value == "url":
            assert one.url
        else:
            image = opened(one.b64_json)
            assert (image.width, image.format) == (side, made.output_format.upper())
        warned = [line for line in made.warnings if not line.startswith("before: ")]  # of an edit by its prompt alone
        idle = field in (*IGNORED, "model", "output_compression")
        assert [line.startswith(field) for line in warned] == [True] * idle, (field, value)
        assert not idle or one.b64_json == plain


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_program_of_the_page_draws(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block("python").replace("http://127.0.0.1:8000", served), names)
    assert {Image.open(file).size for file in tmp_path.glob("monster-?.png")} == {(256, 256)}
    assert opened(names["turned"].data[0].b64_json).size == (256, 256)


def test_the_settings_of_the_page_are_drawn(served: str) -> None:
    """The address, the model and the size that Open WebUI and LiteLLM put into their requests."""
    settings = dict(line.split("=", 1) for line in block("dotenv").splitlines())
    (entry,) = yaml.safe_load(block("yaml"))["model_list"]
    proxied = entry["litellm_params"]
    for address, model, size in (
        (settings["IMAGES_OPENAI_API_BASE_URL"], settings["IMAGE_GENERATION_MODEL"], settings["IMAGE_SIZE"]),
        (settings["IMAGES_EDIT_OPENAI_API_BASE_URL"], settings["IMAGE_EDIT_MODEL"], settings["IMAGE_EDIT_SIZE"]),
        (proxied["api_base"], proxied["model"].removeprefix("openai/"), "64x64"),
    ):
        place = address.replace("http://127.0.0.1:8000", served)
        asked = {"model": model, "prompt": "a red fox", "n": 1, "size": size}
        answer = httpx.post(f"{place}/images/generations", json=asked, timeout=300)
        assert answer.status_code == 200, answer.text
        side = int(size.partition("x")[0])
        assert opened(answer.json()["data"][0]["b64_json"]).size == (side, side)


# --- other programs ---------------------------------------------------------------------------------------------------

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


PLACES = {b"{image}": png(noise()), b"{photograph}": photograph(), b"{mask}": png(half())}


def send(server: str, request: str) -> httpx.Response:
    """Sends a recorded request, with images in the places of their names."""
    head, _, body = request.strip().partition("\n\n")
    first, kind = head.split("\n")
    data = body.encode()
    if "multipart" in kind:
        data = data.replace(b"\n", b"\r\n") + b"\r\n"
        data = re.sub(rb"\{\w+\}", lambda name: PLACES[name[0]], data)
    headers = {"Content-Type": kind.partition(": ")[2], "Authorization": "Bearer none"}
    return httpx.post(server + first.split()[1], content=data, headers=headers, timeout=300)


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
