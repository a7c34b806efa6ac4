"""The quick start's world: its drawings, captions, list and splits, and the server that draws."""

import hashlib
import io
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from functools import cache
from itertools import combinations
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from pipeline.data.fetch.fetcher import Fetcher
from pipeline.data.source.drawings import world
from pipeline.data.source.drawings.listing import SUBSETS, DrawingRow, drawing_rows
from pipeline.data.source.drawings.server import serving
from pipeline.data.source.drawings.world import (
    HOST,
    PARTS,
    VERSION,
    Drawing,
    Value,
    draw,
    draw_png,
    drawing_of,
    drawing_url,
)
from pipeline.data.source.lists import read_rows
from pipeline.data.source.recipe import SourceRecipe
from pipeline.errors import UserError, install
from pipeline.settings import PairsSettings
from tests.pipeline.data.bench import fetch_all

PINNED_LISTS = {
    "nano": "80ffae5869c7b02c",
    "nano-more": "38cb69aa2daa54ab",
    "tiny": "92bace8daa5d5a77",
    "full": "c0252e96ac3b9ae1",
}
FIRST = {style: Drawing(style, tuple(next(iter(known)) for known in parts.values())) for style, parts in PARTS.items()}


@cache
def rows_of(subset: str) -> list[DrawingRow]:
    return drawing_rows(subset)


def pixels(drawing: Drawing, side: int = 64) -> np.ndarray:
    """As networks see it: 256 px, brought down to ``side``."""
    return np.asarray(draw(drawing, 256).resize((side, side), Image.Resampling.BOX)).astype(float)


# --- drawings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", PARTS)
def test_every_value_of_a_part_looks_different_at_32_px(style: str) -> None:
    base = FIRST[style]
    for part, values in PARTS[style].items():
        seen = {value: pixels(base.replaced(part, value), 32) for value in values}
        for one, other in combinations(values, 2):
            changed = np.abs(seen[one] - seen[other]).max(-1) > 20
            assert changed.sum() >= 12, (part, one, other)


@pytest.mark.parametrize("style", PARTS)
def test_another_value_changes_its_part_alone(style: str) -> None:
    base = FIRST[style]
    small = "eyes" if "eyes" in PARTS[style] else "moon"
    for other in list(PARTS[style][small])[1:]:
        changed = np.abs(pixels(base) - pixels(base.replaced(small, other))).max(-1) > 0
        assert 0 < changed.mean() < 0.2


@pytest.mark.parametrize("style", PARTS)
@pytest.mark.parametrize("side", [256, 1024])
def test_a_drawing_is_opaque_and_the_same_every_time(style: str, side: int) -> None:
    data = draw_png(FIRST[style], side)
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    assert image.size == (side, side)
    assert image.getchannel("A").getextrema() == (255, 255)
    assert draw_png(FIRST[style], side) == data
    ground = tuple(bytes.fromhex(PARTS[style]["ground"][FIRST[style].parts["ground"]].option[1:]))
    assert image.getpixel((0, side - 1 if style == "planets" else 0))[:3] == ground


def test_nothing_is_left_to_dicebears_own_dice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed draws the same pixels."""
    import dicebear

    drawings = [Drawing(style, tuple(list(values)[-1] for values in parts.values())) for style, parts in PARTS.items()]
    before = [draw_png(drawing, 256) for drawing in drawings]
    avatar = dicebear.Avatar
    for seed in ("1", "another"):
        monkeypatch.setattr(dicebear, "Avatar", lambda style, options, s=seed: avatar(style, {**options, "seed": s}))
        assert [draw_png(drawing, 256) for drawing in drawings] == before


def test_an_address_says_everything() -> None:
    for row in rows_of("tiny"):
        drawing, side = drawing_of(row.url)
        assert drawing_url(drawing, side) == row.url
        assert drawing_of(urlsplit(row.url).path) == (drawing, side)


GOOD = "/256/planets/plain-red-blue-none-none.png"


@pytest.mark.parametrize(
    "bad",
    ["/", "/256/critters/ZZZ.png", "/255/planets/plain-red-blue-none-none.png", "/256/planets/plain-red-blue-none.png",
     "/256/planets/plain-red-blue-none-three.png", "/256/dragons/plain-red-blue-none-none.png",
     "/256/planets/../plain-red-blue-none-none.png", "/2e2/planets/plain-red-blue-none-none.png",
     "/٢٥٦/planets/plain-red-blue-none-none.png", f"{GOOD}?x"],
)  # fmt: skip
def test_other_addresses_name_no_drawing(bad: str) -> None:
    drawing_of(f"/v{VERSION}{GOOD}")
    with pytest.raises(LookupError):
        drawing_of(f"/v{VERSION}{bad}")


@pytest.mark.parametrize("bad", [GOOD, f"/v{VERSION - 1}{GOOD}", f"http://elsewhere.test/v{VERSION}{GOOD}"])
def test_drawings_of_other_hosts_and_versions_are_others(bad: str) -> None:
    with pytest.raises(LookupError):
        drawing_of(bad)


# --- captions ---------------------------------------------------------------------------------------------------------


def test_two_captions_name_every_part_and_those_of_shapes_no_colour() -> None:
    for row in rows_of("tiny"):
        drawing = drawing_of(row.url)[0]
        whole, again, *shapes, some = row.captions
        named = [
            {part for part, name in drawing.parts.items() if _says(caption, PARTS[drawing.style][part][name])}
            for caption in (whole, again, *shapes, some)
        ]
        assert named[0] == named[1] == drawing.parts.keys(), row
        assert [len(parts - {"colour", "ground"}) == len(parts) >= 2 for parts in named[2:5]] == [True] * 3, row
        assert named[5], row
        assert not any(re.search(r"\ba [aeiou]|  | ,|,,|[ ,.]$|^[ ,]", caption) for caption in row.captions), row


def _says(caption: str, value: Value) -> bool:
    return any(re.search(rf"\b{word.removeprefix('a ').removeprefix('an ')}\b", caption) for word in value[1:])


@pytest.mark.slow  # the list is pinned below, with its captions
def test_no_caption_is_cut_in_a_context_of_32() -> None:
    import open_clip

    told = sorted({caption for row in rows_of("full") for caption in row.captions}, key=len)[-2000:]
    tokens = open_clip.get_tokenizer("ViT-B-32")(told)
    assert (tokens != 0).sum(1).max() <= 32  # with the start and the end token


# --- the list ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", SUBSETS)
def test_every_subset_is_fit_to_train_on(subset: str) -> None:
    rows = rows_of(subset)
    assert len(rows) == SUBSETS[subset]
    assert len({row.url for row in rows}) == len(rows)
    shares = {split: count / len(rows) for split, count in Counter(row.split for row in rows).items()}
    assert shares["test"] == pytest.approx(0.06, abs=0.01)
    assert shares["validation"] == pytest.approx(0.04, abs=0.01)
    assert 0.02 < sum("/1024/" in row.url for row in rows) / len(rows) < 0.08
    drawings = [drawing_of(row.url)[0] for row in rows if row.split == "train"]
    trained = {(d.style, part, value) for d in drawings for part, value in d.parts.items()}
    assert trained == {
        (style, part, value) for style, parts in PARTS.items() for part in parts for value in parts[part]
    }
    assert {row.license for row in rows} == {"CC0-1.0"}
    assert all(drawing_of(row.url)[0].style in row.attribution.lower() for row in rows)


def test_a_group_is_a_pair_of_values_that_is_on_one_side_alone() -> None:
    splits, rows = defaultdict(set), rows_of("full")
    for row in rows:
        splits[row.group].add(row.split)
    assert {len(found) for found in splits.values()} == {1}
    for split, learned in (("test", ("train", "validation")), ("validation", ("train",))):
        pairs = {row.group for row in rows if row.split == split}
        assert len(pairs) >= 5
        assert {pair.partition(":")[0] for pair in pairs} == PARTS.keys()
        for row in rows:
            drawing = drawing_of(row.url)[0]
            has = [f"{part} {value}" for part, value in drawing.parts.items()]
            for pair in pairs:
                style, _, values = pair.partition(": ")
                if style == drawing.style and all(value in has for value in values.split(", ")):
                    assert row.split not in learned, (row, pair)


def test_the_list_never_moves() -> None:
    """Pinned: whoever changes it on purpose raises world.VERSION and these."""
    digests = {s: hashlib.sha256(repr([tuple(r) for r in rows_of(s)]).encode()).hexdigest()[:16] for s in SUBSETS}
    assert digests == PINNED_LISTS


def test_flawed_rows_have_the_captions_that_they_have() -> None:
    listed, flawed = (list(read_rows(path, SourceRecipe((path,)))) for path in ("drawings:nano", "drawings:flawed"))
    assert [row.captions for row in listed] == [row.captions for row in rows_of("nano")]
    told = {row.url.rpartition("/")[2]: row.captions for row in flawed}
    assert len(told) == 9
    assert told["untold.png"] == ()
    assert told["empty.png"] == ("an image of nothing at all",)
    assert flawed[-1].url in {row.url for row in listed}


def test_a_users_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nano, nano-more, tiny, full"):
        drawing_rows("huge")
    monkeypatch.setitem(world.PACKAGES, "no_such_module", "no-such-package")
    says = r"no-such-package: pip install dicebear-core==\S+ dicebear-styles==\S+ resvg-py==\S+ installs what"
    with pytest.raises(UserError, match=says), serving():
        pass
    assert "'ray[serve]<" in install("serve")


# --- the server -------------------------------------------------------------------------------------------------------


def test_the_server_draws_what_is_asked_for_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Nor of a client that has gone."""
    rows = rows_of("nano")[:4]
    path = rows[0].url.removeprefix(f"http://{HOST}")
    with serving() as address:
        host, port = address.split(":")
        for _ in range(3):
            with socket.create_connection((host, int(port))) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset when it closes
                client.sendall(f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        settings = PairsSettings(threads=4, timeout_s=30.0, retries=0, hosts={HOST: address})
        fetcher = Fetcher(settings, max_bytes=1_000_000)
        fetched = fetch_all(fetcher, [*(row.url for row in rows), f"http://{HOST}/256/planets/none.png"])
        assert [f.data for f in fetched[:-1]] == [draw_png(*drawing_of(row.url)) for row in rows]
        assert fetched[-1].reason == "http_4xx"
    with pytest.raises((urllib.error.URLError, ConnectionResetError)):  # the latter where it ends while one waits
        urllib.request.urlopen(f"http://{address}/")
    assert capfd.readouterr().err == ""


def test_the_server_ends_with_its_parent() -> None:
    code = """
import time
from pipeline.data.source.drawings.server import serving
with serving() as address:
    print(address, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        address = parent.stdout.readline().strip()
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://{address}/", timeout=5)
        except urllib.error.HTTPError:
            assert time.monotonic() < deadline, "the server outlived its parent"
            time.sleep(0.05)
        except OSError:
            return
