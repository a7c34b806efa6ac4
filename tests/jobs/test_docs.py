"""The documents hold what the code holds, and the commands in them run."""

import dataclasses
import doctest
import json
import re
import runpy
import shlex
import sys
import tarfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest import mock

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import ModelCard

import unclip
from benchmarks.billion import FILE, read
from benchmarks.simulation import Simulation
from pipeline.config import SCHEMA, Config, Run
from tests.chain import ROOT, here
from tests.jobs.pages import check_commands, check_links, small, tables
from tests.pipeline.data.bench import picture, save_clip, write_list
from tests.pipeline.data.source.imported import write_parts
from tests.pipeline.data.source.workbooks import write as write_sheets
from tests.pipeline.golden import golden_keys
from tests.reference import KINDS, fields, schema_text
from tests.site import MARKER

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "lab").glob("*.md"))]
# The commands of the documents that run here as they stand, in this order. Others need a cluster, a GPU or minutes.
RUN = [
    "unclip data look pairs.csv",
    "python examples/draw_faces.py faces",
    "unclip data look faces",
    "unclip init my-faces faces",
    "unclip run my-faces.yaml preset=nano",
    'unclip sample "a round yellow face with a wink and a big smile, on blue" --from my-faces.yaml',
    "unclip init my-project pairs.csv",
    "unclip init birds images",
    "unclip init scans 00000.tar 00001.tar",
    "unclip init coco annotations/captions_train2017.json",
    "unclip init flickr captions.txt --image-folder images",
    "unclip init saved saved.csv --encoding cp1252",
    "unclip init book book.xlsx",
    "unclip init packed train-00000-of-00001.parquet",
    "unclip run my-project.yaml --until pairs",
    "unclip run my-project.yaml",
    'unclip sample "a red heart" --from my-project.yaml',
    "unclip report my-project.yaml",
    "unclip data retry my-project.yaml",
    "unclip data retry --reason timeout,http_5xx my-project.yaml",
    "unclip data forget my-project.yaml 000000000003 http://example.org/a.jpg",
    "unclip data check my-project.yaml",
    "unclip data check my-project.yaml --repair",
    "unclip data gc my-project.yaml",
    "unclip data gc my-project.yaml --yes",
    "unclip run laion.yaml --until diffusion_prior",
    "unclip plan configs/nano.yaml",
    "unclip help",
    "unclip plan my-project.yaml",
    "unclip plan my-project.yaml --gpus 1xH100",
    "unclip run configs/nano.yaml",
    "unclip show configs/nano.yaml",
    "unclip run configs/nano.yaml --only evaluation evaluation.seed=1",
    "unclip plan configs/nano.yaml decoder.model.dropout=0.1",
    "unclip plan configs/nano.yaml decoder.model.dropout=0.1 run.pairs.threads=32",
    "unclip run configs/nano.yaml decoder.model.dropout=0.1",
    'unclip sample "a square yellow monster with horns, one eye and a grin, on blue"',
    'unclip sample "a cactus in a pink bowl" "a banded blue planet" --seed 7 --set prior=ar',
    "unclip generate prompts.txt --from out/nano --to images-made --workers 2",
    'unclip data search configs/nano.yaml "a square yellow monster" --count 5',
    "unclip data search configs/nano.yaml --image images/3.png --split train",
    "unclip data export configs/nano.yaml --to exported",
    "unclip export configs/nano.yaml --to shared",
    "unclip export configs/nano.yaml --to nano.zip --license CC0-1.0",
    'unclip sample "a red heart" --from nano.zip',
    "unclip export configs/nano.yaml --to for-diffusers --format diffusers",
    "unclip export for-diffusers --to back",
    "unclip report configs/nano.yaml --license CC0-1.0 --output to-show.html",
    "unclip report configs/nano.yaml decoder.model.dropout=0.1 --against configs/nano.yaml --output a-b.html",
    "unclip release promote configs/nano.yaml",
    "unclip release diff configs/nano.yaml --set decoder.model.dropout=0.1",
    'unclip release promote configs/nano.yaml --set decoder.model.dropout=0.1 --force "better hearts"',
    "unclip release list configs/nano.yaml",
    'unclip release rollback configs/nano.yaml --reason "it drew cats"',
    "unclip release evaluate configs/nano.yaml",
    "python examples/sample.py",
    "python examples/read_embeddings.py configs/nano.yaml",
    "python examples/train_prior.py configs/nano.yaml",
    "python examples/add_stage.py configs/nano.yaml",
    "python examples/add_command.py configs/nano.yaml",
    "python examples/add_metric.py images/3.png",
    "python examples/another_decoder.py configs/nano.yaml",
    "unclip release take configs/nano.yaml out/released",
    'unclip sample "a red heart" --from out/released',
    "unclip release weights configs/nano.yaml",
    "unclip pin configs/nano.yaml clip",
    "unclip unpin configs/nano.yaml clip",
    'unclip sample "a bell-shaped lime monster with a crown, three eyes and a frown, on magenta"',
]


def test_the_configuration_page_and_the_schema_have_every_class_of_the_code() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    assert SCHEMA.read_text() == schema_text(), "python -m tests.reference writes the schema anew"
    shown = {name for _, names, _ in MARKER.findall(text) for name in names.split(", ")}
    assert shown == KINDS.keys() - {"Config"}
    top = {row["field"] for row in tables(text.partition("\n## ")[0])}
    assert top == {"project", "store", "preset", "scale"}
    for field in dataclasses.fields(Config):
        assert field.name in top or f"\n## {field.name}" in text or f"`{field.name}`" in text, field.name
    for field in dataclasses.fields(Run):
        assert field.name in fields(Run) or f"run.{field.name}" in text, field.name


def test_the_keys_of_the_first_half_hour_are_those_that_one_sees() -> None:
    keys = golden_keys()["nano.yaml"]
    shown = re.findall(r"^    +(\w+) .*\b([0-9a-f]{12})\b", (ROOT / "docs/start.md").read_text(), re.M)
    assert {stage for stage, _ in shown} == keys.keys()
    assert [(stage, key) for stage, key in shown if not keys[stage].startswith(key)] == []


def test_every_command_of_the_documents_is_one_that_is_taken() -> None:
    """Those on lines of their own with all their words, those within a sentence by their names."""
    for document in DOCUMENTS:
        check_commands(document, document.read_text())


def test_every_command_that_runs_here_is_in_a_document() -> None:
    texts = "\n".join(document.read_text() for document in DOCUMENTS)
    assert [command for command in RUN if command not in texts] == []


def test_the_figures_of_the_page_on_scale_are_those_that_were_measured() -> None:
    """Each in the place of its name, as far as it is written out."""
    known = read(FILE)
    figures = {f"{part} {name}": value for part, one in known.items() for name, value in one.items()}
    figures |= Simulation(known).growth()
    rows = [row for row in tables((ROOT / "docs/scale.md").read_text()) if "constant" in row]
    assert len(rows) > 5
    for row in rows:
        name, digits = row["constant"].strip("`"), len(row["value"].partition(".")[2])
        assert round(figures[name], digits) == float(row["value"]), name


def test_every_link_leads_somewhere() -> None:
    for document in DOCUMENTS:
        check_links(document, document.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with configurations of the names in the documents, small enough to run."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").mkdir()
    (folder / "images").mkdir()
    for i in range(24):
        (folder / f"images/{i}.png").write_bytes(picture(i))
        (folder / f"images/{i}.txt").write_text(f"picture {i}\n")
    for i in range(2):
        with tarfile.open(folder / f"{i:05d}.tar", "w") as tar:
            for name in (f"{i}.png", f"{i}.txt"):
                tar.add(folder / "images" / name, name)
    splits = ["validation" if i % 8 == 5 else "test" if i % 8 == 7 else "train" for i in range(24)]
    write_list(
        folder / "pairs.csv",
        [(f"file://{folder}/images/{i}.png", f"picture {i}", split) for i, split in enumerate(splits)],
    )
    head, *lines = (folder / "pairs.csv").read_text().splitlines()
    (folder / "pairs.csv").write_text("\n".join([f"{head},license", *(f"{line},CC0-1.0" for line in lines), ""]))
    names = [(f"{i}.png", f"picture {i}") for i in range(24)]
    (folder / "annotations").mkdir()
    coco = {"images": [{"id": i, "file_name": name} for i, (name, _) in enumerate(names)]}
    coco["annotations"] = [{"image_id": i, "caption": said} for i, (_, said) in enumerate(names)]
    (folder / "annotations/captions_train2017.json").write_text(json.dumps(coco))
    (folder / "captions.txt").write_text("".join(f"{name},{said}\n" for name, said in [("image", "caption"), *names]))
    lines = (f"images/{name};ein schönes {said}\r\n" for name, said in names)
    (folder / "saved.csv").write_bytes(("image;caption\r\n" + "".join(lines)).encode("cp1252"))
    write_sheets(folder / "book.xlsx", {"A": [["image", "caption"], *((f"images/{n}", said) for n, said in names)]})
    inside = {"image": [{"bytes": picture(i), "path": None} for i in range(24)], "text": [said for _, said in names]}
    pq.write_table(pa.table(inside), folder / "train-00000-of-00001.parquet")
    (folder / "prompts.txt").write_text("a red heart\na green apple\n")
    write_parts(folder / "embeddings")
    laion = {"project": "laion", "store": "out/laion/store", "source": {"paths": ["embeddings"]}}
    laion = small(laion)
    laion["clip"] = laion["clip"] | {"weights": save_clip(folder / "clip")}
    (folder / "laion.yaml").write_text(yaml.safe_dump(laion))
    nano = small({"project": "nano", "store": "../out/nano/store", "source": {"paths": ["../pairs.csv"]}})
    nano["run"]["output"] = "../out/nano"
    (folder / "configs/nano.yaml").write_text(yaml.safe_dump(nano))
    return folder


@pytest.mark.parametrize("command", RUN)
def test_commands_run_as_they_stand(folder: Path, command: str) -> None:
    program, *words = shlex.split(command)
    if program == "python":  # in this process, which need not import torch again
        with chdir(folder), mock.patch.object(sys, "argv", words + ["40"] * words[0].endswith("draw_faces.py")):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        return
    if command.startswith(("unclip run my-project.yaml", "unclip run my-faces.yaml")):
        written = folder / words[1]
        written.write_text(yaml.safe_dump(small(yaml.safe_load(written.read_text()))))
    if words[0] == "generate":  # on workers: test_generate.py
        words += ["--workers", "0"]
    process = here(*words, cwd=folder, env={"XDG_CACHE_HOME": str(folder / "cache")})
    assert process.returncode == 0, process.stderr
    if command == "unclip export configs/nano.yaml --to shared":
        card = ModelCard.load(folder / "shared/README.md")
        assert card.data.license == "unknown"
        assert re.search(r"^# nano$[\s\S]*^\| train \| \d+ \|$[\s\S]*^Nothing was measured: ", card.text, re.M)
    if command.startswith("unclip sample"):
        assert all((folder / line).is_file() for line in process.stdout.splitlines())
    if command.startswith("unclip data search"):
        found = [line.split("\t") for line in process.stdout.splitlines()]
        assert len(found) == (5 if "--count" in command else 10)
        assert all(len(fields) == 5 and "picture " in fields[4] for fields in found)
        told = json.loads(here(*words, "--json", cwd=folder).stdout)["rows"]
        assert [(row["key"], row["split"], row["url"]) for row in told] == [tuple(fields[1:4]) for fields in found]
        if "--image" in command:  # it is in the list itself, so it is the nearest
            assert found[0][3].endswith("/images/3.png")
            assert {fields[2] for fields in found} == {"train"}
    if command == "unclip run my-project.yaml":  # a small set is told why nothing was measured and what to do
        why = "Nothing was measured: 3 test pairs, and a figure needs 8; set source.test to 0.2 or add pairs"
        assert f"\nDoes it learn? {why}\n" in process.stdout
        page = (folder / "out/my-project/report.html").read_text()
        assert f'<p class="note">{why}.</p>' in page
        assert "validation from" not in page
        assert "and a figure needs 8; set source.validation to 0.2 or add pairs." in page
    if command == "unclip export for-diffusers --to back":  # the last one of the page
        text, _, _ = (ROOT / "docs/export.md").read_text().partition("\n## Karlo")
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            with chdir(folder):
                exec(block, {})
    if command.endswith("decoder.model.dropout=0.1"):
        assert "model.dropout 0.0 -> 0.1" in process.stdout


def test_every_example_is_run() -> None:
    """A source is no program: test_added_source.py runs it."""
    files = {f"examples/{file.name}" for file in (ROOT / "examples").glob("*.py")}
    assert {command.split()[1] for command in RUN if command.startswith("python ")} == files - {
        "examples/add_source.py"
    }


def test_the_script_of_the_report_page_prints_what_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block, _ = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/report.md").read_text(), re.M | re.S)
    report = folder / "out/nano/report.json"
    before = report.read_text()
    told = json.loads(before)
    told["figures"][0] |= {"text": "It draws.", "says": "top", "holds": False, "value": 0.1, "baseline": 0.2}
    report.write_text(json.dumps(told))
    with chdir(folder):
        exec(block, {})
    report.write_text(before)
    assert "It draws. top 0.1 baseline 0.2\n" in capsys.readouterr().out


def test_python_of_a_page_runs_as_it_stands(folder: Path) -> None:
    """After the commands above, on what they have made."""
    names: dict[str, Any] = {}
    with chdir(folder):
        for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.M | re.S):
            exec(compile(block, "docs/python.md", "exec"), names)
    assert [image.size for image in (names["monster"], *names["four"], *names["between"])] == [(64, 64)] * 10
    assert names["plan"].stale[:1] == ["decoder"]
    assert len(names["samples"].__iter__().__next__()) == 2
    with chdir(folder):
        run_examples(names)


def examples() -> Iterator[doctest.DocTest]:
    """The docstrings of every public class and function, and of its methods."""
    for name in unclip.__all__:
        thing = getattr(unclip, name)
        if getattr(thing, "__module__", "").startswith(("unclip.", "jobs.artifact", "jobs.look", "jobs.export")):
            yield from doctest.DocTestFinder(exclude_empty=False).find(thing, name)


def run_examples(names: dict[str, Any]) -> None:
    """Runs the examples of the reference after those of the page, with their names."""
    runner = doctest.DocTestRunner()
    for test in examples():
        test.globs = {**names, "PIL": PIL}
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_every_public_call_has_an_example() -> None:
    """But for ``Pairs.ray``, which starts a Ray."""
    bare = set()
    for test in examples():
        owner, _, name = test.name.rpartition(".")
        if (
            not test.examples
            and name[0] != "_"
            and not (owner and isinstance(vars(getattr(unclip, owner))[name], property))
        ):
            bare.add(test.name)
    assert bare == {"Artifact", "ExportResult", "Model", "Project", "Pairs.ray"}
