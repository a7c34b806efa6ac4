"""Tests what is said of the training images nearest to an image, and which rows those are looked for among."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.neighbours.search import embed_image
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.ledger import Ledger
from pipeline.store.records import digest
from serve.neighbours import find_training_set
from tests.pipeline.data.bench import Bench, picture, save_clip

LICENSES = ("CC-BY 4.0", "unknown", "CC-BY 4.0", "CC0")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Four images with licences, of which the last is held out."""
    folder = tmp_path_factory.mktemp("neighbours")
    rows = ["url,caption,split,license,attribution"]
    for i, license in enumerate(LICENSES):
        (folder / f"{i}.png").write_bytes(picture(i))
        rows.append(f"file://{folder}/{i}.png,image {i},{'test' if i == 3 else 'train'},{license},By {i}")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    bench = Bench(folder / "store", [str(folder / "list.csv")], clip={"weights": save_clip(folder / "clip")})
    bench.make("source", "captions", "pairs", "clip", "embeddings", "curation", "index")
    return bench


def made(bench: Bench, stage: str, *inputs: str, **others: str) -> Artifact:
    """Publishes an artefact of which only the inputs matter here."""
    keys = {name: bench.made[name].key for name in inputs} | others
    artifact = Artifact(stage, digest(keys), keys, {}, Ledger())
    bench.made[stage] = publish_artifact(bench.store, artifact, 0.0)
    return bench.made[stage]


@pytest.fixture(scope="module")
def bundle(bench: Bench) -> Artifact:
    made(bench, "decoder", "captions", "curation", "embeddings", "pairs")
    return made(bench, "bundle", "clip", "decoder")


def embedding(bench: Bench, number: int) -> np.ndarray:
    file = Path(bench.config.source.paths[0]).with_name(f"{number}.png")
    return embed_image(bench.store, bench.made["clip"], str(file))


def test_training_images_come_nearest_first_with_their_rights(bench: Bench, bundle: Artifact) -> None:
    training = find_training_set(bench.store, bundle)
    assert training is not None
    found = training.nearest(embedding(bench, 2), 24)
    assert {row["caption"] for row in found} == {"image 0", "image 1", "image 2"}  # never the held-out one
    assert found[0]["caption"] == "image 2"
    assert found[0]["similarity"] == pytest.approx(1, abs=0.01)
    assert [row["similarity"] for row in found] == sorted((row["similarity"] for row in found), reverse=True)
    assert (found[0]["license"], found[0]["attribution"]) == ("CC-BY 4.0", "By 2")
    assert found[0]["url"] is None  # a path of this machine
    with Image.open(io.BytesIO(base64.b64decode(found[0]["b64_json"]))) as image:
        assert (image.format, image.size) == ("JPEG", (80, 72))  # nothing is enlarged


def test_images_are_shown_where_their_licence_allows_it(bench: Bench, bundle: Artifact) -> None:
    training = find_training_set(bench.store, bundle, ["CC-BY 4.0"])
    assert training is not None
    found = {row["caption"]: row["b64_json"] is not None for row in training.nearest(embedding(bench, 1), 3)}
    assert found == {"image 0": True, "image 1": False, "image 2": True}


def test_an_index_of_other_rows_or_another_clip_is_not_taken(bench: Bench, bundle: Artifact) -> None:
    assert find_training_set(bench.store, made(bench, "bundle", "decoder", clip="f" * 64)) is None
    made(bench, "decoder", "captions", "embeddings", "pairs", curation="e" * 64)
    assert find_training_set(bench.store, made(bench, "bundle", "clip", "decoder")) is None
