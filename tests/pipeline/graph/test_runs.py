"""What a run that finds everything made writes down."""

import time
from pathlib import Path

import pytest

from jobs.project import Project, open_project
from jobs.run import run
from pipeline.build import build
from pipeline.config import load_config
from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.graph.damage import read_record
from pipeline.graph.keys import flatten
from pipeline.graph.plan import plan
from pipeline.graph.runs import AGAIN_S, asked_at, remember, remember_again
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.records import put_blob
from pipeline.upkeep.collect import collect

DAY_S = 86_400.0
GRAPH = build(load_config("configs/nano.yaml"))


@pytest.mark.parametrize(
    ("words", "recorded"),
    [
        (["/bin/unclip", "run", "a.yaml", "--set=store=s3://a", "x.y=1"], "unclip run a.yaml store=... x.y=..."),
        (["jobs/cli.py", "run", "a b.yaml"], "cli run 'a b.yaml'"),
        (["monthly.py", "--token", "hf_abc"], "monthly"),
    ],
)
def test_the_words_of_ones_own_program_are_not_recorded(
    words: list[str], recorded: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", words)
    verdicts = plan(GRAPH, {"source": "s", "captions": "c"}, "p", store, {})
    remember(store, "p", GRAPH, verdicts)
    (entry,) = store.list("runs/p/")
    record = read_record(store, entry.path)
    assert record
    assert record["by"]["command"] == recorded


def test_a_run_that_finds_everything_made_is_recorded_where_no_record_of_today_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(source: str = "s", forgettings: int = 0, wanted: str = "pairs") -> list[str]:
        verdicts = plan(GRAPH, {"source": source, "captions": "c"}, "p", store, {})
        remember_again(store, "p", GRAPH, verdicts, forgettings, {wanted})
        return [entry.path for entry in store.list("runs/p/")]

    now = time.time()
    assert len(again()) == len(again()) == 1
    assert len(again(source="other")) == len(again(source="other")) == 2
    assert len(again()) == 3  # what a run of the same list was asked for before the other is not the last any more
    assert len(again(forgettings=1)) == 4
    assert len(again(forgettings=1, wanted="captions")) == 5
    monkeypatch.setattr(time, "time", lambda: now + AGAIN_S + 60)
    found = again(forgettings=1, wanted="captions")
    assert len(found) == 6
    assert asked_at(found[-1]) == pytest.approx(now + AGAIN_S + 60, abs=1)


def test_what_a_run_of_today_finds_made_outlives_another_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of two months ago, which a run finds today, is needed, though it is not the project's last any more."""
    (tmp_path / "list.csv").write_text("url,caption\nhttp://a.test/a.png,a bird\n")
    values = {"project": "p", "store": str(tmp_path / "store"), "source": {"paths": [str(tmp_path / "list.csv")]}}

    def project(batch: int) -> Project:
        return open_project({**values, "preset": "nano", "run": {"output": str(tmp_path)}}, [f"decoder.batch={batch}"])

    def make(batch: int, at: float) -> None:
        found = project(batch)
        verdicts = found.plan()
        keys = {verdict.stage: verdict.key for verdict in verdicts}
        with monkeypatch.context() as then:
            then.setattr(time, "time", lambda: at)
            remember(found.store, "p", found.graph, verdicts)
        for verdict in verdicts:
            stage = found.graph[verdict.stage]
            inputs = {name: keys[name] for name in stage.inputs}
            blobs = {"model.safetensors": put_blob(found.store, verdict.key.encode())}
            made = Artifact(stage.name, verdict.key, inputs, flatten(stage.recipe), Ledger(), blobs=blobs)
            publish_artifact(found.store, made, 1.0)

    now = time.time()
    make(16, now - 60 * DAY_S)
    monkeypatch.setattr("jobs.run._shows", lambda *_: True)  # a report of these artefacts cannot be written
    run(project(16))
    make(8, now)
    store = project(16).store
    for passed in (0, 2 * DAY_S):
        collect(store, 30 * DAY_S, DAY_S, store.now() + passed, True)
    assert not [verdict.stage for verdict in project(16).plan() if verdict.state == "stale"]
