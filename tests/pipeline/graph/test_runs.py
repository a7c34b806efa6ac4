"""What a run that finds everything made writes down."""

import time

import pytest

from pipeline.build import build
from pipeline.config import load_config
from pipeline.graph.plan import plan
from pipeline.graph.runs import AGAIN_S, asked_at, remember_again
from pipeline.store import Store

GRAPH = build(load_config("configs/nano.yaml"))


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
