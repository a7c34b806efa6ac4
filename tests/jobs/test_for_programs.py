"""What programs read: one JSON object on standard output, and a run's events as JSON lines."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

import jobs.doctor
from jobs.output import events_to
from pipeline.progress import Progress
from tests.chain import done, here, write_config
from tests.pipeline.data.bench import picture


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A project of an image beside its list and one that cannot be reached, so that a run until pairs is short."""
    (tmp_path / "list.csv").write_text("url,caption,split\n0.png,a,train\nhttp://closed.test/1.png,a,test\n")
    (tmp_path / "0.png").write_bytes(picture(0))
    return write_config(tmp_path, str(tmp_path / "store"), "127.0.0.1:1", [tmp_path / "list.csv"])


def read(*words: object) -> Any:
    return json.loads(done(here(*words, "--json")))


def test_a_plan(config: Path) -> None:
    said = read("plan", config)
    assert (said["project"], said["pairs"], said["shards"]) == ("micro", 2, 1)
    assert [stage["state"] for stage in said["stages"]] == ["stale"] * 17
    assert said["seconds"] == pytest.approx(sum(stage["cost"]["seconds"] for stage in said["stages"]))
    assert "figure needs 8" in said["warnings"][0]
    more = read("plan", config, "--pairs", "1M", "--gpus", "8xH100")
    assert more["pairs"] == 1_000_000
    assert all("state" not in stage and stage["cost"]["seconds"] >= 0 for stage in more["stages"])


def test_a_run_and_what_is_shown_of_it(config: Path, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    words = ("run", config, "run.pairs.retries=0", "--until", "pairs", "--events", events)
    process = here(*words, "-q")
    assert done(process) == ""
    assert process.stderr == ""
    told = [one for one in map(json.loads, events.read_text().splitlines()) if one["event"] != "progress"]
    assert [(one["event"], one.get("stage")) for one in told] == [
        ("plan", None), ("stage", "source"), ("stage", "pairs"), ("done", None)
    ]  # fmt: skip
    assert told[0]["stale"] == ["source", "pairs"]
    assert told[2]["key"] == told[0]["keys"]["pairs"]
    assert told[2]["rows"]["deferred"] == {"unreachable": 1}
    assert sorted(one["at"] for one in told) == [one["at"] for one in told]
    here(*words)
    assert [json.loads(line)["event"] for line in events.read_text().splitlines()[-2:]] == ["plan", "done"]

    assert "2 of 2 stages made" in done(here("show", config))  # of those that were asked for
    said = read("show", config)
    stages = said["runs"][0]["stages"]
    assert {name for name, of in stages.items() if of["state"] == "made"} == {"source", "pairs"}
    one = read("show", config, stages["pairs"]["key"][:12])
    assert one["artifact"]["stage"] == "pairs"
    assert {made["stage"] for made in one["made_from"]} >= {"source"}
    assert one["release_of"] == []
    garbage = read("data", "gc", config)
    assert garbage["needed"]["blobs"]["objects"] > 0
    assert garbage["deleted"] == {}


def test_a_run_that_fails_says_so_in_its_events(config: Path, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    process = here("run", config, "run.budget_hours=0.000001", "--events", events)
    assert process.returncode == 2
    told, last = [json.loads(line) for line in events.read_text().splitlines()]
    assert (told["event"], last["event"]) == ("plan", "failed")
    assert process.stderr.strip() == f"error: {last['error']}"


def test_progress_is_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.output.PROGRESS_S", 0.01)
    with events_to(tmp_path / "events") as _, Progress("decoder", 100, "samples") as progress:
        progress.advance(30)
        while not (tmp_path / "events").read_text().strip():
            time.sleep(0.01)
    told = json.loads((tmp_path / "events").read_text().splitlines()[0])
    assert (told["event"], told["stage"], told["done"], told["total"], told["unit"]) == (
        "progress", "decoder", 30, 100, "samples"
    )  # fmt: skip


def test_a_plan_and_the_dry_run_fit_a_screen(tmp_path: Path) -> None:
    config = "configs/nano.yaml"
    for words in (("plan", config), ("run", config, "-n")):
        lines = done(here(*words, f"store={tmp_path}")).splitlines()
        assert sum(-(-len(line) // 80) for line in lines) <= 24
        assert lines[-1].startswith("most of it: ")
    assert len(done(here("plan", config, f"store={tmp_path}", "-v")).splitlines()) > 40


def test_doctor_and_releases(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.doctor, "check_nodes", lambda *_: ())
    said = read("doctor", config)
    assert said["problems"] == 0
    assert said["warnings"] == sum(finding["level"] == "warning" for finding in said["findings"])
    assert "list" in {finding["subject"] for finding in said["findings"]}
    assert read("release", "list", config) == {"project": "micro", "release": None, "moves": []}
