"""What pages of the documentation and the notebook hold: commands, links, tables."""

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.command_line import command_line
from pipeline.errors import UserError
from tests.chain import MICRO, ROOT


def tables(text: str) -> Iterator[dict[str, str]]:
    """Every row of the tables in a text, by the heads of its columns."""
    head: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            head = []
        elif not head:
            head = cells
        elif not set(cells[0]) <= {"-"}:
            yield dict(zip(head, cells, strict=True))


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """Commands on indented lines, of which several may stand on one and one on several, and between backticks."""
    text = text.replace("\\\n", " ")
    for line in re.findall(r"^    ((?:unclip|make|python examples/)(?!  ).*)$", text, flags=re.MULTILINE):
        for part in re.split(r"\|\||&&|[{};]", line.partition(" #")[0]):
            if part.strip():
                yield part.partition(">")[0].strip(), True
    for command in re.findall(r"`((?:unclip|make) [^`]+)`", text):
        yield command, False


def check_commands(document: Path, text: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command, whole in commands(text):
        program, *words = shlex.split(command, comments=True)
        if program == "make":
            assert f"\n{words[0]}:" in makefile, f"{document.name}: {command}"
        elif program == "unclip":
            taken(words, whole, f"{document.name}: {command}")


def taken(words: list[str], whole: bool, where: str) -> None:
    """Fails unless the command line takes these words, or knows the command that they begin with."""
    parser = command_line(words)
    if whole and not {"help", "--help"} & set(words):
        try:
            parser.parse_args(words)
        except (SystemExit, UserError) as e:
            pytest.fail(f"{where}: {e}")
        return
    for word in words:
        below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not below or word in ("help", "--help"):
            break
        assert word in below[0].choices, where
        parser = below[0].choices[word]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def check_links(document: Path, text: str) -> None:
    """Every link that is no URL leads to a file or a folder, and to a heading of it if it names one."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if not path.startswith(("http://", "https://")):
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name}: {link}"
            assert not anchor or anchor in anchors(target.read_text()), f"{document.name}: {link}"


def small(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that runs in seconds."""
    short = {"samples": 16, "batch": 8, "warmup_steps": 0}
    models = ["ar_prior", "diffusion_prior", "decoder"]
    sampling = {"size": 64, "prior_steps": 2, "decoder_steps": 2}
    return {
        **config,
        "preset": "nano",
        "bundle": {"models": models, "sampling": sampling},
        "samples": {"captions": ["a red heart"]},
        **dict.fromkeys(("clip", "ar_prior", "diffusion_prior", "decoder"), short),
        "run": {**MICRO["run"], "output": f"out/{config['project']}"},
    }


NOTEBOOK = ROOT / "docs/notebook.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]


def of_type(kind: str) -> dict[str, str]:
    """The text of each cell of this type, by its id, in order."""
    return {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == kind}
