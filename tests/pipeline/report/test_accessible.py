"""Tests that axe-core finds nothing in the page, in either colour scheme, on a wide screen and on a narrow one."""

from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser

from pipeline.report.page import write_report
from pipeline.store import FolderStore
from tests.browser import Shown
from tests.pipeline.report.made_up import alike, chain, config, culled, graph

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


def test_a_click_makes_an_image_large_and_another_one_small(browser: Browser, folder: Path) -> None:
    page = Shown(browser, folder / "whole.html", script=False).page
    image = page.locator("#samples .zoom img").first
    small = image.bounding_box()
    image.click()
    large = image.bounding_box()
    image.click()
    assert small
    assert large
    assert large["width"] > 3 * small["width"]
    assert image.bounding_box() == small
