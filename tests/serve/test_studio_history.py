"""The studio's layout and its history, in Chromium; next to nothing is drawn."""

import zipfile

import pytest
from playwright.sync_api import Page, expect

from tests.serve.studio import draw, painted, pixels, with_history

pytestmark = pytest.mark.browser
WINDOWS = [(1280, 800), (768, 1024), (768, 800), (800, 600), (390, 844), (360, 640)]
PAGE, RUNS = 8, 100  # runs that are shown at once, and that are kept


@pytest.mark.parametrize(("width", "height"), WINDOWS)
def test_the_mask_lies_where_one_points(studio: Page, width: int, height: int) -> None:
    studio.set_viewport_size({"width": width, "height": height})
    with_history(studio, 1)
    studio.locator(".tile").first.click()
    expect(studio.locator("#large")).to_be_visible()  # its tools are in place
    studio.locator("#tool-mask summary").click()
    expect(studio.locator("#mask")).to_be_visible()
    studio.get_by_role("slider", name="Brush").fill("6")
    image = studio.locator("#large").bounding_box()
    assert image
    assert image["y"] >= 0
    assert image["y"] + image["height"] <= height  # what is painted on is in view
    side = min(image["width"], image["height"])  # a square image, in the middle of its box
    left, top = image["x"] + (image["width"] - side) / 2, image["y"] + (image["height"] - side) / 2
    studio.mouse.click(left + side / 4, top + side / 4)
    alpha = pixels(studio.locator("#mask"))[3::4]
    places = [divmod(i, 64) for i, a in enumerate(alpha) if a > 64]
    assert places
    for at in zip(*places, strict=True):
        assert 0.23 < (sum(at) / len(at) + 0.5) / 64 < 0.27
    assert painted(studio.locator("#mask")) < 0.01


def test_a_long_history_opens_with_its_newest_rows_and_goes_on_as_one_scrolls(studio: Page) -> None:
    with_history(studio, RUNS)
    assert 0 < studio.locator("article").count() <= 2 * PAGE  # one more page may lie within the margin
    for _ in range(RUNS):
        if studio.locator("article").count() == RUNS:
            break
        studio.locator("article").last.scroll_into_view_if_needed()
        studio.wait_for_timeout(50)
    titles = studio.locator("article h3").all_text_contents()
    assert titles == [f"run {id}" for id in range(RUNS, 0, -1)]


def test_favourites_outlive_the_rows_beside_them(studio: Page) -> None:
    with_history(studio, RUNS)
    studio.evaluate(
        "new Promise(done => { const asked = indexedDB.open('unclip-studio', 1); asked.onsuccess = () => {"
        "const change = asked.result.transaction('runs', 'readwrite'), table = change.objectStore('runs');"
        "table.get(1).onsuccess = e => { e.target.result.items[2].favourite = true; table.put(e.target.result); };"
        "change.oncomplete = done; }; })"
    )
    studio.reload()
    button = studio.get_by_role("button", name="Download 1 favourite")
    expect(button).to_be_visible()  # of a row that is not shown yet
    studio.locator("#settings summary").click()
    studio.locator("#sizes").get_by_text("64 px").click()
    draw(studio)
    draw(studio)  # the rows 1 and 2 are now too many
    studio.wait_for_timeout(500)
    studio.reload()
    kept = studio.evaluate(
        "new Promise(done => { const asked = indexedDB.open('unclip-studio', 1); asked.onsuccess = () => {"
        "const table = asked.result.transaction('runs').objectStore('runs');"
        "table.getAllKeys().onsuccess = e => done(e.target.result); }; })"
    )
    assert kept[:2] == [1, 3]
    with studio.expect_download() as downloading:
        button.click()
    with zipfile.ZipFile(downloading.value.path()) as files:
        assert files.namelist() == ["run-1-2.png"]
    studio.on("dialog", lambda dialog: dialog.accept())
    studio.get_by_role("button", name="Delete all").click()
    expect(button).to_be_hidden()


def test_what_is_deleted_can_be_brought_back_where_it_was(studio: Page) -> None:
    with_history(studio, 3)
    row = studio.locator(
        "article", has=studio.locator("h3", has_text="run 2")
    )  # a role is not found outside the window
    row.get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)
    studio.get_by_role("button", name="Undo").click()
    expect(row.locator("img")).to_have_count(4)
    studio.wait_for_timeout(500)
    assert studio.locator("article h3").all_text_contents() == ["run 3", "run 2", "run 1"]
    studio.reload()
    expect(row.locator("img")).to_have_count(4)

    row.locator(".tile").nth(1).click()
    studio.locator("#tool-take summary").click()
    studio.get_by_role("button", name="Delete this image").click()
    expect(row.locator("img")).to_have_count(3)
    studio.wait_for_timeout(500)
    studio.reload()
    expect(row.locator("img")).to_have_count(3)

    studio.on("dialog", lambda dialog: dialog.accept())
    studio.get_by_role("button", name="Delete all").click()
    studio.wait_for_timeout(500)
    studio.reload()
    expect(studio.locator("#empty")).to_be_visible()


def test_a_tile_of_a_large_image_shows_a_small_copy(studio: Page) -> None:
    """Which is made when a row is kept: undoing a deletion keeps it again."""
    with_history(studio, 1)
    studio.get_by_role("button", name="Delete", exact=True).click()
    studio.get_by_role("button", name="Undo").click()
    studio.wait_for_timeout(500)
    studio.reload()
    tiles = studio.locator(".tile img")
    expect(tiles).to_have_count(4)
    for tile in tiles.all():
        tile.scroll_into_view_if_needed()
    assert tiles.evaluate_all("all => Promise.all(all.map(i => i.decode().then(() => i.naturalWidth)))") == [320] * 4
    tiles.first.click()
    assert studio.locator("#large").evaluate("i => i.decode().then(() => i.naturalWidth)") == 1024
