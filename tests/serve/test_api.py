"""The image API as OpenAI's own client and curl speak it."""

import base64
import io
import json
import re
import urllib.request
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from models.view import view
from serve.answer import encode
from serve.metrics import FIGURES
from tests.boards import expressions
from tests.chain import ROOT
from tests.serve.images import noise, opened, png
from tests.serve.load import figure, until

SMALL: dict[str, Any] = {"size": "64x64"}


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
        assert -1 <= one.score <= 1


def test_nulls_are_taken_everywhere(served: str) -> None:
    asked = {"prompt": "a red fox", "size": "64x64", "n": None, "response_format": None, "stream": None, "seed": 3}
    answer = httpx.post(f"{served}/v1/images/generations", json={**asked, "partial_images": None}, timeout=300)
    assert answer.status_code == 200, answer.text


def test_a_url_holds_the_image_that_base64_would(client: openai.OpenAI) -> None:
    for kind, compression in (("png", 100), ("jpeg", 100), ("jpeg", 10), ("webp", 50)):
        asked: dict[str, Any] = {"output_format": kind, "output_compression": compression, "extra_body": {"seed": 1}}
        (by_url,) = client.images.generate(prompt="the sea", **SMALL, **asked, response_format="url").data or []
        (by_text,) = client.images.generate(prompt="the sea", **SMALL, **asked).data or []
        assert by_url.url is not None
        with urllib.request.urlopen(by_url.url) as answer:
            assert answer.headers["Content-Type"] == f"image/{kind}"
            assert answer.read() == base64.b64decode(by_text.b64_json or "")
    stream: Any = client.images.generate(prompt="the sea", **SMALL, output_format="webp", stream=True)
    (made,) = stream
    assert (opened(made.b64_json).format, made.output_format) == ("WEBP", "webp")


def test_a_client_that_goes_before_its_answer_ends_its_drawing(served: str) -> None:
    drawn = 'images_total{kind="draw"}'
    before = figure(served, drawn)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served}/v1/images/generations", json={"prompt": "gone", "steps": 1000}, timeout=1)
    until(lambda: figure(served, "num_running_reqs") == 0)
    assert figure(served, drawn) == before


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_a_smaller_quality_is_a_smaller_file_of_nearly_the_same_image(kind: str) -> None:
    image = noise(0, 8).resize((256, 256))
    files = [encode(png(image), kind, compression) for compression in (100, 50, 0)]
    assert len(files[0]) > len(files[1]) > len(files[2])
    errors = [float(np.abs(np.asarray(Image.open(io.BytesIO(file)), float) - image).mean()) for file in files]
    assert errors[0] < 2
    assert errors == sorted(errors)


def test_a_stream_brings_each_size_as_it_is_made(client: openai.OpenAI) -> None:
    stream: Any = client.images.generate(prompt="a tree", stream=True, partial_images=3, extra_body={"progress": True})
    events = list(stream)
    images = [(e.type.rpartition(".")[2], opened(e.b64_json).width) for e in events if getattr(e, "b64_json", None)]
    assert images == [("partial_image", 16), ("partial_image", 64), ("completed", 256)]
    assert events[0].type == "image_generation.queued"
    stages = {e.stage for e in events if e.type == "image_generation.step"}
    assert stages == {"diffusion_prior", "decoder", "upsampler_256", "upsampler_1024"}
    one: Any = client.images.generate(prompt="a tree", stream=True, partial_images=1)
    assert [e.type.rpartition(".")[2] for e in one] == ["partial_image", "completed"]


def test_fields_of_other_servers_mean_what_they_mean_there(client: openai.OpenAI) -> None:
    def settings(**asked: Any) -> dict[str, Any]:
        quality = asked.pop("quality", "auto")
        (one,) = client.images.generate(prompt="a fox", **SMALL, quality=quality, extra_body={"seed": 1, **asked}).data
        return json.loads(opened(one.b64_json).info["settings"])

    own = settings()
    assert settings(num_inference_steps=6)["decoder_steps"] == settings(steps=6)["decoder_steps"] == 6
    assert settings(guidance_scale=3.0)["decoder_guidance"] == settings(guidance=2)["decoder_guidance"] == 2
    assert settings(guidance_scale=0.0)["decoder_guidance"] == settings(guidance_scale=1)["decoder_guidance"] == 0
    steps = {name: settings(quality=name)["decoder_steps"] / own["decoder_steps"] for name in ("low", "high", "max")}
    assert steps == {"low": 0.5, "high": 2, "max": 8}
    assert settings(quality="max", steps=5)["decoder_steps"] == 5
    made = client.images.generate(prompt="a fox", **SMALL, extra_body={"negative_prompt": "a dog", "steps": 2})
    assert made.warnings == ["negative_prompt has no effect: guidance leads away from the empty caption"]


@pytest.mark.parametrize(
    ("asked", "status", "says"),
    [
        ({"prompt": "tree " * 80}, 400, "80 tokens and CLIP reads 75"),
        ({"prompt": "x", "size": "1024x1024"}, 400, "squares of 64, 256 px: use 256x256"),
        ({"prompt": "x", "size": "80x60"}, 400, "use 64x64, the nearest, or auto"),
        ({"prompt": "x", "size": "large"}, 400, "size is large, and this bundle draws"),
        ({"prompt": "x", "n": 11}, 400, "n is 11: use 10 or less"),
        ({"prompt": "x", "n": True}, 400, "n is True: use a whole number"),
        ({"prompt": "x", "n": "many"}, 400, "n is 'many': use a whole number"),
        ({"prompt": " "}, 400, "prompt is empty"),
        ({"prompt": "x", "model": "a-cat"}, 404, "The model 'a-cat' is not served here: .* use 'tiny fox'"),
        ({"prompt": "x", "quality": "best"}, 400, "quality is 'best': use 'auto', 'low'"),
        ({"prompt": "x", "extra_body": {"sede": 1}}, 400, "sede: unknown field; did you mean seed"),
        ({"prompt": "x", "extra_body": {"steps": 1}}, 400, "steps is 1: use 2 or more"),
        ({"prompt": "x", "extra_body": {"seed": 2**60}}, 400, "seed is .*: use 9007199254740991 or less"),
        ({"prompt": "x", "extra_body": {"width": 512}}, 400, "width: use size"),
        ({"prompt": "x", "extra_body": {"generator": 7}}, 400, "generator: give its seed"),
        ({"prompt": "x", "extra_body": {"num_images_per_prompt": 11}}, 400, "n is 11: use 10 or less"),
        ({"prompt": "x", "extra_body": {"steps": 9, "num_inference_steps": 9}}, 400, "decoder_steps is given twice"),
    ],
)
def test_a_mistake_is_said_as_openai_says_it(
    client: openai.OpenAI, asked: dict[str, Any], status: int, says: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=says) as caught:
        client.images.generate(**asked)
    assert caught.value.status_code == status
    assert caught.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "param", "says"),
    [
        ("POST", "images/generations", {"json": {}}, 400, "prompt", "prompt is missing"),
        ("POST", "images/generations", {"json": []}, 400, None, "not a JSON object: send JSON, such as"),
        ("POST", "images/generations", {}, 400, None, "The body is empty: send JSON, such as"),
        ("POST", "images/generations", {"content": b'{"prompt": "x"'}, 400, None, "The body is not JSON (Expecting"),
        ("POST", "images/generations", {"data": {"prompt": "x"}}, 400, None, "as application/json"),
        ("POST", "images/edits", {"json": {"prompt": "x"}}, 400, None, "send multipart/form-data"),
        ("POST", "images/edits", {"files": {"mask": b"x"}}, 400, "prompt", "prompt is missing"),
        ("POST", "chat/completions", {"json": {}}, 404, None, "There is no POST /v1/chat/completions here"),
        ("POST", "responses", {"json": {}}, 404, None, "There is no POST /v1/responses here"),
        ("GET", "images/generations", {}, 404, None, "There is no GET /v1/images/generations here"),
        ("GET", "images/files/a.webp?compression=500", {}, 400, "compression", "is '500': use 100 or less"),
        ("GET", "models/gpt-4o", {}, 404, "model", "The model 'gpt-4o' is not served here"),
    ],
)
def test_a_body_or_path_that_is_none_is_said_in_our_words(
    served: str, method: str, path: str, sent: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    headers = {"Content-Type": "application/json"} if "content" in sent else {}
    answer = httpx.request(method, f"{served}/v1/{path}", headers=headers, timeout=300, **sent)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (status, "invalid_request_error", param)
    assert says in error["message"]


def test_health_answers_head(served: str) -> None:
    answer = httpx.head(f"{served}/health")
    assert (answer.status_code, answer.content) == (200, b"")


def test_the_figures_that_the_board_shows_are_there_without_captions(client: openai.OpenAI, served: str) -> None:
    client.images.generate(prompt="a secret tree", **SMALL)
    with urllib.request.urlopen(f"{served}/metrics") as answer:
        figures = answer.read().decode()
    assert "secret" not in figures
    board = " ".join(expressions(ROOT / "docs/serve-grafana.json"))
    shown = set(re.findall(r"\b(unclip_\w+?)(?:_bucket|_sum|_count)?\b", board))
    assert shown == {f"unclip_{name}" for name in FIGURES}
    for name in shown:
        assert f"# TYPE {name.removesuffix('_total')}" in figures, name
    assert 'unclip_images_total{kind="draw"}' in figures


def test_the_model_is_listed_and_found_by_each_of_its_names(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny fox", "unclip")
    assert model.created > 1_700_000_000
    assert model.unclip["sides"] == [16, 64, 256]  # type: ignore[attr-defined]
    for name in ("tiny fox", "dall-e-3", "gpt-image-1.5", model.unclip["bundle"][:8]):  # type: ignore[attr-defined]
        assert client.models.retrieve(name) == model
    made = client.images.generate(prompt="a red fox", model="tiny fox", **SMALL)
    assert made.warnings == []
    long = client.images.generate(prompt="fox " * 11, **SMALL)
    assert long.warnings == ["the caption has more than the 10 tokens that these models read; the rest is cut"]


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
    made = json.loads(bound[0].info["made"])
    assert (made["operation"], made["eta"], made["bundle"], len(made["images"])) == ("vary", 0.0, "b" * 64, 1)


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
    with pytest.raises(openai.BadRequestError, match="both captions are 'an angry cat'"):
        client.images.edit(**asked, extra_body=words | {"before": "an angry cat"})


def test_an_edit_by_its_prompt_alone_begins_at_the_caption_of_the_images_own_recipe(client: openai.OpenAI) -> None:
    def edit(image: Any, prompt: str = "an angry cat", **more: Any) -> tuple[str, list[str]]:
        asked = {"seed": 1, "steps": 4, **more}
        made: Any = client.images.edit(image=image, prompt=prompt, **SMALL, extra_body=asked)
        return json.loads(opened(made.data[0].b64_json).info["made"])["before"], made.warnings

    ours = client.images.generate(prompt="a cat", **SMALL, extra_body={"seed": 1}).data
    assert ours is not None
    drawn = base64.b64decode(ours[0].b64_json or "")
    before, (said,) = edit(drawn)
    assert before == "a cat"
    assert "'a cat', the caption in the image's own recipe, is used as the original caption" in said
    assert edit(drawn, before="a dog") == ("a dog", [])
    before, (said,) = edit(drawn, prompt="a  cat")  # no direction leads from a caption to itself
    assert (before, said.startswith("before: the empty caption")) == ("", True)
    plain = opened(ours[0].b64_json)
    assert edit(png(plain.copy()))[0] == ""  # a browser's canvas keeps no text
    named: Any = client.images.edit(
        image=("C:\\mine\\cat.png", drawn), prompt="a dog", **SMALL, extra_body={"steps": 4}
    )
    made = json.loads(opened(named.data[0].b64_json).info["made"])
    assert [one["name"] for one in made["images"]] == ["cat.png"]  # where redraw looks for it, and no folder
    with pytest.raises(openai.BadRequestError, match="a mask redraws a part"):
        client.images.edit(image=drawn, mask=drawn, prompt="a dog", **SMALL, extra_body={"before": "a cat"})


@pytest.mark.filterwarnings("ignore:deprecated")
def test_two_images_are_blended_and_more_refused(client: openai.OpenAI) -> None:
    files = [png(noise(i)) for i in range(3)]
    asked = {"seed": 1, "steps": 4}
    made: Any = client.images.edit(image=files[:2], prompt="a cat", n=3, **SMALL, extra_body=asked)
    assert min(differences(images(made))) > 0
    assert made.warnings == ["prompt has no effect: two images are blended by their embeddings"]
    for sent, more, says in (
        (files, {}, "changes one image, or blends two, and 3 were sent: send two at most"),
        (files[:2], {"mask": files[0]}, "draws over one image, and 2 were sent: send one"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            client.images.edit(image=sent, prompt="a cat", **SMALL, **more)


def test_a_photograph_of_48_megapixels_is_taken(client: openai.OpenAI) -> None:
    photograph = io.BytesIO()
    noise(0, 64).resize((8064, 6048)).save(photograph, "JPEG")
    made = client.images.edit(image=photograph.getvalue(), prompt="a cat", **SMALL, extra_body={"steps": 4})
    assert len(images(made)) == 1


def test_an_interpolation_ends_at_both_images(client: openai.OpenAI, served: str) -> None:
    files = {"first": png(noise(1)), "second": png(noise(2))}
    fields = {"n": "4", "size": "64x64", "seed": "1", "steps": "8"}
    answer = httpx.post(f"{served}/v1/images/interpolations", files=files, data=fields, timeout=300)
    assert answer.status_code == 200, answer.text
    made = [opened(one["b64_json"]) for one in answer.json()["data"]]
    assert len(made) == 4
    assert min(differences(made)) > 0
    again = httpx.post(f"{served}/v1/images/interpolations", files=files, data=fields, timeout=300)
    assert again.json()["data"] == answer.json()["data"]


@pytest.mark.filterwarnings("ignore:deprecated")
@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"", "zero_bytes"),
        (b"<svg/>", "not_an_image"),
        (png(noise())[:-200], "truncated"),
        (png(Image.new("1", (9000, 9000))), "too_many_pixels"),
    ],
)
def test_an_upload_is_opened_in_the_one_way_and_refused_with_a_reason(
    client: openai.OpenAI, sent: bytes, says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=f"image: cannot be used .{says}"):
        client.images.create_variation(image=("a.png", sent), **SMALL)
