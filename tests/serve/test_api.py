"""The image API as OpenAI's own client and curl speak it."""

import base64
import io
import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from models.view import view
from serve.metrics import FIGURES
from tests.chain import ROOT
from tests.models.test_cascade import make
from tests.serve.conftest import serving

SMALL: dict[str, Any] = {"size": "64x64", "response_format": "b64_json"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of ``unclip serve`` with a bundle of random weights, of 16, 64 and 256 px."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    make().save(folder)
    with_port = serving(folder)
    yield next(with_port)
    next(with_port, None)


@pytest.fixture(scope="module")
def client(served: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client, of that server."""
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        yield client


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


def test_nulls_and_openais_own_fields_are_taken_everywhere(client: openai.OpenAI, served: str) -> None:
    asked = {"prompt": "a red fox", "size": "64x64", "n": None, "response_format": None, "stream": None, "seed": 3}
    answer = httpx.post(f"{served}/v1/images/generations", json={**asked, "partial_images": None}, timeout=60)
    assert answer.status_code == 200, answer.text
    words: dict[str, Any] = {"before": "a cat", "steps": 8, "output_format": "png"}
    made = client.images.edit(
        image=png(noise()), prompt="a dog", quality="auto", background="opaque", **SMALL, extra_body=words
    )
    assert len(made.data or []) == 1


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
    shown = set(re.findall(r"\b(unclip_\w+?)(?:_bucket|_sum|_count)?\b", board))
    assert shown == {f"unclip_{name}" for name in FIGURES}
    for name in shown:
        assert f"# TYPE {name.removesuffix('_total')}" in figures, name
    assert 'unclip_images_total{kind="generation"}' in figures


def test_the_model_is_listed_with_what_it_can_do(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert model.unclip["sides"] == [16, 64, 256]  # type: ignore[attr-defined]


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def noise(seed: int = 0, side: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def images(made: Any) -> list[Any]:
    return [opened(one.b64_json) for one in made.data]


def differences(made: list[Any]) -> list[float]:
    pixels = [np.asarray(image, float) for image in made]
    return [float(np.abs(a - b).mean()) for a, b in pairwise(pixels)]


@pytest.mark.filterwarnings("ignore:deprecated")  # OpenAI has given up variations; we have not
def test_variations_differ_and_say_how_free_they_are(client: openai.OpenAI) -> None:
    image, asked = png(noise()), {"seed": 1, "steps": 8}
    free, bound = (
        images(client.images.create_variation(image=image, n=3, **SMALL, extra_body=asked | {"eta": eta}))
        for eta in (1, 0)
    )
    assert min(differences(free)) > 0
    assert differences([free[0], bound[0]]) > [0]
    assert [one.info["seed"] for one in free] == ["1", "2", "3"]
    assert json.loads(bound[0].info["made"]) | {"bundle": ""} == {"kind": "variation", "bundle": "", "eta": 0.0}


def test_a_mask_keeps_what_is_opaque(client: openai.OpenAI) -> None:
    image, mask = noise(1, 64), Image.new("RGBA", (64, 64), "black")
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    asked: dict[str, Any] = {"image": png(image), "mask": png(mask), "prompt": "a red fox", **SMALL}
    (made,) = images(client.images.edit(**asked, extra_body={"seed": 1}))
    truth = view(image, 64)
    drawn = np.asarray(made)
    assert (np.abs(drawn[:, :28].astype(int) - truth[:, :28]) <= 1).all()
    assert (drawn[:, 36:] != truth[:, 36:]).mean() > 0.9
    stream: Any = client.images.edit(**asked, stream=True, partial_images=1)
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]
    for other, says in (
        (Image.new("L", (64, 64)), "is opaque in all of the square"),
        (mask.crop((0, 0, 64, 32)), "the same shape"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            client.images.edit(**asked | {"mask": png(other)})


def test_words_change_an_image_by_their_difference(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"image": png(noise()), "prompt": "an angry cat", **SMALL}
    words = {"before": "a cat", "strength": 0.5, "seed": 1, "steps": 8}
    made = client.images.edit(**asked, n=3, extra_body=words)
    assert min(differences(images(made))) > 0
    with pytest.raises(openai.BadRequestError, match="both captions have the same embedding"):
        client.images.edit(**asked, extra_body=words | {"before": "an angry cat"})
    with pytest.raises(openai.BadRequestError, match=r"give a mask .* or a caption of the image as it is"):
        client.images.edit(**asked)


def test_an_interpolation_ends_at_both_images(client: openai.OpenAI, served: str) -> None:
    files = {"first": png(noise(1)), "second": png(noise(2))}
    fields = {"n": "4", "size": "64x64", "response_format": "b64_json", "seed": "1", "steps": "8"}
    answer = httpx.post(f"{served}/v1/images/interpolations", files=files, data=fields, timeout=60)
    assert answer.status_code == 200, answer.text
    made = [opened(one["b64_json"]) for one in answer.json()["data"]]
    assert len(made) == 4
    assert min(differences(made)) > 0
    again = httpx.post(f"{served}/v1/images/interpolations", files=files, data=fields, timeout=60)
    assert again.json()["data"] == answer.json()["data"]


@pytest.mark.filterwarnings("ignore:deprecated")
@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"", "zero_bytes"),
        (b"<svg/>", "not_an_image"),
        (png(noise())[:-200], "truncated"),
        (png(Image.new("1", (5000, 5000))), "too_many_pixels"),
    ],
)
def test_an_upload_is_opened_in_the_one_way_and_refused_with_a_reason(
    client: openai.OpenAI, sent: bytes, says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=f"image: cannot be taken .{says}"):
        client.images.create_variation(image=("a.png", sent), **SMALL)


def test_the_commands_of_the_page_run_as_they_stand(served: str, tmp_path: Path) -> None:
    page = (ROOT / "docs/serve.md").read_text()
    (script,) = re.findall(r"^```sh\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    mask = Image.new("RGBA", (64, 64), "black")
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    script = "set -euo pipefail\n" + script.replace("http://127.0.0.1:8000", served)
    ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    made = {file.name: Image.open(file).size for file in tmp_path.glob("*.png") if file.name != "mask.png"}
    assert made == {"heart.png": (64, 64), "other.png": (64, 64), "edited.png": (64, 64)}
    assert ended.stdout.count("event: image_generation.partial_image") == 1
    assert ended.stdout.count("event: image_generation.completed") == 1
