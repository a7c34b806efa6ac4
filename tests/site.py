"""Prepares the pages of the site, which ``make site`` builds: ``python -m tests.site build/docs``.

A line such as ``[Fields of RaySettings](../pipeline/settings.py)`` becomes the table of that class: who reads the file
without a site is led to the code that the table is made from. Links to code lead to pages that show it.
"""

import argparse
import importlib
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from jobs.command_line import command_line, leaves
from pipeline.ledger import REASONS
from tests.reference import table, written

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    ROOT / "README.md": "index.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    **{file: file.relative_to(DOCS).as_posix() for file in sorted(DOCS.rglob("*")) if file.is_file()},
}
MARKER = re.compile(r"^\[(Fields|Table|Reference) of ([\w., ]+)\]\(([^)]+)\)$", re.MULTILINE)
LINK = re.compile(r"(?<!\\)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```[\s\S]*?^```$|^ {4}.*$", re.MULTILINE)
FILM = re.compile(r"(!\[[^\]]*\]\([^)\s]+\.svg\))(?!{)")
MATH = re.compile(r"^```math\n([\s\S]*?)^```$", re.MULTILINE)


def generated(kind: str, names: str) -> str:
    """Returns what takes the place of a marker."""
    if kind == "Reference":
        return reference(names)
    return {"reasons": reason_table, "commands": command_tables}.get(names, lambda: table(names.split(", ")))()


def reason_table() -> str:
    """Returns the table of the reasons for which a row is rejected or deferred."""
    return written([["reason", "means"], ["---"] * 2, *([f"`{reason}`", text] for reason, text in REASONS.items())])


def command_tables() -> str:
    """Returns a section for each command, after a table of the words that many commands share."""
    rows = {parser: command_words(parser) for parser in leaves(command_line(["run"]))}
    shared = [row for row, uses in Counter(row for each in rows.values() for row in each).items() if uses > 3]
    text = section("Common options", "", shared)
    for parser, own in rows.items():
        common = ", ".join(row[0].split(" ")[0].rstrip(",") for row in own if row in shared)
        lead = (parser.description or "") + (f" Takes {common}." if common else "")
        text += section(parser.prog, lead, [row for row in own if row not in shared])
    return text


def command_words(parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    """Returns the words that a command takes, each with its help."""
    words = []
    for action in parser._actions:
        if action.help and action.dest != "help" and action.help != argparse.SUPPRESS:
            shown = ", ".join(f"`{word}`" for word in action.option_strings) or f"`{action.metavar or action.dest}`"
            if action.option_strings and action.nargs != 0:
                shown += f" {action.metavar or '|'.join(map(str, action.choices or [action.dest.upper()]))}"
            words.append((shown.replace("|", "\\|"), str(action.help).replace("|", "\\|").replace("%%", "%")))
    return words


def section(title: str, lead: str, rows: list[tuple[str, str]]) -> str:
    """Returns a heading, a line and a table of words, if there are any."""
    table = written([["word", "meaning"], ["---"] * 2, *map(list, rows)]) if rows else ""
    return f"### {title}\n\n{lead}\n\n{table}\n"


def reference(module: str) -> str:
    """Returns directives that render the docstrings of a module's public names, or of the classes that it declares."""
    names = importlib.import_module(module)
    own = [name for name, thing in vars(names).items() if getattr(thing, "__module__", "") == module and name[0] != "_"]
    found = ""
    for name in getattr(names, "__all__", [name for name in own if isinstance(vars(names)[name], type)]):
        thing = getattr(names, name)
        if callable(thing):
            found += f"::: {thing.__module__}.{thing.__qualname__}\n    options:\n      heading_level: 3\n\n"
    return found


def prepared(source: Path, text: str) -> str:
    """Returns the text of a page as the site has it."""
    text = MARKER.sub(lambda found: generated(found[1], found[2]), text)
    text = MATH.sub(lambda found: formula(found[1]), text)
    text = FILM.sub(r"\1{ loading=lazy }", text)  # a recording takes a browser most of a second: text is painted first
    kept, parts = 0, []
    for found in FENCE.finditer(text):
        parts += [LINK.sub(lambda link: moved(source, link), text[kept : found.start()]), found[0]]
        kept = found.end()
    return "".join([*parts, LINK.sub(lambda link: moved(source, link), text[kept:])])


def formula(latex: str) -> str:
    """Returns a formula as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    return f'<div class="formula">{convert(" ".join(latex.split()), display="block")}</div>'


def moved(source: Path, link: re.Match[str]) -> str:
    """Returns a link between files of the repository as one between pages of the site."""
    path, _, anchor = link[2].partition("#")
    if not path or path.startswith(("http://", "https://", "mailto:")):
        return link[0]
    target = Path(os.path.normpath(source.parent / path))
    if target not in PAGES and not target.is_file():
        return link[1]  # a folder of the code
    place = PAGES.get(target) or f"code/{target.relative_to(ROOT).as_posix()}.md"
    here = Path(PAGES[source]).parent
    return f"[{link[1]}]({os.path.relpath(place, here)}{'#' if anchor else ''}{anchor})"


def shown_files(source: Path, text: str) -> Iterator[Path]:
    """Yields the files of the code that a page links to."""
    for link in LINK.finditer(MARKER.sub("", text)):
        target = Path(os.path.normpath(source.parent / link[2].partition("#")[0]))
        if target.is_file() and target not in PAGES:
            yield target


def code_page(file: Path) -> str:
    """Returns a page that shows a file, and that the search leaves out."""
    language = {".py": "python", ".yaml": "yaml", ".json": "json"}.get(file.suffix, "text")
    name = file.relative_to(ROOT).as_posix()
    return f"---\ntitle: {name}\nsearch:\n  exclude: true\n---\n\n# {name}\n\n````{language}\n{file.read_text()}````\n"


def pages_of(part: Any) -> list[str]:
    """Returns the pages of a part of the navigation, in order."""
    if isinstance(part, str):
        return [part]
    return [page for below in (part.values() if isinstance(part, dict) else part) for page in pages_of(below)]


def address(place: str) -> str:
    """Returns the address of a page below that of the site, which is empty for the first one."""
    return re.sub(r"(?:^|(?<=/))(?:index|README)/$", "", f"{place.removesuffix('.md')}/")


def outline() -> str:
    """Returns llms.txt, as https://llmstxt.org has it: every page with its first sentence, by section."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    sources = {place: source for source, place in PAGES.items()}
    text = f"# {site['site_name']}\n\n> {site['site_description']}\n"
    for section in site["nav"]:
        text += f"\n## {next(iter(section))}\n\n"
        for place in pages_of(section):
            title, lead = sources[place].read_text().split("\n\n", 2)[:2]
            sentence = re.split(r"(?<=[.?!]) ", LINK.sub(r"\1", " ".join(lead.split())))[0]
            text += f"- [{title.removeprefix('# ')}]({address(place) or './'}): {sentence}\n"
    return text


def prepare(folder: Path) -> None:
    """Writes all pages, and what they show, into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    files: set[Path] = set()
    for source, place in PAGES.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix != ".md":
            shutil.copyfile(source, target)
            continue
        text = source.read_text()
        target.write_text(prepared(source, text))
        files.update(shown_files(source, text))
    (folder / "llms.txt").write_text(outline())
    for file in sorted(files):
        target = folder / f"code/{file.relative_to(ROOT).as_posix()}.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(code_page(file))


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
