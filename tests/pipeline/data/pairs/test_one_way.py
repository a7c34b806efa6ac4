"""An image has the same pixels by whatever way it comes: fetched, used in place, searched with, or edited."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.view import open_view, upright_rgb, view
from pipeline.data.neighbours import search
from pipeline.data.pairs.decoding import open_image, shared_decoder
from pipeline.data.pairs.image import heif_is_there
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.errors import UserError
from pipeline.graph.artifacts import read_shards
from pipeline.report.images import shrink
from tests.pipeline.data.bench import Bench, save_clip, write_list, write_tar
from tests.pipeline.data.odd import ADOBE_RGB, SIDES, encoded, odd_images

SIZE = 64  # of a nano CLIP's views; no image here is large enough to be decoded at a fraction
# Of the last kinds a tar's images are stored, as those of all kinds are that are fetched.
COPIED = ("GIF", "BMP", "TIFF", "AVIF", "HEIF")
assert heif_is_there()
IMAGES = odd_images() | {f"whole.{kind.lower()}": encoded(Image.new("RGB", SIDES, "teal"), kind) for kind in COPIED}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Every image twice, as a file that is fetched and as a member of a tar; stored without loss."""
    folder = tmp_path_factory.mktemp("one_way")
    members: dict[str, Any] = {}
    for i, (name, data) in enumerate(IMAGES.items()):
        (folder / name).write_bytes(data)
        members |= {f"{i:02}-{name}": data, f"{i:02}-{name.split('.')[0]}.txt": b"a caption"}
    write_tar(folder / "in_place.tar", members)
    listed = write_list(folder / "list.csv", [(f"file://{folder}/{name}", name) for name in IMAGES])
    bench = Bench(
        folder / "store",
        [listed, str(folder / "in_place.tar")],
        clip={"weights": save_clip(folder / "clip")},
        pairs={"encode_format": "png", "encode_quality": 1},
    )
    bench.make("source", "captions", "pairs", "clip")
    return bench


def read(bench: Bench) -> dict[str, list[bytes]]:
    """The stored bytes of every image: fetched, then in place."""
    found: dict[str, list[bytes]] = {name: [] for name in IMAGES}
    shards = {shard.number: shard.blobs.get("images") for shard in read_shards(bench.store, bench.made["pairs"])}
    rows = bench.rows("pairs")
    for row, name in zip(rows, [*IMAGES, *IMAGES], strict=True):
        assert row["status"] == "kept", (name, row["reason"])
        found[name] += read_images(bench.store, [Place.of(row, shards[int(row["key"][:8])])])
    return found


def test_every_way_gives_the_same_pixels(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(bench.config.source.paths[0]).parent
    model = search.read_clip(bench.store, bench.made["clip"])
    monkeypatch.setattr(search, "read_clip", lambda *_: model)
    for name, (fetched, in_place) in read(bench).items():
        expected = open_view(fetched, SIZE)
        given = open_image(folder / name)
        assert np.array_equal(open_view(in_place, SIZE), expected), name
        assert np.array_equal(view(given, SIZE), expected), name
        embedded = search.embed_image(bench.store, bench.made["clip"], str(folder / name))
        with torch.no_grad():
            of_view = model.encode_image(torch.from_numpy(expected.transpose(2, 0, 1)[None].copy()))
        assert np.array_equal(embedded, of_view.numpy()), name
        shown = Image.open(io.BytesIO(shrink(in_place, 100, 10**6)[0])).convert("RGB")
        assert np.array_equal(np.asarray(shown), np.asarray(given)), name


def test_of_a_tar_only_what_trainings_cannot_decode_is_copied(bench: Bench) -> None:
    copied = [row["url"].rpartition("-")[2] for row in bench.rows("pairs")[len(IMAGES) :] if row["tar"] is None]
    assert copied == [name for name in IMAGES if name.startswith("whole.")]


def test_both_ways_know_the_same_width_and_height(bench: Bench) -> None:
    rows = [(row["width"], row["height"]) for row in bench.rows("pairs")]
    assert rows[: len(IMAGES)] == rows[len(IMAGES) :]
    assert set(rows) == {SIDES, SIDES[::-1]}


def pixels(name: str) -> np.ndarray:
    return np.asarray(upright_rgb(Image.open(io.BytesIO(IMAGES[name])))).astype(int)


def test_sixteen_bits_are_the_upper_eight() -> None:
    levels = np.linspace(0, 65535, 80 * 72).astype(np.uint16).reshape(72, 80)
    grey = (levels >> 8)[..., None].repeat(3, -1)
    assert np.array_equal(pixels("grey16.png"), grey)
    assert np.abs(pixels("rgb16.png") - grey).max() <= 1
    clear = pixels("grey16-key.png")
    assert (clear[levels == levels[40, 40]] == 255).all()
    assert np.array_equal(clear[levels != levels[40, 40]], grey[levels != levels[40, 40]])


def test_a_wide_gamut_becomes_srgb() -> None:
    """Against the arithmetic of the profile: linear light, its primaries, those of sRGB."""
    colour = np.array([0.6, 0.5, 0.4])
    adobe = np.array([[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]])
    to_srgb = np.array([[3.24097, -1.53738, -0.49861], [-0.96924, 1.87597, 0.04156], [0.05563, -0.20398, 1.05697]])
    linear = to_srgb @ adobe @ colour ** (563 / 256)
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    image = Image.new("RGB", (8, 8), tuple(round(255 * value) for value in colour))
    data = encoded(image, "png", icc_profile=ADOBE_RGB)
    found = np.asarray(upright_rgb(Image.open(io.BytesIO(data))))[0, 0]
    assert np.abs(found - expected).max() <= 1.5
    assert np.abs(np.array(image.getpixel((0, 0))) - found).max() >= 8


@pytest.mark.parametrize("command", ["edit", "search"])
def test_an_image_that_is_named_has_the_limits_of_the_list(bench: Bench, tmp_path: Path, command: str) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(encoded(Image.new("1", (10_000, 10_000)), "png"))
    with pytest.raises(UserError, match=r"bomb\.png: cannot be used \(too_many_pixels"):
        open_image(file) if command == "edit" else search.embed_image(bench.store, bench.made["clip"], str(file))
    assert shared_decoder()._process is not None
