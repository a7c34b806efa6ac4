"""Clients of the API, on a real server: OpenAI's own, and other programs by what their code sends.

Every value of every field that the installed openai client's own types name is sent by that client. A value that a new
version of it adds is in no table here, and fails until somebody decides what it gets.

``bodies.txt`` holds the bodies of Open WebUI (aiohttp's forms), Vercel's AI SDK (undici's) and LiteLLM (httpx's), as
their sources of November 2026 build them. The answers are read as that code reads them.
"""

import base64
import io
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import httpx
import openai
import pytest
from openai.types import image_create_variation_params, image_edit_params, image_generate_params
from openai.types.image_edit_completed_event import ImageEditCompletedEvent
from openai.types.image_gen_completed_event import ImageGenCompletedEvent
from openai.types.image_model import ImageModel
from openai.types.images_response import ImagesResponse, Usage
from PIL import Image

from serve.requests import REFUSED
from tests.serve.test_api import noise, opened, png

pytestmark = pytest.mark.filterwarnings("ignore:deprecated")  # OpenAI has given up variations; we have not
DRAWN = "drawn"
NO_EFFECT = "no effect"
SQUARES = "this bundle draws squares of 64, 256 px: use {}x{}, the nearest, or auto"
SVG = {"svg": {"model": "an author", "reasoning": {"effort": "low"}}}

COMMON: dict[str, dict[Any, str]] = {
    "model": dict.fromkeys(get_args(ImageModel), "is a name for 'tiny fox' here"),
    "n": {1: DRAWN},
    "response_format": {"url": DRAWN, "b64_json": DRAWN},
    "size": {"256x256": DRAWN, "512x512": SQUARES.format(256, 256), "1024x1024": SQUARES.format(256, 256)},
    "user": {"somebody": NO_EFFECT},
}
BOTH: dict[str, dict[Any, str]] = COMMON | {
    "prompt": {"a red fox": DRAWN},
    "background": {"auto": DRAWN, "opaque": DRAWN, "transparent": REFUSED["background=transparent"]},
    "complexity": dict.fromkeys(("low", "medium", "high"), NO_EFFECT),
    "frame_count": {2: REFUSED["frame_count"]},
    "frame_duration_ms": {2: REFUSED["frame_duration_ms"]},
    "output_compression": {50: NO_EFFECT},
    "output_format": {
        **dict.fromkeys(("png", "webp", "jpeg"), DRAWN),
        "gif": REFUSED["output_format=gif"],
        "svg": REFUSED["output_format=svg"],
    },
    "partial_images": {2: DRAWN},
    "quality": dict.fromkeys(("low", "medium", "high", "xhigh", "max", "auto", "standard"), DRAWN),
    "safety_identifier": {"somebody": NO_EFFECT},
    "size": COMMON["size"] | {"auto": DRAWN} | dict.fromkeys(("1536x1024", "1024x1536"), SQUARES.format(256, 256)),
    "stream": {True: DRAWN, False: DRAWN},
    "svg": {"svg": REFUSED["svg"]},
}
GENERATE: dict[str, dict[Any, str]] = BOTH | {
    "moderation": {"low": NO_EFFECT, "auto": NO_EFFECT},
    "quality": BOTH["quality"] | {"hd": DRAWN},
    "size": BOTH["size"] | dict.fromkeys(("1792x1024", "1024x1792"), SQUARES.format(256, 256)),
    "style": {"vivid": NO_EFFECT, "natural": NO_EFFECT},
}
EDIT: dict[str, dict[Any, str]] = BOTH | {
    "image": {"one": DRAWN, "list of one": DRAWN, "list of two": "two images are blended"},
    "input_fidelity": {"low": NO_EFFECT, "high": NO_EFFECT},
    "markup": {"one": REFUSED["markup"]},
    "mask": {"one": "is opaque in all of the square that is drawn"},
}
VARIATION: dict[str, dict[Any, str]] = COMMON | {"image": {"one": DRAWN}}
FILES: dict[str, Callable[[], Any]] = {
    "one": lambda: png(noise()),
    "list of one": lambda: [png(noise())],
    "list of two": lambda: [png(noise(1)), png(noise(2))],
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


def fields(*kinds: Any) -> dict[str, set[Any]]:
    """The fields of the client's types for a call, with the literals that each may have."""
    found: dict[str, set[Any]] = {}
    for kind in kinds:
        for name, annotation in get_type_hints(kind, include_extras=True).items():
            literals = {value for value in values(annotation) if isinstance(value, str | bool | int)}
            found.setdefault(name, set()).update(literals)
    return found


CALLS = {
    "generate": (GENERATE, *get_args(image_generate_params.ImageGenerateParams)),
    "edit": (EDIT, *get_args(image_edit_params.ImageEditParams)),
    "create_variation": (VARIATION, image_create_variation_params.ImageCreateVariationParams),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_field_and_value_of_the_clients_types_has_an_expected_answer(call: str) -> None:
    table, *kinds = CALLS[call]
    theirs = fields(*kinds)
    assert theirs.keys() == table.keys()
    for name, literals in theirs.items():
        assert not literals or literals == set(table[name]), name


def asked(call: str, field: str = "", value: Any = None) -> dict[str, Any]:
    """The arguments of a call that sets one field beside those that it needs."""
    base: dict[str, Any] = {"size": "64x64", "extra_body": {"seed": 7}}
    if call != "create_variation":
        base["prompt"] = "a red fox"
    if call != "generate":
        base["image"] = png(noise())
    if not field:
        return base
    if field == "svg":
        return base | SVG
    if field in ("image", "mask", "markup"):
        value = FILES[value]()
    if field == "partial_images":  # an image that is kept has no smaller ones before it
        base |= {"stream": True, "extra_body": {"seed": 8}}
    return base | {field: value}


@pytest.mark.parametrize(
    ("call", "field", "value", "expected"),
    [
        pytest.param(call, field, value, expected, id=f"{call}-{field}-{value}")
        for call, (table, *_) in CALLS.items()
        for field, answers in table.items()
        for value, expected in answers.items()
    ],
)
def test_a_call_is_answered_as_todays_api_answers_or_refused_with_the_reason(
    client: openai.OpenAI, call: str, field: str, value: Any, expected: str
) -> None:
    arguments = asked(call, field, value)
    method: Any = getattr(client.images, call)
    refused = expected in REFUSED.values() or expected.startswith(("this bundle", "is opaque"))
    if refused:
        with pytest.raises(openai.BadRequestError) as caught:
            method(**arguments)
        error: Any = caught.value.body
        assert expected in error["message"]
        assert error["param"] == field
        return
    made = method(**arguments)
    if arguments.get("stream"):
        *partial, made = made
        assert len(partial) == (1 if field == "partial_images" else 0)  # of a bundle of 16, 64 and 256 px
        kind: Any = {"generate": ImageGenCompletedEvent, "edit": ImageEditCompletedEvent}[call]
        images, warnings = [made], made.warnings
    else:
        kind, images, warnings = ImagesResponse, made.data, made.warnings
    # The client takes what it is given without a look; its types say what may be there.
    kind.model_validate(made.model_dump(warnings=False), strict=True)
    side = {"256x256": 256, "auto": 256}.get(value, 64) if field == "size" else 64
    for one in images:
        assert (one.url is None) == (arguments.get("response_format") != "url") or arguments.get("stream")
        if one.b64_json:
            image = opened(one.b64_json)
            assert (image.width, image.format) == (side, made.output_format.upper())
    assert (made.size, made.background) == (f"{side}x{side}", "opaque")
    own = [line for line in warnings if not line.startswith("before: ")]  # which an edit by its prompt alone says
    if expected == DRAWN:
        assert own == []
    else:
        assert len(own) == 1
        assert expected in own[0]
        assert own[0].startswith((field, "prompt"))
        if field != "image":
            assert [one.b64_json for one in images] == [one.b64_json for one in method(**asked(call)).data]


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
