"""``unclip show`` on a store where something is made and something is being made."""

from pathlib import Path

import pytest
import yaml

from jobs.cli import main
from jobs.project import open_project
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.keys import flatten
from pipeline.graph.leases import lead_or_wait
from pipeline.graph.runs import record_run
from pipeline.ledger import Ledger


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A project of which a run has made the source and leads the pairs."""
    (tmp_path / "list.csv").write_text("url,caption\nhttp://closed.test/a.png,a\n")
    source = {"paths": [str(tmp_path / "list.csv")], "shard_rows": 20}
    values = {"project": "p", "preset": "nano", "store": str(tmp_path / "store"), "source": source}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    project = open_project(str(tmp_path / "p.yaml"), ())
    verdicts = project.plan()
    record_run(project.store, "p", project.graph, verdicts)
    keys = {verdict.stage: verdict.key for verdict in verdicts}
    recipe = flatten(project.graph["source"].recipe)
    publish_artifact(project.store, Artifact("source", keys["source"], {}, recipe, Ledger(1)), 1.0)
    assert lead_or_wait(project.store, keys["pairs"], 60.0, lambda: False, lambda: "", stage="pairs")
    return tmp_path / "p.yaml"


def test_without_a_key_it_shows_runs_and_what_is_under_way(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "running now\n  pairs " in shown
    assert "1 of 17 stages made" in shown
    assert main(["show", "--store", str(config.parent / "store")]) == 0
    assert capsys.readouterr().out.splitlines()[4:] == shown.splitlines()[4:]  # but for the seconds that it runs


def test_a_folder_and_no_word_at_all_show_the_store_there(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (config.parent / "out/p").mkdir(parents=True)
    (config.parent / "store").rename(config.parent / "out/p/store")
    monkeypatch.chdir(config.parent)
    for words in ([], ["out/p"], ["out/p/store"]):
        assert main(["show", *words]) == 0
        assert "1 of 17 stages made" in capsys.readouterr().out


def test_with_a_key_it_shows_an_artefact(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = next(verdict.key for verdict in open_project(str(config), ()).plan() if verdict.stage == "source")
    for words in ([str(config), key[:12]], ["--store", str(config.parent / "store"), key]):
        assert main(["show", *words]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"source {key}")
        assert "shard_rows 20" in shown
        assert "caption_column" not in shown  # as the default is
