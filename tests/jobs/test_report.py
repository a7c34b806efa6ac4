"""Tests ``unclip report --against``: what it takes, and what it says where there is nothing to compare."""

import json
from pathlib import Path

import pytest
import yaml

from jobs.cli import main
from tests.jobs.releases import OTHER, Made
from tests.jobs.test_mistakes import refused


def test_another_bundle_is_a_key_a_project_a_folder_or_a_release(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, better = made.make(0.0), made.make(0.1, OTHER)
    made.release("promote")
    values = yaml.safe_load(made.path.read_text())
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/bundle.json").write_text(json.dumps({"store": made.store.url, "bundle": first, "files": ""}))
    report = ["report", str(made.path), OTHER, "--output", str(tmp_path / "report.html"), "--against"]
    project = str(tmp_path / "b.yaml")
    for name in ("current", first[:10], project, str(tmp_path / "out"), f"release:{project}"):
        assert main([*report, name]) == 0, capsys.readouterr()
        found = json.loads((tmp_path / "report.json").read_text())["against"]
        assert (found["name"], found["bundle"]) == (name, first)
        assert found["recipes"] == ["decoder.weight_decay 0.01 -> 0.02"]
        assert [change["verdict"] for change in found["figures"]] == ["better"]
    for name, why in ((better[:10], "is the same bundle"), ("feed", "no bundle in"), ("absent.yaml", "absent.yaml")):
        refused(*report, name, says=why)
    refused(*report[:3], "--output", tmp_path, says="is a folder; name a file, such as")
    refused(*report[:3], "--output", tmp_path / "report.json", says="ends with .json, where the figures go")
