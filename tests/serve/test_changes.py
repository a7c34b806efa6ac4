"""Images of a client's own, changed: by OpenAI's client where its API has it."""

import io
import json
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from models.view import view
from tests.serve.test_openai import SMALL, opened

pytestmark = pytest.mark.filterwarnings("ignore:deprecated")  # OpenAI has given up variations; we have not


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
