"""The studio by its buttons, in Chromium, on a real server: what it draws, keeps, says, and lets one take along."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from pipeline.sampling.drawing import png_with_text
from pipeline.sampling.recipe import read_recipe
from serve.settings import ServeSettings
from tests.asgi import running
from tests.browser import Shown
from tests.pipeline.data.bench import Bench, picture
from tests.serve.studio import CAPTION, ask, done, draw, open_studio, painted, pixels, with_history
from tests.serve.trained import api_of

pytestmark = pytest.mark.browser


def test_four_candidates_come_smallest_first_with_their_scores(studio: Page) -> None:
    studio.evaluate(
        "window.seen = []; new MutationObserver(() => document.querySelectorAll('.tile span, .going span').forEach("
        "s => window.seen.push(s.textContent))).observe(document.body, {childList: true, subtree: true})"
    )
    run = draw(studio)
    assert run.locator("h3 b").count() == 0  # a caption is text
    scores = [float(text.split()[1].removesuffix("nearest")) for text in run.locator(".tile span").all_inner_texts()]
    assert len(scores) == 4
    assert [text for text in run.locator(".tile").all_inner_texts() if "nearest" in text] == [
        f"score {max(scores):.3f}\nnearest"
    ]
    seen = studio.evaluate("window.seen")
    assert "16 px so far" in seen
    assert {"imagining it", "drawing 64 px"} <= set(seen)


def test_it_draws_before_it_knows_the_model(browser: Browser, server: str) -> None:
    """Which a process that starts tells late."""
    shown = Shown(browser, "about:blank")
    page = shown.page
    page.route("**/v1/models", lambda _: None)
    page.goto(f"{server}/")
    ask(page)
    run = page.locator("article", has=page.get_by_role("heading", name=CAPTION, exact=True))
    expect(run).to_contain_text("drawn · 256 px")
    assert shown.complaints == []
    page.context.close()


def test_a_picture_is_taken_along_with_its_recipe(studio: Page, tmp_path: Path) -> None:
    studio.context.grant_permissions(["clipboard-read", "clipboard-write"])
    draw(studio).locator(".tile").nth(1).click()
    viewer = studio.locator("#viewer")
    viewer.locator("#tool-take summary").click()
    with studio.expect_download() as downloading:
        viewer.locator("#download").click()
    drawn = Path(downloading.value.path())
    assert downloading.value.suggested_filename.startswith("a-red-fox-s-b-tail-b-")
    with Image.open(drawn) as image:
        recipe = dict(image.info)
    shown = json.loads(studio.inner_text("#recipe"))
    assert (recipe["caption"], int(recipe["seed"])) == (CAPTION, shown["seed"])
    for what in ("Python", "command"):
        viewer.get_by_role("button", name=f"Copy as {'a ' * (what == 'command')}{what}").click()
        expect(studio.locator("#copied")).to_have_text("Copied.")
        text = studio.evaluate("navigator.clipboard.readText()")
        words: Any = [sys.executable, "-c", text] if what == "Python" else ["bash", "-c", text]
        to = tmp_path / what
        to.mkdir()
        subprocess.run(words, cwd=to, env={**os.environ, "NO_PROXY": "*"}, check=True, timeout=100)
        [made] = to.iterdir()
        assert made.read_bytes() == drawn.read_bytes()


def test_a_dropped_picture_gives_its_recipe_back(studio: Page) -> None:
    studio.locator("[name=guidance]").fill("2")
    draw(studio).locator(".tile").nth(2).click()
    studio.locator("#tool-take summary").click()
    with studio.expect_download() as downloading:
        studio.locator("#download").click()
    seed = json.loads(studio.inner_text("#recipe"))["seed"]
    before = studio.locator("#large").evaluate("i => i.naturalWidth")
    studio.keyboard.press("Escape")
    studio.reload()
    buffer = Path(downloading.value.path()).read_bytes()
    studio.locator("#own").set_input_files({"name": "fox.png", "mimeType": "image/png", "buffer": buffer})
    expect(studio.locator("#adopted")).to_contain_text("is in the form.")
    assert "Another model" not in studio.inner_text("#adopted")
    expect(studio.get_by_label("What shall I draw?")).to_have_value(CAPTION)
    assert [studio.locator(f"#{name}").input_value() for name in ("guidance", "seed", "n")] == [
        "2",
        str(seed),
        "1",
    ]
    assert studio.locator("[name=size]:checked").input_value() == f"{before}x{before}"
    studio.get_by_role("button", name="Draw", exact=True).click()
    again = done(studio, CAPTION)
    old = studio.locator("article", has=studio.locator("h3", has_text=CAPTION)).last.locator("img").nth(2)
    apart = [abs(a - b) for a, b in zip(pixels(again.locator("img")), pixels(old), strict=True)]
    assert max(apart) <= 4  # rounding: it was drawn beside three others
    studio.locator("#own").set_input_files({"name": "mine.png", "mimeType": "image/png", "buffer": recipe("x", "{")})
    expect(studio.locator("#viewer").get_by_role("heading", name="mine")).to_be_visible()  # an image without a recipe


def recipe(caption: str, settings: str) -> bytes:
    return png_with_text(np.zeros((64, 64, 3), np.uint8), {"caption": caption, "seed": "1", "settings": settings})


def test_a_strangers_recipe_fills_in_what_the_page_takes_and_no_more(studio: Page) -> None:
    settings = json.dumps({"size": 77, "decoder_steps": 10**9, "decoder_guidance": "<b>", "prior": "<b>", "x": {}})
    file = {"name": "<b>a</b>.png", "mimeType": "image/png", "buffer": recipe("<b>" * 2000, settings)}
    steps = studio.locator("[name=steps]").input_value()
    studio.locator("#own").set_input_files(file)
    expect(studio.locator("#adopted")).to_contain_text("The recipe of <b>a</b>.png is in the form.")
    assert len(studio.get_by_label("What shall I draw?").input_value()) == 1000
    assert studio.locator("[name=steps]").input_value() == steps
    assert studio.locator("#adopted b, article b").count() == 0


def test_one_is_made_large_and_some_are_taken_as_a_zip(studio: Page) -> None:
    run = draw(studio)
    run.locator(".tile").nth(1).click()
    seed = studio.inner_text("#about").partition("seed ")[2].split()[0]
    studio.get_by_role("button", name="Make it 256 px").click()
    article = studio.locator("article", has_text="drawn · 256 px").first
    expect(article.get_by_role("button", name="Delete")).to_be_visible()
    article.locator(".tile").click()
    assert studio.locator("#large").evaluate("i => i.decode().then(() => i.naturalWidth)") == 256
    expect(studio.locator("#enlarge")).to_be_hidden()
    assert f"seed {seed} " in studio.inner_text("#about")
    studio.get_by_role("button", name="Favourite", exact=True).click()
    studio.keyboard.press("Escape")
    studio.locator("article").last.locator(".tile").first.click()  # of the four
    studio.get_by_role("button", name="Favourite", exact=True).click()
    studio.keyboard.press("Escape")
    studio.wait_for_timeout(500)
    studio.reload()  # it is kept
    with studio.expect_download() as downloading:
        studio.get_by_role("button", name="Download 2 favourites").click()
    with zipfile.ZipFile(downloading.value.path()) as files:
        assert files.testzip() is None
        sides = [Image.open(files.open(name)).size for name in files.namelist()]
        assert sorted(sides) == [(64, 64), (256, 256)]
        assert all(read_recipe(files.read(name), name).caption == CAPTION for name in files.namelist())


def test_a_list_is_drawn_caption_after_caption_until_it_is_stopped(browser: Browser, server: str) -> None:
    studio = open_studio(browser, server).page  # a refusal is an error in the browser's console, too
    captions = ["a blue house", "the sea " * 70, "a tree"]  # the second has too many words
    studio.locator("#n").fill("1")
    studio.get_by_label("What shall I draw?").fill("\n\n".join([*captions, " "]))
    studio.keyboard.press("Enter")
    expect(studio.locator("#listed")).to_have_text("All 3 captions are done.")
    assert studio.locator("article h3").all_inner_texts() == [text.strip() for text in captions[::-1]]
    assert studio.locator("article .tile img").count() == 2
    expect(studio.locator("article .problem:visible")).to_have_count(1)
    studio.locator("[name=steps]").fill("250")
    studio.locator("#sizes").get_by_text("256 px").click()  # long enough to be stopped, on any machine
    ask(studio, "a\nb\nc")
    studio.get_by_role("button", name="Stop").click()
    expect(studio.locator("#listed")).to_have_text("Ended at caption 1 of 3; those after it are not drawn.")
    assert studio.locator("article").count() == 4
    with_history(studio, 1)
    expect(studio.locator("article h3", has_text="the sea")).to_have_count(0)  # nothing was drawn of it
    studio.context.close()


def test_another_shape_is_cut_from_the_square_where_it_is_shown_and_downloaded(studio: Page) -> None:
    square = pixels(draw(studio).locator("img").first)
    studio.locator("#shapes").get_by_text("16:9").click()
    assert "16:9" in studio.inner_text("#summary")
    ask(studio)
    run = studio.locator("article", has_text="drawn · 64 × 36 px")
    expect(run.get_by_role("button", name="Delete")).to_be_visible()
    tile = run.locator("img").first.bounding_box()
    assert tile
    assert tile["width"] / tile["height"] == pytest.approx(16 / 9, rel=0.02)
    assert len(pixels(run.locator("img").first)) == len(square)  # what is kept is the square
    run.locator(".tile").first.click()
    assert "64 × 36 px · cut from the middle of a square" in studio.inner_text("#about")
    studio.locator("#tool-take summary").click()
    with studio.expect_download() as downloading:
        studio.locator("#download").click()
    data = Path(downloading.value.path()).read_bytes()
    whole = studio.locator("#large").evaluate("i => i.naturalWidth + ' ' + i.naturalHeight")
    with Image.open(downloading.value.path()) as image:
        assert (image.size, whole) == ((64, 36), "64 64")
        middle = np.array(pixels(studio.locator("#large"))).reshape(64, 64, 4)[14:50, :, :3]
        assert (np.asarray(image.convert("RGB")) == middle).all()
    assert read_recipe(data, "cut.png").caption == CAPTION
    studio.locator("#tool-mask summary").click()  # over all of the square
    expect(studio.locator("#mask")).to_be_visible()  # its "toggle" comes in a task of its own
    large, mask = studio.locator("#large").bounding_box(), studio.locator("#mask").bounding_box()
    assert large
    assert large == mask
    assert large["width"] == pytest.approx(large["height"], abs=1)
    assert "cut from" not in studio.inner_text("#about")
    studio.locator("#tool-vary summary").click()
    studio.get_by_role("button", name="Vary").click()
    expect(studio.locator("article", has_text="varied · 64 × 36 px")).to_be_visible()


def test_a_picture_is_varied_changed_by_words_and_blended_into_another(studio: Page) -> None:
    draw(studio, "a blue house")
    draw(studio).locator(".tile").first.click()
    viewer = studio.locator("#viewer")
    viewer.locator("#tool-vary summary").click()
    viewer.get_by_role("button", name="Vary").click()
    varied = done(studio, CAPTION, "varied")
    assert varied.locator(".tile img").count() == 4

    varied.locator(".tile").nth(2).click()
    viewer.locator("#tool-words summary").click()
    expect(viewer.get_by_label("Before")).to_have_value(CAPTION)
    viewer.locator("#tool-words").get_by_label("After").fill("a blue fox")
    viewer.get_by_role("button", name="Change").click()
    changed = done(studio, "a blue fox", "changed")
    assert changed.locator(".tile img").count() == 4

    changed.locator(".tile").first.click()
    viewer.locator("#tool-between summary").click()
    viewer.locator("#others").get_by_alt_text("a blue house, image 1 of 4").click()
    viewer.get_by_role("button", name="Blend").click()
    blended = done(studio, "a blue fox → a blue house", "blended")
    assert blended.locator(".tile img").count() == 5
    assert "score" not in blended.inner_text()  # they have no caption


def test_a_part_is_drawn_over_with_the_mouse_and_with_the_keyboard(studio: Page) -> None:
    draw(studio).locator(".tile").first.click()
    viewer, mask = studio.locator("#viewer"), studio.locator("#mask")
    viewer.locator("#tool-mask summary").click()
    over = viewer.get_by_role("button", name="Draw over")
    over.click()
    assert viewer.is_visible()  # nothing is painted yet
    box = mask.bounding_box()
    assert box
    studio.mouse.move(box["x"] + 9, box["y"] + 9)
    studio.mouse.down()
    studio.mouse.move(box["x"] + box["width"] / 2, box["y"] + 9)
    studio.mouse.up()
    by_mouse = painted(mask)
    mask.focus()
    for key in ("ArrowDown", "Shift+ArrowDown", "Space", "Space"):
        studio.keyboard.press(key)
    assert 0 < by_mouse < painted(mask) < 0.5
    over.click()
    done(studio, CAPTION, "changed")
    before, after = (pixels(studio.locator("article .tiles").nth(i).locator("img").first) for i in (1, 0))
    half = len(before) // 2
    assert before[:half] != after[:half]  # where it was painted
    assert before[half:] == after[half:]


def test_the_nearest_training_pictures_are_named_with_their_rights(studio: Page) -> None:
    studio.locator("#own").set_input_files({"name": "mine.png", "mimeType": "image/png", "buffer": picture(2)})
    viewer = studio.locator("#viewer")
    expect(viewer.get_by_role("heading", name="mine")).to_be_visible()
    viewer.get_by_text("Trained on", exact=True).click()
    first = viewer.locator("#learnt li").first
    expect(first).to_contain_text("image 2")
    expect(first).to_contain_text("alike · CC-BY 4.0")
    expect(first).to_contain_text("By 2")
    assert viewer.locator("#learnt li").count() == 3
    assert viewer.locator("#learnt img").evaluate_all("all => all.every(i => i.naturalWidth > 0)")


def test_a_picture_is_dropped_or_pasted(studio: Page) -> None:
    files = studio.evaluate_handle(
        "bytes => { const all = new DataTransfer(); all.items.add(new File([new Uint8Array(bytes)], 'mine.png', "
        "{type: 'image/png'})); return all; }",
        list(picture(2)),
    )
    for event in (
        "files => document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: files, bubbles: true}))",
        "files => document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: files, bubbles: true}))",
    ):
        studio.evaluate(event, files)
        expect(studio.locator("#viewer").get_by_role("heading", name="mine")).to_be_visible()
        studio.keyboard.press("Escape")
        studio.locator("article").get_by_role("button", name="Delete").click()


def test_a_place_in_line_is_shown_and_what_is_stopped_makes_room(studio: Page) -> None:
    studio.locator("[name=steps]").fill("250")
    studio.locator("#sizes").get_by_text("256 px").click()  # long enough to be stopped, on any machine
    for caption in ("a first one", "a second one", "a third one"):
        ask(studio, caption)
    waiting = studio.locator("article").first
    expect(waiting).to_contain_text("before yours")
    for _ in range(3):
        studio.get_by_role("button", name="Stop").first.click()  # of the newest: the one that is drawn comes last
    expect(studio.locator("article .problem:visible")).to_have_text(["Stopped."] * 3)
    studio.locator("[name=steps]").fill("2")
    studio.locator("#sizes").get_by_text("64 px").click()
    draw(studio)


def test_a_file_that_is_no_picture_is_named(studio: Page) -> None:
    studio.locator("#own").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(studio.get_by_role("alert")).to_have_text(
        "a.png is not an image that this browser can open: take a PNG, JPEG or WebP."
    )


def test_a_token_is_asked_for_and_a_refusal_is_said(browser: Browser, trained: Bench) -> None:
    tokens = {hashlib.sha256(b"a token of the server").hexdigest(): "somebody"}
    api = api_of(trained, ServeSettings(), trained.store.url, tokens)
    with running(api) as url:
        page = open_studio(browser, url).page
        ask(page)
        expect(page.get_by_role("heading", name="A token, please")).to_be_visible()
        page.keyboard.press("Escape")  # leaves it, once and for all
        expect(page.locator("article .problem:visible")).to_have_text("This server wants a token.")
        page.get_by_label("What shall I draw?").press("Enter")
        for token in ("a wrong one\u200b", "a token of the server"):
            expect(page.get_by_role("heading", name="A token, please")).to_be_visible()
            page.get_by_label("Token", exact=True).fill(token)
            page.keyboard.press("Enter")
        expect(page.locator("article .problem").first).to_have_text("nothing is drawn here, draw least of all")
        page.reload()
        ask(page)
        expect(page.locator("article .problem")).to_be_visible()
    page.keyboard.press("Enter")
    expect(page.locator("article .problem").first).to_have_text("The server does not answer: is it still running?")


def test_the_keyboard_does_everything(studio: Page) -> None:
    draw(studio)
    keys = studio.keyboard
    studio.get_by_label("What shall I draw?").focus()
    for _ in range(30):
        keys.press("Tab")
        if studio.evaluate("document.activeElement.className") == "tile":
            break
    keys.press("Enter")
    expect(studio.locator("#viewer")).to_be_visible()
    assert studio.evaluate("document.activeElement.closest('dialog').id") == "viewer"
    before = studio.get_attribute("#large", "alt")
    keys.press("ArrowRight")
    assert studio.get_attribute("#large", "alt") != before
    keys.press("Escape")
    expect(studio.locator("#viewer")).to_be_hidden()
    assert studio.evaluate("document.activeElement.className") == "tile"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_nothing_is_wrong_with_it(browser: Browser, server: str, width: int, scheme: Literal["light", "dark"]) -> None:
    shown = open_studio(browser, server, width, scheme)
    run = draw(shown.page)
    assert shown.findings() == []
    assert shown.page.evaluate("document.documentElement.scrollWidth") == width
    run.locator(".tile").first.click()
    for tool in shown.page.locator("#viewer summary").all():
        tool.click()
        assert shown.page.evaluate("document.querySelector('#viewer').scrollWidth") <= width
        assert shown.findings(unfold=False) == []
    assert shown.complaints == []
