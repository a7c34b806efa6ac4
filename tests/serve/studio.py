"""The studio in a browser, and what its tests do with it."""

from typing import Literal

from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser import Shown

expect.set_options(timeout=60_000)
CAPTION = "a red fox's <b>tail</b>"


def open_studio(browser: Browser, server: str, width: int = 1280, scheme: Literal["light", "dark"] = "light") -> Shown:
    shown = Shown(browser, f"{server}/", width, scheme=scheme)
    expect(shown.page.locator("#server")).to_contain_text("up to 256 px, on a CPU")
    shown.page.locator("#settings summary").click()
    shown.page.locator("#sizes").get_by_text("64 px").click()
    return shown


def ask(page: Page, caption: str = CAPTION) -> None:
    page.get_by_label("What shall I draw?").fill(caption)
    page.keyboard.press("Enter")


def draw(page: Page, caption: str = CAPTION) -> Locator:
    """Draws a caption, and returns the run when it is done."""
    ask(page, caption)
    return done(page, caption)


def done(page: Page, title: str, how: str = "drawn") -> Locator:
    """Returns the newest run of a title, when all of it is there."""
    run = page.locator("article", has=page.get_by_role("heading", name=title, exact=True)).first
    expect(run).to_contain_text(f"{how} · 64 px")
    expect(run.get_by_role("button", name="Delete")).to_be_visible()
    expect(run.locator(".problem")).to_be_hidden()
    return run


def pixels(source: Locator) -> list[int]:
    """The RGBA of a picture, or of what is painted over it, at 64 px."""
    return source.evaluate(
        "s => { const x = Object.assign(document.createElement('canvas'), {width: 64, height: 64})"
        ".getContext('2d', {willReadFrequently: true});"
        "x.drawImage(s, 0, 0, 64, 64); return [...x.getImageData(0, 0, 64, 64).data]; }"
    )


def painted(mask: Locator) -> float:
    """The share of the picture that is painted."""
    return sum(alpha > 127 for alpha in pixels(mask)[3::4]) / 64**2


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


def with_history(studio: Page, count: int) -> None:
    studio.evaluate(EARLIER, count)
    studio.reload()
    expect(studio.locator("h3", has_text=f"run {count}")).to_be_visible()
