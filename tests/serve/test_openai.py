"""The image API as OpenAI's own client speaks it."""

import base64
import io
import json
import re
import urllib.request
from typing import Any

import openai
import pytest
from PIL import Image

from serve.metrics import FIGURES
from tests.chain import ROOT

SMALL: dict[str, Any] = {"size": "64x64", "response_format": "b64_json"}


def opened(data: Any) -> Any:
    """The PNG in base64 as an image."""
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    return image


def test_the_same_request_gets_the_same_images_with_their_recipe(client: openai.OpenAI) -> None:
    seed = {"seed": 7, "guidance": 2.0, "prior": "ar"}
    first, second = (client.images.generate(prompt="a red fox", n=2, **SMALL, extra_body=seed) for _ in range(2))
    assert [one.b64_json for one in first.data or []] == [one.b64_json for one in second.data or []]
    for number, one in enumerate(first.data or []):
        image = opened(one.b64_json)
        assert image.size == (64, 64)
        assert (image.info["caption"], image.info["seed"]) == ("a red fox", str(7 + number))
        settings = json.loads(image.info["settings"])
        assert (settings["decoder_guidance"], settings["prior"], settings["size"]) == (2.0, "ar", 64)
        assert -1 <= one.score <= 1  # type: ignore[attr-defined]


def test_a_url_holds_the_image_that_base64_would(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"prompt": "the sea", "size": "64x64", "model": "dall-e-2", "extra_body": {"seed": 1}}
    (by_url,) = client.images.generate(**asked).data or []
    (by_text,) = client.images.generate(**asked, response_format="b64_json").data or []
    assert by_url.url is not None
    with urllib.request.urlopen(by_url.url) as answer:
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.read() == base64.b64decode(by_text.b64_json or "")


def test_a_stream_brings_each_size_as_it_is_made(client: openai.OpenAI) -> None:
    stream: Any = client.images.generate(prompt="a tree", stream=True, partial_images=3, extra_body={"progress": True})
    events = list(stream)
    images = [(e.type.rpartition(".")[2], opened(e.b64_json).width) for e in events if getattr(e, "b64_json", None)]
    assert images == [("partial_image", 16), ("partial_image", 64), ("completed", 256)]
    assert events[0].type == "image_generation.queued"
    assert {e.stage for e in events if e.type == "image_generation.step"} == {
        "diffusion_prior", "decoder", "upsampler_256", "upsampler_1024"
    }  # fmt: skip
    one: Any = client.images.generate(prompt="a tree", stream=True, partial_images=1)
    assert [e.type.rpartition(".")[2] for e in one] == ["partial_image", "completed"]


@pytest.mark.parametrize(
    ("asked", "status", "says"),
    [
        ({"prompt": "tree " * 80}, 400, "80 tokens and CLIP reads 75"),
        ({"prompt": "x", "size": "1024x1024"}, 400, "end at 256 px"),
        ({"prompt": "x", "size": "1792x1024"}, 400, "size: Input should be 'auto', '64x64'"),
        ({"prompt": "x", "n": 11}, 400, "n: Input should be less than or equal to 10"),
        ({"prompt": "x", "model": "dall-e-3"}, 404, "The model 'dall-e-3' is not served here"),
        ({"prompt": "x", "extra_body": {"sede": 1}}, 400, "sede: Extra inputs are not permitted"),
        ({"prompt": "x", "extra_body": {"steps": 1}}, 400, "steps: Input should be greater than or equal to 2"),
    ],
)
def test_a_mistake_is_said_as_openai_says_it(
    client: openai.OpenAI, asked: dict[str, Any], status: int, says: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=says) as caught:
        client.images.generate(**asked)
    assert caught.value.status_code == status
    assert caught.value.body["type"] == "invalid_request_error"  # type: ignore[index]


def test_the_figures_that_the_board_shows_are_there_without_captions(client: openai.OpenAI, served: str) -> None:
    client.images.generate(prompt="a secret tree", **SMALL)
    with urllib.request.urlopen(f"{served}/metrics") as answer:
        figures = answer.read().decode()
    assert "secret" not in figures
    board = (ROOT / "docs/serve-grafana.json").read_text()
    shown = set(re.findall(r"\$\{prefix\}(unclip_\w+?)(?:_bucket|_sum|_count)?\b", board))
    assert shown == {f"unclip_{name}" for name in FIGURES}
    for name in shown:
        assert f"# TYPE {name.removesuffix('_total')}" in figures, name
    assert 'unclip_images_total{kind="generation"}' in figures


def test_the_model_is_listed_with_what_it_can_do(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert model.unclip["sides"] == [16, 64, 256]  # type: ignore[attr-defined]
