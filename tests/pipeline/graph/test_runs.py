"""What a run that finds everything made writes down."""

import time

import pytest

from pipeline.build import build
from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.graph.plan import plan
from pipeline.graph.records import RunRecord
from pipeline.graph.runs import AGAIN_S, last_run, record_run, run_entries, run_number
from pipeline.store import Store
from pipeline.store.records import create_record, read_record
from pipeline.upkeep.overview import overview

GRAPH = build(load_config("configs/nano.yaml"))


@pytest.mark.parametrize(
    ("words", "recorded"),
    [
        (["/bin/unclip", "run", "a.yaml", "--set=store=s3://a", "x.y=1"], "unclip run a.yaml store=... x.y=..."),
        (["/bin/unclip", "run", "a.yaml", "preset=nano", "scale=2"], "unclip run a.yaml preset=nano scale=2"),
        (["jobs/cli.py", "run", "a b.yaml"], "cli run 'a b.yaml'"),
        (["monthly.py", "--token", "hf_abc"], "monthly"),
    ],
)
def test_the_words_of_ones_own_program_are_not_recorded(
    words: list[str], recorded: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", words)
    verdicts = plan(GRAPH, {"source": "s", "captions": "c"}, "p", store, {})
    record_run(store, "p", GRAPH, verdicts)
    (entry,) = store.list("runs/p/")
    run = read_record(store, entry.path, RunRecord)
    assert run
    assert run.by["command"] == recorded


def test_a_run_that_finds_everything_made_is_recorded_where_no_record_of_today_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(source: str = "s", forgettings: int = 0, wanted: str = "pairs") -> list[str]:
        verdicts = plan(GRAPH, {"source": source, "captions": "c"}, "p", store, {})
        record_run(store, "p", GRAPH, verdicts, None, forgettings, {wanted}, repeated=True)
        return [entry.path for entry in store.list("runs/p/")]

    assert len(again()) == len(again()) == 1
    assert len(again(source="other")) == len(again(source="other")) == 2
    assert len(again()) == 3  # what a run of the same list was asked for before the other is not the last any more
    assert len(again(forgettings=1)) == 4
    assert len(again(forgettings=1, wanted="captions")) == 5
    monkeypatch.setattr(time, "time", lambda: 0.0)  # clocks of machines do not count, but that of the store
    assert len(again(forgettings=1, wanted="captions")) == 5
    now = store.now()
    monkeypatch.setattr(type(store), "now", lambda _: now + AGAIN_S + 60)
    found = again(forgettings=1, wanted="captions")
    assert [run_number(path) for path in found] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_finds_everything_made_of_a_list_that_was_cut_anew_is_recorded(store: Store) -> None:
    """Else gc would delete the segments, and every plan read the list."""
    verdicts = plan(GRAPH, {"source": "s", "captions": "c"}, "p", store, {})
    for segments in (["0" * 64], ["1" * 64], ["1" * 64]):
        record_run(store, "p", GRAPH, verdicts, None, 0, {"pairs"}, segments, repeated=True)
    runs = [read_record(store, entry.path, RunRecord) for entry in store.list("runs/p/")]
    assert [run.segments for run in runs if run] == [("0" * 64,), ("1" * 64,)]


def test_a_run_follows_the_highest_number_whatever_the_clock_says(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine a year ahead is the last only until the next run."""

    def ask(source: str) -> None:
        verdicts = plan(GRAPH, {"source": source, "captions": "c"}, "p", store, {})
        record_run(store, "p", GRAPH, verdicts)

    with monkeypatch.context() as ahead:
        ahead.setattr(time, "time", lambda: 4e9)
        ask("ahead")
    ask("s")
    assert last_run(store, "p")["source"].key == "s"
    assert [run.stages["source"].key for run in overview(store, "p").runs] == ["s", "ahead"]
    assert all(run.at < 4e9 for run in overview(store).runs)


def test_runs_that_begin_at_once_share_a_number_and_names_decide(store: Store) -> None:
    run = RunRecord("p", {}, 0, ())
    for name in ("ffffffff", "00000000"):
        create_record(store, f"runs/p/00000007-{name}.json", run)
    assert [entry.path[-13:-5] for entry in run_entries(store, "p")] == ["00000000", "ffffffff"]
    record_run(store, "p", {}, [])
    assert [run_number(entry.path) for entry in run_entries(store, "p")] == [7, 7, 8]


def test_a_number_that_nobody_can_follow_is_said(store: Store) -> None:
    create_record(store, "runs/p/99999999-00000000.json", RunRecord("p", {}, 0, ()))
    with pytest.raises(UserError, match=r"runs/p/99999999-00000000\.json has the last number .*: delete it"):
        record_run(store, "p", {}, [])


def test_what_is_no_run_is_nobodys_last_run(store: Store) -> None:
    record_run(store, "p", GRAPH, plan(GRAPH, {"source": "s", "captions": "c"}, "p", store, {}))
    for name in ("x", "20300101T000000.000000-00000000", "00000002", "x/00000002-00000000"):
        store.create(f"runs/p/{name}.json", b"{}")
    store.create("runs/p/00000003-00000000.json", b"damaged")
    assert last_run(store, "p")["source"].key == "s"
