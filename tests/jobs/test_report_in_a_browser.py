"""Tests the quick start's own path at nano length, and every element of its report as a browser shows it."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from pipeline.config import TRAININGS
from pipeline.data.source.drawings.listing import drawing_rows
from tests.browser import Shown
from tests.chain import done, unclip

pytestmark = pytest.mark.browser
WITH_TIMESTEPS = ("diffusion_prior", "decoder", "upsampler_256")  # the 1024 px upsampler has too few rows here
WITHOUT_RAY = ("pairs", "filter", "embeddings", "curation", "upsampler_256", "upsampler_1024")
SAMPLES = 4  # captions in the configuration
# Of the decoder and the upsamplers: at the start, at the end, and the decoder's after 64 steps.
PREVIEWS = 3 + 2 + 2


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Returns the quick start's configuration with nano models, fewer rows and a quarter of the samples.

    Diffusion prior and decoder train side by side on Ray, as in the quick start; the rest is quicker without.

    Not as few as drawings:nano has: none of those for validation is large enough for the 1024 px upsampler's preview.
    """
    folder = tmp_path_factory.mktemp("demo")
    lists = 'source.paths=["drawings:tiny", "drawings:flawed"]'
    smaller = ["preset=nano", "scale=0.25", lists, "source.shard_rows=400"]
    smaller += [f"run.{stage}.workers=0" for stage in WITHOUT_RAY]
    return ["configs/demo.yaml", *smaller, f"store={folder}/store", f"run.output={folder}/out"]


@pytest.fixture(scope="module")
def folder(words: list[str]) -> Path:
    """Returns the folder where the finished run has left its report."""
    output = done(unclip("run", *words))
    assert "Does it learn? " in output
    return Path(words[-1].partition("=")[2])


@pytest.fixture(scope="module")
def shown(browser: Browser, folder: Path) -> Shown:
    return Shown(browser, folder / "report.html")


def test_it_is_one_small_file_that_nothing_is_wrong_with(shown: Shown, folder: Path) -> None:
    assert shown.complaints == []
    assert [url for url in shown.requested if not url.startswith("data:")] == [(folder / "report.html").as_uri()]
    assert (folder / "report.html").stat().st_size < 5 << 20
    assert "cannot be shown" not in shown.page.inner_text("body")
    widths = shown.page.locator("img").evaluate_all("images => images.map(i => i.complete && i.naturalWidth)")
    assert len(widths) == 2 * SAMPLES + 24 + 4 + PREVIEWS + 8  # samples, rows kept and rejected, held-out rows
    document = json.loads((folder / "report.json").read_text())
    assert document["verdict"] == shown.texts(".verdict")[0]
    assert all(stage["made"] for stage in document["stages"])
    assert all(widths)


def test_the_first_screen_has_verdict_tiles_and_samples(shown: Shown) -> None:
    for selector in (".verdict", ".tiles li:last-child", "#samples figure:last-child img"):
        box = shown.page.locator(selector).first.bounding_box()
        assert box
        assert box["y"] + box["height"] <= 800
    assert shown.page.evaluate("document.documentElement.scrollHeight") <= 9000
    for link in shown.page.locator("nav a").all():
        assert shown.count(link.get_attribute("href") or "") == 1
    assert shown.count("meta[http-equiv]") == 0  # it does not refresh itself any more


def test_samples_stand_beside_their_64_px_beginnings(shown: Shown) -> None:
    sizes = shown.page.locator("#samples figure img").evaluate_all("images => images.map(i => i.naturalWidth)")
    assert sizes == [512, 64] * SAMPLES
    assert shown.texts("#samples figcaption bdi")[0].startswith("a bell-shaped lime monster with a crown")


def test_rows_are_shown_and_rejects_with_their_reasons(shown: Shown) -> None:
    kept, rejected = shown.page.locator("#data .thumbs").all()
    assert kept.locator("img").count() == 24
    known = {row.captions[0][:80] for row in drawing_rows("tiny")}
    assert {text.strip()[:80] for text in kept.locator("figcaption").all_inner_texts()} <= known
    reasons = [text.split()[0] for text in rejected.locator("figcaption").all_inner_texts()]
    assert sorted(reasons) == ["bad_aspect", "caption_too_long", "no_caption", "too_small"]
    table = " ".join(shown.page.locator("#data table").all_text_contents())
    assert all(name in table for name in ("http_4xx", "not_an_image", "truncated", "zero_bytes"))
    assert '"Critters" by DiceBear' in table
    assert '"Planets" by DiceBear' in table


def test_charts_show_sizes_similarity_spectrum_and_losses(shown: Shown) -> None:
    assert shown.count("#data svg") == 1 + 3  # the rows that stages keep, sizes of images and captions, similarity
    assert shown.count("#embeddings svg") == shown.count("#codec svg") == 1
    chart = shown.page.locator("#decoder-loss")
    assert chart.locator("text", has_text=": train ").first.is_hidden()
    chart.locator(".hit").nth(2).hover()
    assert [hint for hint in chart.locator("text", has_text=": train ").all() if hint.is_visible()]
    assert shown.count("#training svg") == len(TRAININGS) + len(WITH_TIMESTEPS)
    # Only 2 validation images are large enough for the 1024 px upsampler, and a figure of fewer than 8 is left out.
    assert "No validation is shown: 2 validation pairs" in shown.texts("#training h3#upsampler_1024 ~ .beside .note")[0]
    boxes = shown.page.locator("svg").evaluate_all(
        "all => all.filter(s => s.checkVisibility() && !s.matches('.bar')).map(s => s.getBoundingClientRect().height)"
    )
    assert min(boxes) > 50  # a single quarter of the timesteps is one bar


def test_grids_grow_sharper_on_the_same_captions(shown: Shown) -> None:
    for stage in ("decoder", "upsampler_256", "upsampler_1024"):
        labels = shown.texts(f"#training h3#{stage} ~ .beside .previews figcaption")
        assert labels[0] == "After 0 samples"
    assert shown.count("#training .previews img") == PREVIEWS


def test_the_evaluation_has_a_line_a_claim_and_what_was_drawn(shown: Shown) -> None:
    said = shown.texts("#evaluation .claims b")
    assert 8 <= len(said) <= 16
    assert any("upsampler_1024 not measured: " in text for text in shown.texts("#evaluation .claims .quiet"))
    marks = shown.page.locator("#evaluation .claims li > span:first-child").all_inner_texts()
    assert len(marks) == len(said)
    assert set(marks) <= {"✓", "✗", "·"}
    strip = shown.page.locator("#evaluation .strips")
    heights = strip.locator("img").evaluate_all("images => images.map(i => i.naturalHeight)")
    assert heights == [4 * 64] * 8  # real, either prior, and decoder
    assert "the real image; the AR prior; the diffusion prior; the decoder" in shown.page.inner_text("#evaluation")


def test_it_can_be_read_without_script_on_a_narrow_screen_and_on_paper(browser: Browser, folder: Path) -> None:
    narrow = Shown(browser, folder / "report.html", width=360, script=False)
    assert narrow.page.locator("#evaluation .claims li").count() >= 8
    measured = Shown(browser, folder / "report.html", width=360).page
    assert measured.evaluate("document.documentElement.scrollWidth") <= 360
    paper = narrow.page.pdf(format="A4", print_background=True)
    assert paper.startswith(b"%PDF")
    assert len(paper) > 100_000
    narrow.page.emulate_media(media="print")
    assert not narrow.page.locator("nav, #environment, .samples a").filter(visible=True).count()
    folded = narrow.page.locator("details:not([open], .zoom) > summary").filter(visible=True)
    # Nothing to click but those lines.
    assert folded.count() == narrow.page.locator("#training h3 + details").count() > 0


def test_a_copy_for_others_shows_images_of_one_licence_only(
    browser: Browser, words: list[str], shown: Shown, tmp_path: Path
) -> None:
    file = tmp_path / "copy.html"
    ended = unclip("report", *words, "--license", "CC-BY-9.0", "--output", file)
    assert str(file) in done(ended)
    assert "no image of the report has the licence CC-BY-9.0; its images have CC0-1.0" in ended.stderr
    copy = Shown(browser, file)
    assert (shown.count("#data .thumbs img"), copy.count("#data .thumbs img")) == (28, 0)
    assert (shown.count("#evaluation .strips img"), copy.count("#evaluation .strips img")) == (8, 0)
    assert copy.count("#training .previews") == 1  # the decoder's
    first = [page.page.locator("#training .previews img").first for page in (shown, copy)]
    heights = [image.evaluate("image => image.naturalHeight") for image in first]
    assert heights == [128, 64]  # real images above drawn ones, and the drawn ones alone
    assert copy.count("#samples img") == 2 * SAMPLES
