"""A user's mistake is one line on stderr that says what to do, and exit code 2; never a traceback."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from jobs.cli import guard
from pipeline.errors import CorruptObject
from tests.chain import MICRO, here, refused, unclip

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a micro configuration of the given list in a folder of its own."""

    def configure(text: str = "url,caption\nhttp://closed.test/a.png,a\n", **changes: object) -> Path:
        (tmp_path / "list.csv").write_text(text)
        values = MICRO | {"store": str(tmp_path / "store")} | changes
        source = {"paths": [str(tmp_path / "list.csv")]} | values["source"]
        pairs = {"workers": 0, "retries": 0, "hosts": {"closed.test": "127.0.0.1:1"}}
        run = {**MICRO["run"], "output": str(tmp_path / "out"), "pairs": pairs}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**values, "source": source, "run": run}))
        return path

    return configure


def test_a_clip_that_is_nowhere_is_found_before_anything_is_fetched(write: Write, tmp_path: Path) -> None:
    config = write()
    words = ("run", config, "--yes", "clip.weights=open_clip:ViT-B-32:opena1")
    refused(*words, says=["clip.weights: ViT-B-32 has no weights opena1", "did you mean openai?"])
    refused("run", config, "--yes", "evaluation.judge=local-dir:gone", says="evaluation.judge: gone has no open_clip")
    assert not (tmp_path / "store/artifacts").exists()


def test_above_the_budget_it_stops_without_yes(write: Write) -> None:
    config = write()
    words = ("run", config, "run.budget_hours=0.000001", "--until", "pairs")
    process = refused(*words, says=["above run.budget_hours 1e-06", "--yes"])
    assert "pairs           stale" in process.stdout
    process = here(*words, "--yes")
    assert "run.budget_hours" not in process.stderr
    assert "pairs done" in process.stdout


def test_all_rows_rejected_says_why(write: Write) -> None:
    """Where nothing is left to learn from, the run ends with what removed the rows, also when it is run again."""
    rows = "".join(f"http://closed.test/{i}.png,picture {i}\n" for i in range(3))
    config = write("url,caption\n" + rows)
    for words in ((), ("--until", "pairs")):
        says = ["no pair is left: 3 of 3 rows are unreachable", "unclip data retry CONFIG has them tried again"]
        refused("run", config, *words, says=says)


def test_the_command_that_tries_rows_again_has_the_values_of_this_run(write: Write, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    config = write(f"url,caption\n{tmp_path}/a.png,a square\nhttp://closed.test/b.png,another\n")
    done = here("run", config, "--until", "pairs", "clip.samples=64")
    assert done.returncode == 0, done.stderr
    assert f"unclip data retry {config} clip.samples=64 && unclip run {config} clip.samples=64" in done.stdout


def test_a_place_that_cannot_be_written(write: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    below = tmp_path / "file" / "store"
    refused("plan", write(store=str(below)), says=str(below))
    refused("run", write(store=str(below)), says=str(below))
    refused("run", write(), f"run.output={below}", "--until", "source", says=str(below))
    for system in ("/proc/self/here", "/sys/here"):
        refused("run", write(store=system), "--until", "source", says=[system, "name another place"])
        refused("run", write(store=system), "--until", "source", "--yes", says=[f"store {system}", "another folder"])
        refused("run", write(), f"run.output={system}", "--until", "source", says=[system, "name a "])


def test_temporary_files_where_ray_cannot_be(write: Write, tmp_path: Path) -> None:
    deep = tmp_path / ("long" * 20)
    deep.mkdir()
    says = ["TMPDIR", "too long for Ray's sockets", "RAY_TMPDIR=/tmp"]
    refused("run", write(), "run.pairs.workers=1", says=says, env={"RAY_TMPDIR": str(deep)})


@pytest.mark.parametrize(("file", "says"), [("/a/file", "(/a/file)"), (None, "TMPDIR")])
def test_a_disk_that_is_full(file: str | None, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fill(_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)

    assert guard(fill, []) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: the disk is full (")
    assert says in told
    assert "None" not in told


def test_without_words_it_shows_its_usage() -> None:
    usage = unclip()
    assert usage.returncode == 2
    assert "usage: unclip COMMAND" in usage.stdout


def test_sample_without_a_bundle(tmp_path: Path) -> None:
    refused("sample", "a cat", "--from", tmp_path, "--set", "steps", says="steps: write NAME=VALUE")
    (tmp_path / "bundle.json").write_text(f'{{"store": "{tmp_path}", "bundle": "0123456789abcdef", "files": ""}}')
    refused("sample", "a cat", "--from", tmp_path, says=["its bundle is no longer in", "run its configuration again"])


def test_a_damaged_blob_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def damaged(_: object) -> int:
        raise CorruptObject(blob, "is missing")

    blob = f"blobs/ab/ab{'c' * 62}"
    for words, config in (
        (["sample", "a cat"], "CONFIG"),
        (["run", "my.yaml", "store=s3://b/c"], "my.yaml"),
        (["sample", "--from", "release:my.yaml"], "my.yaml"),
    ):
        assert guard(damaged, words) == 2
        store = " store=s3://b/c" if "run" in words else ""
        way_out = f"unclip data check {config} {blob}{store} --repair quarantines it, and the next run makes it again"
        assert capsys.readouterr().err == f"error: {blob} is missing: {way_out}\n"
