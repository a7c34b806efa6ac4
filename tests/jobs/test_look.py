"""A look at lists before anything is trained: what is in them, what will be rejected, and the page that says it."""

import csv
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import unclip
from jobs.cli import main
from jobs.look import look
from pipeline.data.source.journal import ListJournal, change_journal, journal_path, reference_mark
from pipeline.look.overview import Look
from pipeline.store import open_store
from tests.chain import refused
from tests.pipeline.data.bench import Page, Pages, picture, save_clip, serving, write_tar
from tests.pipeline.data.source.imported import write_parts

Output = pytest.CaptureFixture[str]
ENGLISH = "a small picture of thing number {} on a plain ground"
WORDS = " ".join(["word"] * 40)  # more than the 30 tokens of tiny, fewer than the 75 of other presets
PLACES = ["this machine", "RTX 4090", "RTX 3060", "L4", "a Mac"]


class Found(NamedTuple):
    """What a look at the list of a server found, and the text of its page."""

    look: Look
    page: str


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, where nothing but pages may be left."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(path: Path, rows: Sequence[Sequence[str]], head: str = "url,caption,license") -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head.split(","), *rows])
    return path


def rows_of(host: str) -> list[tuple[str, str, str]]:
    """Twelve rows that are fine, and one of each kind that will be missed."""
    good = [(f"http://{host}/{i}.png", ENGLISH.format(i), "CC0-1.0") for i in range(12)]
    good[3] = (good[3][0], "маленькая картинка на ровном фоне", "CC0-1.0")
    good[4] = (good[4][0], WORDS, "CC BY 4.0")
    good[5] = (good[5][0], ENGLISH.format(6), "")
    return [
        *good,
        (f"http://{host}/again.png", ENGLISH.format(12), ""),  # the bytes of 0.png under another name
        (f"http://{host}/small.png", "a <b>small</b> picture", ""),
        (f"http://{host}/wide.png", "a wide picture", ""),
        (f"http://{host}/gone.png", "a picture that is gone", ""),
        (f"http://{host}/text.png", "no picture at all", ""),
        (f"http://{host}/0.png", "the first picture again", ""),
        (f"http://{host}/long.png", "word " * 300, ""),
        (f"http://{host}/bare.png", "", ""),
        ("", "a caption without an image", ""),
        ("file:///etc/hostname", "what a list may not name", ""),
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """All of a look at a table whose images lie on a server."""
    folder = tmp_path_factory.mktemp("look")
    pages = Pages({f"/{i}.png": Page(picture(i, 300, 280)) for i in range(12)})
    pages |= {"/1.png": Page(picture(1, 1100, 1040)), "/2.png": Page(picture(2))}
    pages |= {"/again.png": pages["/0.png"], "/small.png": Page(picture(20, 40, 40))}
    pages |= {"/wide.png": Page(picture(21, 400, 80)), "/text.png": Page(b"<html>")}
    pages |= {name: Page(picture(i, 300, 280)) for i, name in enumerate(("/long.png", "/bare.png"), 30)}
    with serving(pages) as address:
        listed = write_rows(folder / "pairs.csv", rows_of("pictures.test"))
        hosts = f"run.pairs.hosts={{pictures.test: '{address}'}}"
        seen = unclip.look(listed, hosts, "run.pairs.retries=0", page=folder / "look.html")
    return Found(seen, (folder / "look.html").read_text())


def test_a_list_on_a_server_is_counted_by_the_rules_that_a_run_would_apply(found: Found) -> None:
    seen = found.look
    assert (seen.rows, seen.pairs) == (22, 18)
    assert seen.licenses == {"CC0-1.0": 10, "not named": 8, "CC BY 4.0": 1}
    assert sum(seen.splits.values()) == 19
    assert (seen.repeated_images, seen.repeated_captions, seen.captions_compared) == (1, 1, 18)
    assert {(rule.stage, rule.reason, rule.rows, rule.of, rule.sampled) for rule in seen.rules} == {
        ("source", "duplicate_url", 1, 22, False),
        ("source", "no_reference", 1, 22, False),
        ("source", "forbidden_reference", 1, 22, False),
        ("pairs", "http_4xx", 1, 19, True),
        ("pairs", "not_an_image", 1, 19, True),
        ("curation", "caption_too_long", 1, 19, False),
        ("curation", "no_caption", 1, 19, False),
        ("curation", "too_small", 1, 17, True),
        ("curation", "bad_aspect", 1, 17, True),
    }
    images = seen.images
    assert images is not None
    assert (images.rows, images.kept, images.equal) == (19, 17, 1)
    assert images.reaching == {64: 16, 256: 14, 1024: 1}
    assert images.short_sides[1024] == 1


def test_captions_are_measured_in_the_tokens_of_the_presets(found: Found) -> None:
    captions = found.look.captions
    assert (captions.rows, captions.captions) == (19, 18)
    assert captions.reads == {"nano": 30, "tiny": 30, "small": 75, "karlo": 75, "paper": 75}
    # The Cyrillic one has more than the 30 tokens of its five words in English.
    assert captions.cut["tiny"] in (2, 3)
    assert captions.cut["small"] == 1
    assert captions.scripts == {"Latin": 17, "Cyrillic": 1}
    assert captions.frequent == [(ENGLISH.format(6), 2)]


def test_a_beginning_is_proposed_with_the_time_that_it_takes_in_places_that_people_have(found: Found) -> None:
    seen = found.look
    # One image of 17 reaches 1024 px, more than one in a hundred.
    assert seen.proposal is not None
    assert seen.proposal.models == ("diffusion_prior", "decoder", "upsampler_256", "upsampler_1024")
    assert seen.proposal.preset in ("tiny", "small")
    where = [each.where for each in seen.estimates]
    assert len(where) >= 4
    assert all(name.startswith(place) for name, place in zip(where, PLACES, strict=False))
    assert all(each.seconds and each.seconds > 60 for each in seen.estimates)
    by_place = {each.where: each for each in seen.estimates}
    assert by_place["RTX 4090"].seconds <= by_place["RTX 3060"].seconds
    assert by_place["RTX 4090"].recipe == "preset tiny"  # for so few pairs


def test_the_page_shows_the_sample_and_every_rule_and_escapes_what_strangers_wrote(found: Found) -> None:
    page = found.page
    assert "<title>" in page
    assert "a look</title>" in page
    assert "cannot be shown" not in page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    assert page.count("data:image/") >= 14
    assert "a &lt;b&gt;small&lt;/b&gt; picture" in page
    for rule in found.look.rules:
        assert rule.reason in page
    for words in ("CC BY 4.0", "Cyrillic", "RTX 3060", "Raise curation.max_caption"):
        assert words in page
    assert len(page) < 5 << 20


def test_only_images_of_the_sample_are_fetched_and_nothing_stays_behind(here: Path) -> None:
    before = set(Path(tempfile.gettempdir()).glob("unclip-look-*"))
    pages = Pages({f"/{i}.png": Page(picture(i)) for i in range(30)})
    with serving(pages) as address:
        listed = write_rows(here / "pairs.csv", [(f"http://pictures.test/{i}.png", "a cat", "") for i in range(30)])
        seen = look(listed, f"run.pairs.hosts={{pictures.test: '{address}'}}", images=3)
    assert seen.images is not None
    assert (seen.rows, seen.images.rows, seen.images.kept) == (30, 3, 3)
    assert len({path for path in pages.asked if path.endswith(".png")}) == 3
    assert set(Path(tempfile.gettempdir()).glob("unclip-look-*")) == before
    assert [file.name for file in here.iterdir()] == ["pairs.csv"]
    assert seen.proposal is not None
    # Each is 72 px: nothing to train an upsampler on, which is known only because they were fetched.
    assert seen.proposal.models == ("diffusion_prior", "decoder")
    assert seen.proposal.size == 64


def test_addresses_that_are_not_public_are_refused_as_in_a_run(here: Path) -> None:
    pages = Pages({"/0.png": Page(picture(0))})
    with serving(pages) as address:
        listed = write_rows(here / "pairs.csv", [(f"http://{address}/0.png", "a cat", "")])
        refusing = look(listed, images=1)
        allowing = look(listed, "pairs.allow=[127.0.0.0/8]", images=1)
    assert [(rule.stage, rule.reason) for rule in refusing.rules] == [("pairs", "forbidden_address")]
    assert any("write allow: [127.0.0.1] below pairs:" in line for line in refusing.advice)
    assert (refusing.proposal, refusing.estimates) == (None, ())  # of images that nobody has seen
    assert "proposal   none, because no image of the sample can be used" in str(refusing)
    assert allowing.rules == ()


def folder_of(images: int) -> Path:
    folder = Path("pictures")
    folder.mkdir()
    for i in range(images):
        (folder / f"{i}.png").write_bytes(picture(i, 1100, 1030))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def test_the_command_prints_a_short_table_writes_the_page_and_speaks_json(capsys: Output) -> None:
    folder = folder_of(3)
    (folder / "notes.pdf").write_bytes(b"%PDF")
    assert main(["data", "look", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "pictures: 3 rows, 3 pairs" in said
    assert "3 of a sample of 3 can be used; short sides: median 1,024 px, 3 reach 64 px" in said
    assert "0 by the 30 tokens of nano, tiny; 0 by the 75 tokens of small, karlo, paper" in said
    assert "without CLIP: nothing" in said
    assert ".pdf (such as notes.pdf)" in said
    assert re.search(r"\n  RTX 4090 +about .*\(preset tiny; most of it is starting and compiling", said)
    assert said.endswith("page       look.html\n")
    assert "3 rows; nothing is trained" in Path("look.html").read_text()
    assert main(["data", "look", str(folder), "--json", "--images", "2", "-o", "elsewhere.html"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["rows"], printed["images"]["rows"], printed["proposal"]["size"]) == (3, 2, 1024)
    assert Path("elsewhere.html").is_file()
    assert {file.name for file in Path().iterdir()} == {"pictures", "look.html", "elsewhere.html"}
    assert main(["data", "look", str(folder), "--images", "0"]) == 0
    assert capsys.readouterr().out.endswith("page       look.html (in place of an earlier one)\n")


def test_tars_are_shown_from_where_they_lie(here: Path) -> None:
    members: dict[str, Any] = {}
    for i in range(2):
        members |= {f"{i}.png": picture(i), f"{i}.txt": f"picture {i}".encode()}
    seen = look(write_tar(here / "00000.tar", members), page="look.html")
    assert seen.images is not None
    assert seen.images.kept == 2
    page = Path("look.html").read_text()
    assert page.count("data:image/") == 2
    assert "cannot be shown" not in page


def test_embeddings_have_captions_and_no_images(here: Path) -> None:
    write_parts(here / "laion")
    seen = look(here / "laion", page="look.html")
    assert seen.images is None
    assert seen.captions.captions > 0
    assert "cannot be shown" not in Path("look.html").read_text()


def test_the_rules_and_the_forgotten_rows_of_a_configuration_count(here: Path) -> None:
    folder = folder_of(3)
    (folder / "0.txt").write_text("a caption that is longer than ten characters")
    store = open_store("store")
    config = {
        "project": "mine",
        "preset": "nano",
        "store": "store",
        "source": {"paths": ["pictures"]},
        "clip": {"weights": save_clip(here / "clip")},
        "pairs": {"min_image_size": 1031},
        "curation": {"max_caption": 10},
        "run": {"output": "out/mine"},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    forgotten = reference_mark(f"file://{here}/pictures/1.png")
    change_journal(store, "mine", lambda journal: ListJournal(forgotten=frozenset({forgotten})))
    assert main(["data", "look", "mine.yaml"]) == 0
    assert Path("out/mine/look.html").is_file()
    seen = look("mine.yaml", "curation.max_caption=100")
    assert [(rule.stage, rule.reason, rule.rows) for rule in seen.rules] == [
        ("source", "forgotten", 1),
        ("pairs", "too_small", 2),
    ]
    assert [(rule.reason, rule.rows) for rule in look("mine.yaml").rules][-1] == ("caption_too_long", 1)
    assert {each.recipe for each in seen.estimates} == {"as configured"}
    assert [entry.path for entry in store.list("")] == [journal_path("mine")]


def test_mistakes_are_one_line(here: Path) -> None:
    listed = write_rows(here / "other.csv", [("http://h/0.png", "a cat", "")], head="address,says,license")
    refused("data", "look", "nothing.csv", says="no such file", cwd=here)
    refused("data", "look", listed, says=["no column url", "here with --image-column and --caption-column"], cwd=here)
    refused("data", "look", listed, "--images", "20k", says="look at 0 to 10,000 images", cwd=here)
    refused("data", "look", says="SOURCE", cwd=here)
    plain = write_rows(here / "plain.csv", [("http://h/0.png", "a cat", "")])
    refused("data", "look", plain, "--images", 0, "-o", plain / "a.html", says="name another file", cwd=here)
    refused("data", "look", listed, "guidence=2", says="guidence", cwd=here)
    Path("mine.yaml").write_text("project: mine\nstore: store\nsource: {paths: [other.csv]}\n")
    refused("data", "look", "mine.yaml", "--encoding", "cp1252", says="set source.encoding there", cwd=here)
