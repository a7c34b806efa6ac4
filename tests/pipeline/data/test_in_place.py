"""Images that lie in tars of the user's, after pairs: strangers have made them, and every later stage decodes them."""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.view import open_view, upright_rgb
from pipeline.data.curation.reading import PairReader
from pipeline.data.pairs import decoding, image
from pipeline.data.pairs.decoding import read_pair_pixels
from pipeline.data.pairs.image import IN_PLACE_PIXELS, IN_PLACE_SCANS, inspect, read_foreign_pixels
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.errors import UserError
from pipeline.graph.artifacts import read_shards
from pipeline.report.inputs import ReportInput
from pipeline.report.rows import read_pairs, thumbnail
from pipeline.training.feed.views import Views
from tests.pipeline.data.bench import Bench, picture, save_clip, write_tar
from tests.pipeline.data.odd import encoded, odd_images
from tests.pipeline.data.pairs.decoders import with_word, wrapped

SIZE = 64
KINDS = {"0.png": picture(0), "1.jpg": picture(1, 200, 150, "JPEG"), "2.webp": picture(2, kind="WEBP")}


def tar_bench(folder: Path, images: dict[str, bytes], **changes: Any) -> Bench:
    members: dict[str, Any] = {}
    for name, data in images.items():
        members |= {name: data, f"{name.split('.')[0]}.txt": b"a picture"}
    return Bench(folder / "store", [str(write_tar(folder / "images.tar", members))], **changes)


def places(bench: Bench) -> list[Place]:
    shards = read_shards(bench.store, bench.made["pairs"])
    blobs = {shard.number: shard.blobs.get("images") for shard in shards}
    return [Place.of(row, blobs[int(row["key"][:8])]) for row in bench.rows("pairs") if row["status"] == "kept"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("in_place")
    bench = tar_bench(folder, KINDS, clip={"weights": save_clip(folder / "clip")})
    bench.make("source", "captions", "pairs", "clip")
    assert all(place.in_place for place in places(bench))
    return bench


@pytest.fixture
def opened_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hashes of the files that this process opens as images."""
    found: list[str] = []
    opened = Image.open

    def noted(file: io.BytesIO, *arguments: Any, **options: Any) -> Image.Image:
        found.append(hashlib.sha256(file.getvalue()).hexdigest())
        return opened(file, *arguments, **options)

    monkeypatch.setattr(Image, "open", noted)
    return found


def test_no_stage_opens_them_in_its_own_process(bench: Bench, opened_here: list[str]) -> None:
    """Neither embeddings, nor the feed of trainings and evaluation, nor readers of pairs, nor the report."""
    for data in KINDS.values():  # as a stored image is, so the test sees what it looks for
        read_pair_pixels("0", data, SIZE, in_place=False)
    assert opened_here == [hashlib.sha256(data).hexdigest() for data in KINDS.values()]
    opened_here.clear()
    found = places(bench)
    bench.make("embeddings")
    Views(bench.store, SIZE).views(found, {})
    made = {name: bench.made[name] for name in ("pairs", "captions", "embeddings")}
    pairs = [pair for part in PairReader(bench.store, made).read(0) for pair in part]
    assert [pair.image.size for pair in pairs] == [(80, 72), (200, 150), (80, 72)]
    given = ReportInput(bench.store, bench.made)
    [listed] = read_pairs(given, read_shards(bench.store, bench.made["pairs"]))
    assert all("data:image/" in thumbnail(given, listed, row).image for row in listed.rows)
    assert opened_here  # the thumbnails that the child has made
    assert not {place.sha256 for place in found} & set(opened_here)


@pytest.mark.parametrize("size", [SIZE, 24, 300, None])
def test_their_pixels_are_those_that_this_process_would_read(size: int | None) -> None:
    for name, data in (odd_images() | KINDS).items():
        expected = open_view(data, size) if size else np.asarray(upright_rgb(Image.open(io.BytesIO(data))))
        assert np.array_equal(read_pair_pixels("0", data, size, in_place=True), expected), name


def test_threads_have_a_child_each(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_idle", [])
    data = KINDS["1.jpg"]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: read_pair_pixels("0", data, SIZE, in_place=True), range(60)))
    assert all(np.array_equal(each, open_view(data, SIZE)) for each in found)
    assert 1 <= len(decoding._idle) <= 3


def test_one_that_kills_its_decoder_then_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was quiet when pairs looked at it."""
    bench = tar_bench(tmp_path, {"0.png": picture(0), "1.png": with_word("SEGFAULT")})
    bench.make("source", "captions", "pairs")
    sound, killer = places(bench)
    with closing(wrapped(tmp_path)) as child:
        monkeypatch.setattr(decoding, "_idle", [child])
        views = Views(bench.store, SIZE)
        with pytest.raises(UserError, match=rf"row {killer.key} cannot be opened \(decoding the image killed"):
            views.views([killer], {})
        [view] = views.views([sound], {})
        assert np.array_equal(view.result().transpose(1, 2, 0), open_view(picture(0), SIZE))


# --- what is not used where it lies -----------------------------------------------------------------------------------


def scans(count: int) -> bytes:
    """A progressive JPEG of this many scans, most of them empty."""
    whole = encoded(Image.new("RGB", (80, 72), "teal"), "JPEG", progressive=True)
    last = whole[whole.rfind(b"\xff\xda") : -2]
    return whole[:-2] + last * (count - whole.count(b"\xff\xda")) + b"\xff\xd9"


LARGE = encoded(Image.new("1", (4000, IN_PLACE_PIXELS // 4000 + 1)), "PNG")


def test_an_image_that_would_cost_every_epoch_dear_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = {"0.jpg": scans(IN_PLACE_SCANS), "1.jpg": scans(IN_PLACE_SCANS + 1), "2.png": LARGE, "3.png": picture(3)}
    bench = tar_bench(tmp_path, images)
    bench.make("source", "captions", "pairs")
    assert [place.in_place for place in places(bench)] == [True, False, False, True]
    stored = read_images(bench.store, places(bench))
    assert stored[0] == images["0.jpg"]
    assert [Image.open(io.BytesIO(data)).format for data in stored[1:3]] == ["JPEG", "JPEG"]
    assert stored[1] != images["1.jpg"]
    rows = bench.rows("pairs")
    assert [(row["width"], row["height"]) for row in rows] == [(80, 72), (80, 72), (1024, 1024), (80, 72)]
    monkeypatch.setattr(image, "IN_PLACE_S", 0.0)  # so is one that took long
    assert inspect(images["0.jpg"], 10**6) is None


def test_later_stages_take_no_more_than_pairs_does() -> None:
    """An index may come from anybody who can write to the store."""
    assert read_foreign_pixels(scans(IN_PLACE_SCANS + 1), SIZE) == "decode_error"
    assert read_foreign_pixels(LARGE, SIZE) == "too_many_pixels"
    assert read_foreign_pixels(picture(0)[:-300], SIZE) == "decode_error"
    assert read_foreign_pixels(encoded(Image.new("RGB", (8, 8)), "TIFF"), SIZE) == "not_an_image"
    for in_place in (True, False):
        with pytest.raises(UserError, match="the image of row 7 cannot be opened"):
            read_pair_pixels("7", picture(0)[:-300], SIZE, in_place=in_place)
