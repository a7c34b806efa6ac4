"""The studio as a browser lays it out and names it, and its history, in Chromium; nothing is drawn here."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from serve.settings import ServeSettings
from tests.browser import Shown
from tests.serve.test_studio import painted, pixels
from tests.serve.trained import api_of, make_trained, running

pytestmark = pytest.mark.browser
WINDOWS = [(1280, 800), (768, 1024), (768, 800), (800, 600), (390, 844), (360, 640)]
PAGE, RUNS = 8, 100  # runs that are shown at once, and that are kept
# Rows of four images of 1024 px, as an earlier visit has left them in the database.
EARLIER = """async (count) => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1024, height: 1024 });
  const pen = canvas.getContext("2d");
  const opened = await new Promise((done) => {
    const asked = indexedDB.open("unclip-studio", 1);
    asked.onsuccess = () => done(asked.result);
  });
  for (let id = 1; id <= count; id++) {
    pen.fillStyle = `hsl(${id * 3} 60% 50%)`;
    pen.fillRect(0, 0, 1024, 1024);
    const blob = await new Promise((done) => canvas.toBlob(done));
    const items = Array.from({ length: 4 }, (_, i) => ({ blob, side: 1024, seed: i, score: 0.5 }));
    const fields = { prompt: `run ${id}`, n: 4, seed: 0, size: "1024x1024" };
    const request = { path: "images/generations", fields, images: {} };
    const run = { id, at: id, title: `run ${id}`, caption: `run ${id}`, request, items, seconds: 1, problem: "" };
    await new Promise((done) => {
      const change = opened.transaction("runs", "readwrite");
      change.objectStore("runs").put(run);
      change.oncomplete = done;
    });
  }
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    trained = make_trained(tmp_path_factory.mktemp("page"))
    with running(api_of(trained, ServeSettings(), trained.store.url, {})) as url:
        yield f"{url}/"


@pytest.fixture
def page(browser: Browser, server: str) -> Iterator[Page]:
    shown = Shown(browser, server)
    expect(shown.page.locator("#server")).to_contain_text("up to 256 px")
    yield shown.page
    assert shown.complaints == []
    shown.page.context.close()


def with_history(page: Page, count: int) -> None:
    page.evaluate(EARLIER, count)
    page.reload()
    expect(page.locator("h3", has_text=f"run {count}")).to_be_visible()


@pytest.mark.parametrize(("width", "height"), WINDOWS)
def test_the_mask_lies_where_one_points(page: Page, width: int, height: int) -> None:
    page.set_viewport_size({"width": width, "height": height})
    with_history(page, 1)
    page.locator(".tile").first.click()
    page.locator("#tool-mask summary").click()
    page.get_by_role("slider", name="Brush").fill("6")
    image = page.locator("#large").bounding_box()
    assert image
    assert image["y"] >= 0
    assert image["y"] + image["height"] <= height  # what is painted on is in view
    side = min(image["width"], image["height"])  # a square image, in the middle of its box
    left, top = image["x"] + (image["width"] - side) / 2, image["y"] + (image["height"] - side) / 2
    page.mouse.click(left + side / 4, top + side / 4)
    alpha = pixels(page.locator("#mask"))[3::4]
    places = [divmod(i, 64) for i, a in enumerate(alpha) if a > 64]
    assert places
    for at in zip(*places, strict=True):
        assert 0.23 < (sum(at) / len(at) + 0.5) / 64 < 0.27
    assert painted(page.locator("#mask")) < 0.01


def test_a_long_history_opens_with_its_newest_rows_and_goes_on_as_one_scrolls(page: Page) -> None:
    with_history(page, RUNS)
    assert 0 < page.locator("article").count() <= 2 * PAGE  # one more page may lie within the margin
    for _ in range(RUNS):
        if page.locator("article").count() == RUNS:
            break
        page.locator("article").last.scroll_into_view_if_needed()
        page.wait_for_timeout(50)
    titles = page.locator("article h3").all_text_contents()
    assert titles == [f"run {id}" for id in range(RUNS, 0, -1)]


def test_what_is_deleted_can_be_brought_back_where_it_was(page: Page) -> None:
    with_history(page, 3)
    row = page.locator("article", has=page.locator("h3", has_text="run 2"))  # a role is not found outside the window
    row.get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(row.locator("img")).to_have_count(4)
    page.wait_for_timeout(500)
    assert page.locator("article h3").all_text_contents() == ["run 3", "run 2", "run 1"]
    page.reload()
    expect(row.locator("img")).to_have_count(4)

    row.locator(".tile").nth(1).click()
    page.locator("#tool-take summary").click()
    page.get_by_role("button", name="Delete this image").click()
    expect(row.locator("img")).to_have_count(3)
    page.reload()
    expect(row.locator("img")).to_have_count(3)

    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete all").click()
    page.reload()
    expect(page.locator("#empty")).to_be_visible()


def test_a_tile_of_a_large_image_shows_a_small_copy(page: Page) -> None:
    """Which is made when a row is kept: undoing a deletion keeps it again."""
    with_history(page, 1)
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("button", name="Undo").click()
    page.wait_for_timeout(500)
    page.reload()
    tiles = page.locator(".tile img")
    expect(tiles).to_have_count(4)
    for tile in tiles.all():
        tile.scroll_into_view_if_needed()
    assert tiles.evaluate_all("all => Promise.all(all.map(i => i.decode().then(() => i.naturalWidth)))") == [320] * 4
    tiles.first.click()
    assert page.locator("#large").evaluate("i => i.decode().then(() => i.naturalWidth)") == 1024
