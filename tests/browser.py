"""Chromium without a window, pages as it shows them, and what axe-core finds wrong with those."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

QUIET = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync")


@contextmanager
def chromium() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    assert executable, "chromium is not on PATH: apt-get install chromium, or run make test without make test-browser"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(QUIET))
        yield browser
        browser.close()


class Shown:
    """A page, a file or an address, as it is loaded, what was asked for and what was complained about meanwhile."""

    def __init__(
        self,
        browser: Browser,
        page: Path | str,
        width: int = 1280,
        script: bool = True,
        scheme: Literal["light", "dark"] = "light",
    ):
        self.requested: list[str] = []
        self.complaints: list[str] = []
        context = browser.new_context(
            viewport={"width": width, "height": 900}, java_script_enabled=script, color_scheme=scheme
        )
        self.page: Page = context.new_page()
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(page.as_uri() if isinstance(page, Path) else page)

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def findings(self, unfold: bool = True) -> list[str]:
        """What axe-core finds, of any gravity, with all details open: what is folded away it does not look at."""
        if unfold:
            self.page.evaluate("document.querySelectorAll('details:not(.zoom)').forEach(part => { part.open = true; })")
        found = Axe().run(self.page).response["violations"]
        return [f"{rule['impact']}: {rule['id']} at {node['target']}" for rule in found for node in rule["nodes"]]
