"""docs/retrain.md as it stands: its configuration, its commands month by month, and what it says that they print."""

import csv
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.project import open_project
from pipeline.data.source.drawings.listing import drawing_rows
from pipeline.graph.artifacts import Artifact, load_artifact, read_shards
from pipeline.parse import overlay
from pipeline.release.compare import evaluations
from pipeline.release.pointer import read_releases
from pipeline.store import Store
from tests.chain import ROOT, keys, open_at, shard_paths, unclip
from tests.seaweed import Server

PAGE = (ROOT / "docs/retrain.md").read_text()
MONTHS = {"january": slice(144), "february": slice(144, 288), "march": slice(288, 352)}
SHARD_ROWS = 40
# Settings, which move no key. On one thread sums have the same order, and so the models the same bits, on any number of
# cores.
RUN = {name: {"workers": 0} for name in ("pairs", "filter", "embeddings", "curation", "index")}
RUN |= {name: {"threads": 1} for name in ("clip", "diffusion_prior", "decoder")}


def section(title: str) -> str:
    """The text below a heading that begins so."""
    (found,) = re.findall(rf"^## {title}.*\n((?:(?!## ).*\n?)*)", PAGE, flags=re.MULTILINE)
    return found


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Commands on indented lines, each with the lines below it that it is said to print."""
    for block in re.findall(r"(?:^    .*\n)+", text, flags=re.MULTILINE):
        for part in re.split(r"^    (?=unclip )", block, flags=re.MULTILINE)[1:]:
            command, *printed = part.splitlines()
            yield command, [line.strip() for line in printed]


def plain(line: str) -> str:
    """A line without what differs from machine to machine: keys, times, what was measured, the width of columns."""
    line = re.sub(r"\b[0-9a-f]{12}([0-9a-f]{52})?\b", "KEY", line)
    line = re.sub(r"\d+ h \d\d min|\d+ min \d\d s|\b\d+ s\b", "TIME", line)
    line = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "DATE", line)
    return " ".join(re.sub(r"[+-]?\b\d+\.\d+\b", "NUMBER", line).split())


def follow(text: str, folder: Path) -> dict[str, str]:
    """Run the commands of a section in a folder and return what each printed; their word KEY is that of the last CLIP
    which one of them made.

    Everything that the page says they print must be among it in that order; ``...`` stands for lines, or for the end of
    one, that are left out.
    """
    said, key = {}, ""
    for command, printed in commands(text):
        process = unclip(*shlex.split(command.replace("KEY", key))[1:], cwd=folder, timeout=1200)
        said[command] = process.stdout
        key = next(iter(re.findall(r"^clip done: (\w+)", process.stdout, flags=re.MULTILINE)), key)
        refused = any(line.startswith("error: ") for line in printed)
        assert (process.returncode != 0) == refused, f"{command}\n{process.stdout}\n{process.stderr}"
        lines = iter([plain(line) for line in (process.stdout + "\n" + process.stderr).splitlines()])
        for line in printed:
            if line != "...":
                wanted = plain(line.removesuffix("..."))
                found = any(got.startswith(wanted) if line.endswith("...") else got == wanted for got in lines)
                assert found, f"{command}\nnot printed: {line}\n{process.stdout}\n{process.stderr}"
    return said


@dataclass
class Monthly:
    """The project of the page: its configuration grows as the page says."""

    folder: Path
    values: dict[str, Any]
    said: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        return open_at(self.values["store"])

    def month(self, name: str, **changes: Any) -> None:
        """Append a month's list, then do what the page says of it."""
        self.values = overlay(self.values, changes)
        self.values["source"]["paths"].append(f"{name}.csv")
        (self.folder / "monthly.yaml").write_text(yaml.safe_dump(self.values))
        self.said |= follow(section(name.capitalize()), self.folder)

    def made(self, stage: str) -> Artifact:
        """The artefact of a stage as the plan has it now."""
        key = next(v.key for v in self.plan().plan() if v.stage == stage)
        artifact = load_artifact(self.store, stage, key)
        assert artifact is not None
        return artifact

    def plan(self) -> Any:
        return open_project(str(self.folder / "monthly.yaml"), ())


def write_months(folder: Path) -> None:
    """Lists of drawings; the captions of February have slipped by one row."""
    rows = drawing_rows("nano-more")
    for month, part in MONTHS.items():
        captions = [row.captions[0] for row in rows[part]]
        if month == "february":
            captions = captions[1:] + captions[:1]
        with open(folder / f"{month}.csv", "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(("url", "caption", "group"))
            writer.writerows((row.url, caption, row.group) for row, caption in zip(rows[part], captions, strict=True))
        (folder / f"{month}.txt").write_text("".join(f"{row.url}\n" for row in rows[part]))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_three_months_one_of_them_bad_and_the_release_moves_twice(
    tmp_path: Path, pictures: str, s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # lists are named as the page names them
    write_months(tmp_path)
    (text,) = re.findall(r"(?:^    .*\n)+", section("The configuration"), flags=re.MULTILINE)
    values = yaml.safe_load(text)
    assert values["source"]["paths"].pop() == "january.csv"
    assert values["source"]["shard_rows"] == SHARD_ROWS
    own = {
        "store": f"{s3.url}/monthly-{os.getpid()}",
        "run": overlay(RUN, {"pairs": {"hosts": {"drawings.test": pictures}}}),
    }
    monthly = Monthly(tmp_path, overlay(values, own))

    monthly.month("january")
    store, first = monthly.store, monthly.made("bundle")
    pairs, embedded = shard_paths(store, "pairs"), shard_paths(store, "embeddings")
    assert read_releases(store, "monthly").current.bundle == first.key
    begin = yaml.safe_load(monthly.said["unclip release weights monthly.yaml"])
    assert begin.keys() == {"diffusion_prior", "decoder"}

    monthly.month("february", **begin)
    (bad,) = keys(store)["bundle"] - {first.key}
    assert read_releases(store, "monthly").current.bundle == first.key
    # What was there is not fetched or embedded again: 144 rows are 4 shards.
    assert len(shard_paths(store, "pairs") - pairs) == len(shard_paths(store, "embeddings") - embedded) == 4
    assert pairs < shard_paths(store, "pairs")

    pairs = shard_paths(store, "pairs")
    monthly.month("march")
    last = monthly.made("bundle")
    moves = read_releases(store, "monthly").moves
    assert [(move.action, move.bundle, move.failed) for move in moves] == [
        ("promote", first.key, ()), ("promote", last.key, ()),
    ]  # fmt: skip
    # The 4 shards that hold forgotten rows alone, and the 2 of March.
    assert len(shard_paths(store, "pairs") - pairs) == 6
    assert monthly.made("pairs").ledger.rejected == {"forgotten": 144}

    assert keys(store)["clip"] == {first.inputs["clip"]}  # it has stood all along
    for name in ("diffusion_prior", "decoder"):
        assert monthly.made(name).recipe["init_from"] == first.blobs[f"{name}/model.safetensors"]

    # The same rows were looked at, though there are more held-out ones.
    rows = [evaluations(store, bundle)[0].document["rows"] for bundle in (first.key, bad, last.key)]
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0]["priors"]["keys"]) == 24
    follow(section("Another CLIP"), tmp_path)
    assert monthly.made("clip").key == first.inputs["clip"]  # a dry run moves no pin

    held_out = sum(shard.counts["test/0"] for shard in read_shards(store, monthly.made("curation")))
    assert held_out > 26
