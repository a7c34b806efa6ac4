"""A browser walks the built site over HTTP: every page of the navigation, its links, its search, and both schemes."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Literal
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml
from playwright.sync_api import Browser, expect

from tests.browser import Shown
from tests.site import ROOT, address, pages_of, prepare

pytestmark = pytest.mark.browser
CONFIGURATION = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
ADDRESSES = [address(place) for place in pages_of(CONFIGURATION["nav"])]
SCHEMES: dict[str, Literal["light", "dark"]] = {"default": "light", "slate": "dark"}
# Links and images of a page, and the names that links may end with.
LINKS = "[...document.querySelectorAll('a[href], img')].map(one => one.href || one.src)"
NAMES = "[...document.querySelectorAll('[id], a[name]')].map(one => one.id || one.name)"
PAINTED = "performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A tab that is closed ends its requests."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Builds the site as make site does, in a folder of its own, and returns the address that it is served at."""
    folder = tmp_path_factory.mktemp("site")
    prepare(folder / "docs")
    [handlers] = [plugin["mkdocstrings"]["handlers"] for plugin in CONFIGURATION["plugins"] if "search" not in plugin]
    handlers["python"]["paths"] = [str(ROOT)]
    configuration = CONFIGURATION | {"docs_dir": "docs", "site_dir": "site"}
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(configuration, sort_keys=False))
    command = [Path(sys.executable).with_name("zensical"), "build", "--config-file", folder / "mkdocs.yml"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    with Server(("127.0.0.1", 0), partial(Quiet, directory=str(folder / "site"))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def shown(browser: Browser) -> Iterator[Shown]:
    """One tab for all pages, as a reader has it."""
    tab = Shown(browser, "about:blank")
    yield tab
    tab.page.context.close()


@pytest.mark.parametrize("place", ADDRESSES)
def test_a_page_loads_from_its_host_alone_and_axe_finds_nothing(site: str, shown: Shown, place: str) -> None:
    """In light and in dark; and no page is wider than a phone."""
    page = shown.page
    shown.requested.clear()
    shown.complaints.clear()
    answer = page.goto(site + place)
    assert answer
    assert answer.status == 200
    for name, scheme in SCHEMES.items():
        page.emulate_media(color_scheme=scheme)
        expect(page.locator("body")).to_have_attribute("data-md-color-scheme", name)
        assert (scheme, shown.findings()) == (scheme, [])
    assert shown.complaints == []  # such as an answer of 404, or an error of a script
    assert [url for url in shown.requested if not url.startswith((site, "data:"))] == []
    page.set_viewport_size({"width": 360, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.set_viewport_size({"width": 1280, "height": 900})


def test_every_link_leads_to_a_page_and_to_a_place_on_it(site: str, shown: Shown) -> None:
    """Pages that show code are visited, too."""
    names: dict[str, set[str]] = {}
    links: dict[str, str] = {}  # and a page that has it
    waiting = [site + place for place in ADDRESSES]
    for url in waiting:
        answer = shown.page.goto(url, wait_until="domcontentloaded")
        assert answer
        assert answer.status == 200, f"{links.get(url)}: {url}"
        names[url] = set(shown.page.evaluate(NAMES))
        for link in shown.page.evaluate(LINKS):
            if link.startswith(site) and link not in links:
                links[link] = url
                target = urldefrag(link).url
                if target.endswith("/") and target not in waiting:
                    waiting.append(target)
    files = {urldefrag(link).url for link in links} - names.keys()
    assert [url for url in files if shown.page.request.get(url).status != 200] == []
    lost = {link: page for link, page in links.items() if (place := unquote(urlsplit(link).fragment))
            and place not in names.get(urldefrag(link).url, set())}  # fmt: skip
    assert lost == {}
    assert len(links) > 500


def test_a_word_is_searched_for_and_marked_on_its_page(site: str, shown: Shown) -> None:
    page = shown.page
    page.goto(site, wait_until="networkidle")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("combobox", name="Search").press_sequentially("quarantine")
    found = page.get_by_role("option")
    section = page.get_by_role("option", name="Damage", exact=True)
    expect(section).to_contain_text("quarantine")
    assert [text for text in found.all_inner_texts() if "quarantine" not in text.lower()] == []
    section.click()
    expect(page).to_have_url(f"{site}store/?h=quarantine#damage")
    expect(page.locator("article mark").first).to_have_text("quarantine")


def test_the_button_goes_from_the_systems_scheme_to_light_to_dark_and_a_page_keeps_it(site: str, shown: Shown) -> None:
    page = shown.page
    page.emulate_media(color_scheme="dark")
    page.goto(site, wait_until="networkidle")
    body = page.locator("body")
    expect(body).to_have_attribute("data-md-color-scheme", "slate")
    for title, scheme in (("Light", "default"), ("Dark", "slate")):
        page.get_by_title(title, exact=True).click()
        expect(body).to_have_attribute("data-md-color-scheme", scheme)
        page.emulate_media(color_scheme="light")  # what the system says counts no more
    page.goto(f"{site}start/")
    expect(body).to_have_attribute("data-md-color-scheme", "slate")
    page.get_by_title("As the system", exact=True).click()
    expect(body).to_have_attribute("data-md-color-scheme", "default")


def test_every_page_shows_something_at_once(browser: Browser, site: str) -> None:
    """With an empty cache. How soon is printed, and no test's matter: ``pytest -rP``."""
    paints = {}
    for place in ADDRESSES:
        tab = Shown(browser, site + place)
        tab.page.wait_for_function(f"{PAINTED}.length")
        [paints[place]] = tab.page.evaluate(PAINTED)
        tab.page.context.close()
    slowest = max(paints, key=lambda place: paints[place])
    median = sorted(paints.values())[len(paints) // 2]
    print(f"first contentful paint: median {median:.0f} ms, at most {paints[slowest]:.0f} ms ({slowest or 'home'})")
