"""LiteLLM itself, in an environment of its own, draws with a real server by the settings of the page.

It is no extra of ours, because it needs older packages than we do. The version is exact: releases of it have held
malware (1.82.7, 1.82.8, 1.107.0), so look at one before you name it here.
"""

import base64
import io
import json
import os
import subprocess
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.serve.clients import block
from tests.serve.images import noise, png

pytestmark = pytest.mark.slow
VERSION = "1.108.14"
# Prints for each call the images that came, or the class and the text of what was raised.
PROGRAM = """
import asyncio, base64, io, json, sys
import litellm

asked = json.load(sys.stdin)
router = litellm.Router(model_list=asked["model_list"], num_retries=0)
direct = asked["model_list"][0]["litellm_params"] | {"max_retries": 0}

def call(name, words):
    if "image" in words:
        file = io.BytesIO(base64.b64decode(words["image"]))
        file.name = "image.png"
        words = words | {"image": file}
    if name == "router":
        return router.image_generation(model="monsters", **words)
    if name == "router, async":
        return asyncio.run(router.aimage_generation(model="monsters", **words))
    return getattr(litellm, name)(**direct, **words)

for name, words in asked["calls"]:
    try:
        said = call(name, words)
        print(json.dumps([image if isinstance(image, dict) else image.model_dump() for image in said.data]))
    except Exception as e:
        print(json.dumps({"type": type(e).__name__, "status": getattr(e, "status_code", None), "says": str(e)}))
"""


@pytest.fixture(scope="module")
def litellm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with LiteLLM."""
    folder = tmp_path_factory.mktemp("litellm")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"litellm=={VERSION}"], check=True)
    return python


def test_litellm_draws_edits_and_passes_refusals_on(litellm: Path, served: str, tmp_path: Path) -> None:
    settings = yaml.safe_load(block("yaml").replace("http://127.0.0.1:8000", served))
    image = base64.b64encode(png(noise())).decode()
    small = {"prompt": "a red fox", "size": "64x64"}
    ours = {"extra_body": {"seed": 7, "steps": 2}}
    calls: list[tuple[str, dict[str, Any]]] = [
        ("router", {"prompt": "a red fox"}),
        ("router, async", small),
        ("image_generation", {**small, "n": 2}),
        ("image_generation", {**small, **ours}),
        ("image_generation", {**small, **ours}),
        ("image_edit", {**small, "image": image}),
        ("image_generation", {"prompt": "a red fox", "size": "1536x1024"}),
    ]
    asked = json.dumps({"model_list": settings["model_list"], "calls": calls})
    # Without these it asks the internet for prices.
    alone = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "HOME": str(tmp_path)}
    done = subprocess.run(
        [litellm, "-c", PROGRAM], input=asked, env=os.environ | alone, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    drawn = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", "{"))]
    assert len(drawn) == len(calls), done.stdout + done.stderr
    *made, refused = drawn
    sizes = [[Image.open(io.BytesIO(base64.b64decode(each["b64_json"]))).size for each in one] for one in made]
    assert sizes == [[(256, 256)], [(64, 64)], [(64, 64)] * 2, [(64, 64)], [(64, 64)], [(64, 64)]]
    assert made[3][0]["b64_json"] == made[4][0]["b64_json"]
    assert (refused["type"], refused["status"]) == ("BadRequestError", 400)
    assert "this bundle draws squares of 64, 256 px: use 256x256" in refused["says"]
