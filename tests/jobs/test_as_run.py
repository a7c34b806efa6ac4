"""What follows a run speaks of that run, whatever its command line was and whatever was edited since."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

import unclip
from jobs.bundles import find_bundle
from jobs.cli import main
from jobs.project import open_as_run, open_project
from pipeline.config import load_config, make_config, resolved_values, whole_values
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.ledger import Ledger
from tests.chain import ROOT, done, here, refused, write_config
from tests.pipeline.data.bench import picture, save_clip, write_listed

SMALLER = "pairs.encode_quality=90"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration of six images."""
    rows = write_listed(tmp_path, [picture(i) for i in range(6)])
    return write_config(tmp_path, str(tmp_path / "store"), "127.0.0.1:1", [Path(rows)])


@pytest.fixture
def config(file: Path) -> Path:
    """The same, after a run that stored pairs at another quality than it says."""
    assert main(["run", str(file), "--until", "pairs", SMALLER]) == 0
    return file


def _made(config: Path) -> dict[str, str]:
    told = json.loads((config.parent / "out/report.json").read_text())["stages"]
    return {stage["stage"]: stage["key"] for stage in told if stage["made"]}


def test_what_follows_a_run_with_overrides_is_that_runs(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = _made(config)
    assert made.keys() == {"source", "pairs"}
    with caplog.at_level("INFO", "unclip"):
        assert main(["report", str(config)]) == 0
    assert _made(config) == made
    assert "as it was last run" in caplog.text
    assert "it differs in pairs.encode_quality" in caplog.text
    retry = ("data", "retry", config, "--reason", "timeout")
    assert "no row to retry" in done(here(*retry))
    refused(*retry, "pairs.encode_quality=80", says="not made for the current list and recipes: pairs")
    assert re.search(r"^  pairs +fresh", done(here("plan", config.parent / "out/run.yaml")), re.MULTILINE)


def test_bundles_after_a_run_with_overrides_are_that_runs(config: Path) -> None:
    """So for all that ``--from`` and ``unclip export`` name."""
    plain, run = (
        next(verdict.key for verdict in opened(config).plan() if verdict.stage == "bundle")
        for opened in (open_project, open_as_run)
    )
    assert plain != run
    publish_artifact(open_project(config).store, Artifact("bundle", run, {}, {}, Ledger()), 0.0)
    assert find_bundle(str(config)).key == run


def test_a_store_that_was_moved_is_missed(config: Path) -> None:
    missed = "knows of none: all is made again; if the store was moved, name its place with store=FOLDER"
    assert missed not in done(here("plan", config))
    (config.parent / "store").rename(config.parent / "elsewhere")
    assert f"warning: {config.parent}/out/run.yaml is of a run, and the store {config.parent}/store {missed}" in done(
        here("plan", config)
    )
    assert missed not in done(here("plan", config, f"store={config.parent}/elsewhere"))


def test_a_pin_is_moved_in_the_plan_of_that_run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = f"clip.weights={save_clip(file.parent / 'clip')}"
    assert main(["run", str(file), "--until", "clip", clip]) == 0
    capsys.readouterr()
    assert main(["pin", str(file), "clip", "--dry-run"]) == 0
    assert capsys.readouterr().out == "nothing becomes stale\n"
    says = "unclip run with --until clip makes what the configuration asks for"
    refused("pin", file, "clip", "--dry-run", "clip.seed=5", says=says)


def test_a_program_is_warned_that_it_opens_something_else(config: Path) -> None:
    with pytest.warns(UserWarning, match=r"its last run differed in pairs\.encode_quality, so .*the same overrides"):
        assert "pairs" in unclip.open(config).plan().stale
    with warnings.catch_warnings(action="error"):
        assert "pairs" not in unclip.open(config, SMALLER).plan().stale
        assert main(["run", str(config), "--until", "pairs"]) == 0
        assert "pairs" not in unclip.open(config).plan().stale


def test_an_edit_counts_once_it_is_run(config: Path) -> None:
    made = _made(config)
    edited = re.sub(r"^pairs: .*\n|^project:", "pairs: {encode_quality: 70}\nproject:", config.read_text(), flags=re.M)
    config.write_text(edited)
    assert main(["report", str(config)]) == 0
    assert _made(config) == made
    assert main(["run", str(config), "--until", "pairs"]) == 0
    assert _made(config)["pairs"] != made["pairs"]


def test_a_report_of_less_does_not_replace_one_of_more(config: Path) -> None:
    page = (config.parent / "out/report.html").read_bytes()
    says = "shows 2 finished stages, but with these values 1 are finished"
    refused("report", config, "pairs.encode_quality=80", says=says)
    assert (config.parent / "out/report.html").read_bytes() == page
    assert main(["report", str(config), "pairs.encode_quality=80", "--output", str(config.parent / "two.html")]) == 0


def test_what_an_older_version_remembered_is_named(config: Path) -> None:
    remembered = config.parent / "out/run.yaml"
    remembered.write_text(remembered.read_text().replace("encode_quality", "quality_of_old"))
    refused("report", config, says=[f"{remembered}, which the last run wrote, cannot be used: ", "quality_of_old"])
    remembered.unlink()
    assert main(["report", str(config), "--output", str(config.parent / "other.html")]) == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("overrides", [[], ["preset=nano"], ["scale=0.1"]], ids=["", "nano", "scaled"])
def test_resolved_values_make_the_same_recipes(
    path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path, overrides)
    values = resolved_values(config)
    assert resolved_values(make_config(values)) == values
    assert make_config(values).decoder == config.decoder
    whole = make_config(whole_values(config))
    assert (whole.release, whole.run) == (
        config.release,
        replace(config.run, output=str(Path(config.run.output).resolve())),
    )


def test_a_file_that_was_run_as_it_stands_is_itself(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["run", str(config), "--until", "pairs"]) == 0
    plain = _made(config)
    assert main(["run", str(config), "--until", "pairs", SMALLER]) == 0
    assert (smaller := _made(config)) != plain
    with caplog.at_level("INFO", "unclip"):
        assert main(["report", str(config)]) == 0
    assert _made(config) == plain
    last = config.parent / "out/run.yaml"
    assert f"as it stands; its last run differed in pairs.encode_quality: name {last}" in caplog.text
    assert main(["report", str(last)]) == 0
    assert _made(config) == smaller
