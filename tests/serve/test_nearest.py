"""Tests what is said of the training images nearest to an image, and which rows those are looked for among."""

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from jobs.serve import read_settings
from pipeline.graph.artifacts import read_shards
from pipeline.sampling.nearest import find_stored
from pipeline.store import open_store
from pipeline.store.records import blob_path
from serve.settings import ServeSettings
from tests.pipeline.data.bench import Bench, picture
from tests.serve.trained import api_of, make_trained, publish


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_trained(tmp_path_factory.mktemp("nearest"))


def client_of(bench: Bench, settings: ServeSettings, store: str) -> Iterator[TestClient]:
    with TestClient(api_of(bench, settings, store, {}), "http://127.0.0.1") as client:
        yield client


@pytest.fixture(scope="module")
def client(bench: Bench) -> Iterator[TestClient]:
    yield from client_of(bench, ServeSettings(), bench.store.url)


def ask(client: TestClient, image: bytes, **fields: object) -> Any:
    return client.post("/v1/unclip/nearest", data=fields, files={"image": image})


def test_training_images_come_nearest_first_with_their_rights(client: TestClient) -> None:
    found = ask(client, picture(2), n=24).json()["data"]
    assert {row["caption"] for row in found} == {"image 0", "image 1", "image 2"}  # never the held-out one
    assert found[0]["caption"] == "image 2"
    assert found[0]["similarity"] == pytest.approx(1, abs=0.01)
    assert [row["similarity"] for row in found] == sorted((row["similarity"] for row in found), reverse=True)
    assert (found[0]["license"], found[0]["attribution"]) == ("CC-BY 4.0", "By 2")
    assert found[0]["url"] is None  # a path of this machine
    with Image.open(io.BytesIO(base64.b64decode(found[0]["b64_json"]))) as image:
        assert (image.format, image.size) == ("JPEG", (80, 72))  # nothing is enlarged
    assert len(ask(client, picture(2), n=1).json()["data"]) == 1


def test_images_are_shown_where_their_licence_allows_it(bench: Bench) -> None:
    for client in client_of(bench, read_settings(["licenses=[CC-BY 4.0]"]), bench.store.url):
        found = ask(client, picture(1)).json()["data"]
    shown = {row["caption"]: row["b64_json"] is not None for row in found}
    assert shown == {"image 0": True, "image 1": False, "image 2": True}


@pytest.mark.parametrize(
    ("image", "count", "param", "says"),
    [(b"no image", 8, "image", "not_an_image"), (b"", 8, "image", "zero_bytes"), (picture(0), 25, "n", "24")],
)
def test_what_cannot_be_looked_for(client: TestClient, image: bytes, count: int, param: str, says: str) -> None:
    answer = ask(client, image, n=count)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert says in error["message"]


def test_an_edit_by_its_prompt_alone_begins_at_the_nearest_training_caption(bench: Bench) -> None:
    """Which a bundle's folder alone does not know; then it begins at the empty caption."""
    for store, before in ((bench.store.url, "image 2"), ("", "")):
        for client in client_of(bench, ServeSettings(), store):
            answer = client.post("/v1/images/edits", data={"prompt": "a fox"}, files={"image": picture(2)})
        assert answer.json()["error"]["message"] == f"nothing is drawn here, change least of all {before}"


def test_a_folder_of_a_bundle_alone_says_so(bench: Bench) -> None:
    for client in client_of(bench, ServeSettings(), ""):
        answer = ask(client, picture(0))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_index")


def test_an_index_that_is_gone_since_says_so(bench: Bench, tmp_path: Path) -> None:
    """As after ``data forget`` and ``data gc``, while the server runs."""
    store = open_store(str(shutil.copytree(bench.store.url, tmp_path / "store")))
    for client in client_of(bench, ServeSettings(), store.url):
        assert ask(client, picture(0)).status_code == 200
        shards = [blob for shard in read_shards(store, bench.made["curation"]) for blob in shard.blobs.values()]
        store.delete(map(blob_path, [*bench.made["index"].blobs.values(), *shards]))
        answer = ask(client, picture(0))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_index")


def test_an_index_of_other_rows_or_another_clip_is_not_taken(bench: Bench) -> None:
    clip, decoder = bench.made["clip"].key, bench.made["decoder"]
    assert find_stored(bench.store, publish(bench, "bundle", {"clip": "f" * 64, "decoder": decoder.key})) is None
    other = publish(bench, "decoder", {**decoder.inputs, "curation": "e" * 64})
    assert find_stored(bench.store, publish(bench, "bundle", {"clip": clip, "decoder": other.key})) is None
