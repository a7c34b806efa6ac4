"""Tests that axe-core finds nothing in the page, in either colour scheme, on a wide screen and on a narrow one."""

import gzip
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser

from pipeline.report.page import write_report
from pipeline.store import FolderStore
from tests.browser import Shown
from tests.pipeline.report.made_up import ROOT, alike, chain, config, culled, graph

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes reports of a whole chain, of its first half, and of nothing."""
    folder = tmp_path_factory.mktemp("reports")
    store = FolderStore(str(folder / "store"))
    made = chain(store, "a caption" + 30 * "ofonewordthatnobodycanbreak")
    made = culled(store, made, alike(store, made))
    write_report(store, config(), graph(), made, folder / "whole.html")
    write_report(
        store, config(), graph(), {name: made[name] for name in list(made)[:9]}, folder / "half.html", [made["decoder"]]
    )
    write_report(store, config(), graph(), {}, folder / "empty.html")
    return folder


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_whole_report_has_no_findings(
    browser: Browser, folder: Path, scheme: Literal["light", "dark"], width: int
) -> None:
    shown = Shown(browser, folder / "whole.html", width, scheme=scheme)
    assert shown.count("#data .thumbs") == 2 + 4  # rows kept, rows rejected, groups too alike
    assert shown.findings() == []
    assert shown.complaints == []
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", ["half", "empty"])
def test_an_unfinished_report_has_no_findings_but_that_it_refreshes_itself(
    browser: Browser, folder: Path, name: str
) -> None:
    shown = Shown(browser, folder / f"{name}.html", 360)
    assert [found.partition(" at ")[0] for found in shown.findings()] == ["critical: meta-refresh"]
    assert shown.complaints == []
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.fixture(scope="module")
def demo(folder: Path) -> Path:
    """Writes the report of the quick start, as the docs keep it."""
    file = folder / "demo.html"
    file.write_bytes(gzip.decompress((ROOT / "docs/demo.html.gz").read_bytes()))
    return file


def test_the_first_screen_of_the_demo_has_verdict_tiles_and_samples(browser: Browser, demo: Path) -> None:
    shown = Shown(browser, demo, 1280, script=False)
    for selector in (".verdict", ".tiles li:last-child", "#samples figure:last-child > .zoom"):
        box = shown.page.locator(selector).last.bounding_box()
        assert box
        assert box["y"] + box["height"] <= 800
    page = Shown(browser, demo, 1280).page
    assert page.evaluate("document.documentElement.scrollHeight") <= 9000
    assert demo.stat().st_size < 5 << 20


@pytest.mark.parametrize("width", [360, 1920])
def test_the_demo_fits_every_screen(browser: Browser, demo: Path, width: int) -> None:
    shown = Shown(browser, demo, width, scheme="dark")
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.findings() == []
    assert shown.complaints == []
    assert [url for url in shown.requested if not url.startswith("data:")] == [demo.as_uri()]


def test_a_click_makes_an_image_large_and_another_one_small(browser: Browser, demo: Path) -> None:
    page = Shown(browser, demo, script=False).page
    image = page.locator("#samples .zoom img").first
    small = image.bounding_box()
    image.click()
    large = image.bounding_box()
    image.click()
    assert small
    assert large
    assert large["width"] > 3 * small["width"]
    assert image.bounding_box() == small
