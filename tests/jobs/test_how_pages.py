"""What the pages on the stages say exists: code by name, values of presets, columns, tensors and metrics."""

import ast
import json
import re
from dataclasses import fields
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from models.codec import Codec
from pipeline.build import build
from pipeline.config import PRESETS, make_config, preset_config
from pipeline.graph.artifacts import read_shards, read_table
from pipeline.store.records import read_blob
from tests.chain import ROOT
from tests.faults import Undisturbed, artifact
from tests.jobs.pages import tables

FOLDER = ROOT / "docs/how"
PAGES = sorted(FOLDER.glob("*.md"))
STAGES = [page.stem for page in PAGES if page.stem not in ("README", "diffusion")]
ELSEWHERE = {"captions", "evaluation"}  # those of source, and a page of its own
NAME = r"`([a-z][a-z0-9_.]*):([A-Za-z_][A-Za-z0-9_.]*)`"


def names_in(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


@cache
def defined(file: Path) -> set[str]:
    """Functions, classes and their methods, by the names that they have in a module."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_every_stage_has_a_page_that_the_first_page_links() -> None:
    first = (FOLDER / "README.md").read_text()
    assert all(f"]({page.name})" in first for page in PAGES if page.name != "README.md")
    values = {"source": {"paths": ["list.csv"]}, "thresholds": {"similarity": 0.1}}
    graph = build(make_config({"project": "p", "store": "s", "preset": "nano", **values}))
    listed = {word for row in tables(first) for word in re.findall(r"\w+", row["stage"])}
    assert graph.keys() <= listed | ELSEWHERE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_all_code_that_is_named_is_there_and_linked(page: Path) -> None:
    text = page.read_text()
    links = re.findall(rf"\[{NAME}\]\(([^)]+)\)", text)
    assert len(links) == len(re.findall(NAME, text)) >= 5
    for module, name, link in links:
        file = ROOT / f"{module.replace('.', '/')}.py"
        assert (page.parent / link).resolve() == file, f"{module}: {link}"
        assert name in defined(file), f"{module} has no {name}"


@pytest.mark.parametrize("stage", STAGES)
def test_settings_are_those_of_the_presets(stage: str) -> None:
    rows = [row for row in tables((FOLDER / f"{stage}.md").read_text()) if "setting" in row]
    assert rows
    for row in rows:
        [setting] = names_in(row["setting"])
        assert row.keys() == {"setting", "all presets"} or list(row) == ["setting", *PRESETS]
        for name in PRESETS:
            config = preset_config(name)
            unused = config.clip.pretrained and setting.startswith("clip.") and setting != "clip.weights"
            value = "-" if unused else json.dumps(reduce(getattr, setting.split("."), config))
            assert row.get("all presets", row.get(name)) == value, f"{setting} of {name}"


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_are_those_that_the_code_has(stage: str) -> None:
    """By their names between quotes: what a training measures is seen in its own tests."""
    code = "\n".join(file.read_text() for folder in ("models", "pipeline") for file in (ROOT / folder).rglob("*.py"))
    for row in tables((FOLDER / f"{stage}.md").read_text()):
        for name in names_in(row.get("metric", "")):
            assert f'"{name}"' in code, name


@pytest.mark.parametrize(
    ("stage", "blob"), [("source", "refs"), ("pairs", "index"), ("embeddings", "embeddings"), ("curation", "rejected")]
)
def test_columns_are_those_of_the_tables(undisturbed: Undisturbed, stage: str, blob: str) -> None:
    head = f"column of `{blob}`"
    rows = [row[head] for row in tables((FOLDER / f"{stage}.md").read_text()) if head in row]
    named = [name for row in rows for name in names_in(row) if name not in ("score_NAME", "counted")]  # of some shards
    store = undisturbed.data
    shard, *_ = read_shards(store, artifact(store, stage))
    assert sorted(named) == sorted(read_table(store, shard.blobs[blob]).column_names)


def test_tensors_and_metrics_are_those_of_the_codec(undisturbed: Undisturbed) -> None:
    codec = artifact(undisturbed.data, "codec")
    tensors = load(read_blob(undisturbed.data, codec.blobs["model.safetensors"]))
    rows: list[dict[str, Any]] = list(tables((FOLDER / "codec.md").read_text()))
    assert [name for row in rows for name in names_in(row.get("tensor", ""))] == [field.name for field in fields(Codec)]
    assert {field.name for field in fields(Codec)} == tensors.keys()
    sizes = {"d": tensors["mean"].shape[0], "k": len(tensors["components"]), "B": tensors["values"].shape[1]}
    for row in rows:
        if "tensor" in row:
            said = re.match(r"\[(.+?)\]", row["content"])
            assert said
            shape = [eval(side, {}, sizes) for side in said[1].split(", ")]
            assert shape == list(tensors[names_in(row["tensor"])[0]].shape)
    assert {name for row in rows for name in names_in(row.get("metric", ""))} == codec.metrics.keys()
