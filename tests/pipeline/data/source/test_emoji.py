"""The list of emoji, their pictures, and the server that draws them."""

import hashlib
import io
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from pipeline.evaluate.captions import EMOJI

from pipeline.data.fetch.fetcher import Fetcher
from pipeline.data.source.emoji import listing as emoji
from pipeline.data.source.emoji.listing import BACKGROUNDS, SUBSETS, EmojiRow, draw_emoji, emoji_rows
from pipeline.data.source.emoji.server import serving
from pipeline.data.source.lists import read_rows
from pipeline.data.source.stage import SourceRecipe
from pipeline.errors import UserError
from pipeline.settings import PairsSettings

PINNED_LISTS = {
    "nano": "8efe543e84c577fb",
    "nano-more": "ca370959228435fa",
    "tiny": "31923ca98c0d9d23",
    "full": "10f634abe1d67f38",
}


def path(row: EmojiRow) -> str:
    return urlsplit(row.url).path


def pixels(row: EmojiRow) -> np.ndarray:
    image = Image.open(io.BytesIO(draw_emoji(path(row))))
    assert image.mode == "RGB"
    return np.asarray(image)


def size(row: EmojiRow) -> int:
    return int(path(row).split("/")[1])


@pytest.mark.parametrize(
    ("subset", "low", "high"), [("nano", 320, 320), ("nano-more", 352, 352), ("tiny", 1400, 1600), ("full", 7000, 7600)]
)
def test_every_subset_is_fit_to_train_on(subset: str, low: int, high: int) -> None:
    rows = emoji_rows(subset)
    assert low <= len(rows) <= high
    assert len({row.url for row in rows}) == len(rows)
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        splits[row.group].add(row.split)
    assert set(Counter(row.split for row in rows)) == {"train", "validation", "test"}
    assert {frozenset(s) for s in splits.values()} == {  # a validation concept is seen, a test concept never
        frozenset(s) for s in (["train"], ["test"], ["train", "validation"])
    }
    coloured = sum("background" in row.captions[0] for row in rows) / len(rows)
    assert 0.37 < coloured < 0.43
    assert 0.05 < sum(size(row) == 1024 for row in rows) / len(rows) < 0.1


def test_shares_of_the_full_set() -> None:
    rows = emoji_rows("full")
    groups = {row.group: row.split for row in rows}
    assert sum(split == "test" for split in groups.values()) / len(groups) == pytest.approx(0.06, abs=0.01)
    assert sum(row.split == "validation" for row in rows) / len(rows) == pytest.approx(0.04, abs=0.01)
    flags = [row for row in rows if row.group.startswith(("flag of", "keycap"))]
    assert len(flags) > 500
    assert {row.split for row in flags} == {"train"}
    assert sum("skin tone" in row.captions[0] for row in rows) < len(rows) / 2


def test_concepts_hold_skin_tones_genders_and_directions_together() -> None:
    splits = defaultdict(set)
    for row in emoji_rows("full"):
        splits[row.group, path(row).split("/")[2]].add(row.split)
    assert {len(split) for split in splits.values()} == {1}
    farmers = ("1F468-1F3FB-200D-1F33E", "1F469-200D-1F33E", "1F9D1-200D-1F33E")
    assert {emoji._concept(code) for code in farmers} == {"farmer"}
    assert emoji._concept("1F3C3-1F3FD-200D-2642-200D-27A1") == "person running"
    assert emoji._concept("1F446") == emoji._concept("1F449-1F3FE") == "backhand index pointing"
    assert emoji._concept("1F469-1F3FB-200D-2764-200D-1F468-1F3FF") == "couple with heart"
    assert emoji._concept("1F385-1F3FB") == emoji._concept("1F936") == "Mx Claus"


def test_nano_more_appends() -> None:
    nano, more = emoji_rows("nano"), emoji_rows("nano-more")
    assert more[: len(nano)] == nano
    assert {row.group for row in more[len(nano) :]}.isdisjoint(row.group for row in nano)


def test_the_list_never_moves() -> None:
    """Pinned: whoever changes it on purpose raises emoji.VERSION and these."""
    digests = {s: hashlib.sha256(repr([tuple(r) for r in emoji_rows(s)]).encode()).hexdigest()[:16] for s in SUBSETS}
    assert digests == PINNED_LISTS


@pytest.mark.parametrize(
    ("code", "phrase"),
    [
        ("1F1EC-1F1ED", "the flag of Ghana"),
        ("1F1F3-1F1F1", "the flag of the Netherlands"),
        ("1F3F4-E0067-E0062-E0065-E006E-E0067-E007F", "the flag of England"),
        ("1F468-1F3FF-200D-1F9B0", "a man with red hair and dark skin tone"),
        ("1F469-200D-1F9B2", "a bald woman"),
        ("1F469-1F3FB-200D-1F33E", "a female farmer with light skin tone"),
        ("1F468-1F3FF-200D-2764-200D-1F468-1F3FB", "two men with a heart and dark and light skin tones"),
        ("1F469-200D-2764-200D-1F48B-200D-1F468", "a kiss between a woman and a man"),
        ("1F469-1F3FC-200D-1F91D-200D-1F469-1F3FF", "women holding hands with medium-light and dark skin tones"),
        ("1F468-200D-1F469-200D-1F467-200D-1F467", "a family of a man, a woman and two girls"),
        ("1F550", "a clock showing one o'clock"),
        ("2648", "the zodiac sign Aries"),
        ("1F6AD", "the no smoking sign"),
        ("0035-20E3", "the keycap 5"),
        ("1F9ED", "a compass"),
        ("1F989", "an owl"),
        ("1F984", "a unicorn"),
        ("1F35E", "bread"),
        ("1F347", "grapes"),
        ("1F979", "a face holding back tears"),
    ],
)  # fmt: skip
def test_captions_are_noun_phrases(code: str, phrase: str) -> None:
    assert emoji._phrase(code) == phrase


def test_the_first_caption_names_style_and_background_and_the_second_neither() -> None:
    for row in emoji_rows("full"):
        whole, name = row.captions
        parts = EMOJI.parts(whole)
        assert parts is not None
        assert parts.name == name
        assert EMOJI.parts(name) is None
        _, _, style, background, _ = path(row).split("/")
        assert (style == "twemoji") == whole.startswith("a flat twemoji picture of ")
        assert (style == "openmoji") == whole.startswith("an openmoji drawing of ")
        named = re.search(r" on a (.+) background$", whole)
        assert (named[1] if named else "white") == background.replace("-", " ")
        assert row.license.startswith("CC-BY")
        assert style.lower() in row.attribution.lower()


def test_the_list_gives_both_captions_and_flawed_rows_what_they_have() -> None:
    listed, flawed = (list(read_rows(path, SourceRecipe((path,)))) for path in ("emoji:nano", "emoji:flawed"))
    assert [row.captions for row in listed] == [row.captions for row in emoji_rows("nano")]
    told = {row.url.rpartition("/")[2]: row.captions for row in flawed}
    assert told["untold.png"] == ()
    assert told["empty.png"] == ("a flat twemoji picture of nothing at all",)


def test_caption_lengths_suit_a_context_of_32() -> None:
    import open_clip

    tokens = open_clip.get_tokenizer("ViT-B-32")([row.captions[0] for row in emoji_rows("full")])
    lengths = (tokens != 0).sum(1).double()  # with the start and the end token
    assert 15 < lengths.mean() < 18
    assert lengths.max() <= 32


def test_pictures_have_their_size_and_background_on_every_edge() -> None:
    rows = emoji_rows("full")
    chosen = [row for row in rows if size(row) == 256][:60] + [row for row in rows if size(row) == 1024][:3]
    for row in chosen:
        image = pixels(row)
        assert image.shape == (size(row), size(row), 3)
        margin = size(row) // 16
        colour = BACKGROUNDS[path(row).split("/")[3].replace("-", " ")]
        for edge in (image[:margin], image[-margin:], image[:, :margin], image[:, -margin:]):
            assert (edge == colour).all()
        assert (image != colour).any(-1).mean() > 0.02  # and something is drawn
    assert draw_emoji(path(chosen[0])) == draw_emoji(path(chosen[0]))


def test_backgrounds_can_be_told_apart() -> None:
    colours = np.array(list(BACKGROUNDS.values()))
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1000 * np.eye(len(colours))
    assert len(colours) == 9
    assert distance.min() > 25


@pytest.mark.parametrize(
    "bad",
    ["/", "/256/twemoji/white/ZZZ.png", "/256/twemoji/white/1F600-1F600.png", "/255/twemoji/white/1F600.png",
     "/256/nomoji/white/1F600.png", "/256/twemoji/black/1F600.png", "/256/twemoji/white/../1F600.png",
     "/1e3/twemoji/white/1F600.png", "/٢٥٦/twemoji/white/1F600.png", "/256/twemoji/white/1F600.png?x"],
)  # fmt: skip
def test_other_paths_name_no_picture(bad: str) -> None:
    with pytest.raises(LookupError):
        draw_emoji(bad)


def test_a_users_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nano, nano-more, tiny, full"):
        emoji_rows("huge")
    monkeypatch.setitem(emoji._DEMO, "no_such_module", "no-such-package")
    with pytest.raises(UserError, match=r"no-such-package.*pip install -e '\.\[demo\]' in the checkout"), serving():
        pass


def test_listing_imports_no_torch() -> None:
    code = """
import sys
import pipeline.data.source.emoji.listing
pipeline.data.source.emoji.listing.emoji_rows("nano")
print("torch" in sys.modules, "ray" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


def test_the_server_draws_what_the_fetch_asks_for() -> None:
    rows = emoji_rows("nano")[:12]
    with serving() as address:
        settings = PairsSettings(threads=4, timeout_s=10.0, retries=0, hosts={emoji.HOST: address})
        fetcher = Fetcher(settings, max_bytes=1_000_000)
        fetched = list(fetcher.fetch([*(row.url for row in rows), f"http://{emoji.HOST}/256/twemoji/white/0.png"]))
        assert [f.data for f in fetched[:-1]] == [draw_emoji(path(row)) for row in rows]
        assert fetched[-1].reason == "http_4xx"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://{address}/")


def test_the_server_ends_with_its_parent() -> None:
    code = """
import time
from pipeline.data.source.emoji.server import serving
with serving() as address:
    print(address, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        address = parent.stdout.readline().strip()
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while True:
        try:
            urllib.request.urlopen(f"http://{address}/", timeout=5)
        except urllib.error.HTTPError:
            assert time.monotonic() < deadline, "the server outlived its parent"
            time.sleep(0.05)
        except OSError:
            return


@pytest.mark.slow
def test_no_two_drawings_of_a_set_are_equal_and_none_is_dropped_needlessly() -> None:
    for style in ("twemoji", "openmoji"):
        names = emoji._names()
        codes = [code for code in emoji._svg_files(style) if code in names]
        with ThreadPoolExecutor(2) as pool:
            images = dict(zip(codes, pool.map(lambda code, s=style: rasterised(s, code), codes), strict=True))
        kept = {d.code for d in emoji._drawings() if d.style == style}
        copies = Counter(images[code] for code in kept)
        assert copies.most_common(1)[0][1] == 1
        assert {images[code] for code in codes} == set(copies)


def rasterised(style: str, code: str) -> bytes:
    import resvg_py

    file = str(emoji._svg_files(style)[code])
    png = resvg_py.svg_to_bytes(svg_path=file, width=72, height=72, dpi=96, skip_system_fonts=True, background="#f0f")
    return hashlib.sha256(Image.open(io.BytesIO(png)).convert("RGB").tobytes()).digest()
