"""The rounds of a probe, and where they are kept. What they measure of a real chain: test_plan.py."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import probe as probing
from jobs.project import open_project
from pipeline.cost.observed import Observation
from pipeline.graph.stages import Graph
from pipeline.store import Store, open_store
from tests.chain import write_config, write_list
from tests.seaweed import Server


@pytest.mark.parametrize(("spent", "rounds"), [(700.0, 2), (250.0, 2), (190.0, 3), (1.0, 4)])
def test_rounds_are_repeated_while_ten_minutes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spent: float, rounds: int
) -> None:
    """Two at least. All rounds train on as many samples, by the rate of the first small run."""
    project = open_project(write_config(tmp_path, str(tmp_path / "store"), "closed:1", [_listed(tmp_path)]))
    runs: list[dict[str, object]] = []
    clock = 0.0

    def run(path: str, overrides: list[str]) -> str:
        nonlocal clock
        clock += spent / 2
        runs.append({name: json.loads(value) for name, _, value in (word.partition("=") for word in overrides)})
        return "it broke" if len(runs) == 2 else ""

    def observe(store: Store, name: str, graph: Graph, held_out: float) -> dict[str, list[Observation]]:
        return {"decoder": [Observation(len(runs), 1.0, 0.5 + len(runs), 1, {})]}

    monkeypatch.setattr(probing, "_run", run)
    monkeypatch.setattr(probing, "observe", observe)
    monkeypatch.setattr(probing, "time", SimpleNamespace(monotonic=lambda: clock))
    told: list[str] = []
    found = probing.probe(project, "mine.yaml", [], told.append)
    assert len(runs) == 2 * rounds
    assert [one.amount for one in found["decoder"]] == list(range(1, 2 * rounds + 1))
    assert len({run["store"] for run in runs}) == len(runs)
    samples = [run["decoder.samples"] for run in runs]
    assert samples == samples[:2] * rounds
    assert samples[0] < samples[1]
    assert told.count("  it ended early: it broke") == 1


def _listed(folder: Path) -> Path:
    return write_list(folder / "list.csv", 0, 12)


def test_scratch_stores_of_a_cluster_lie_beside_the_store_and_leave_nothing(s3: Server) -> None:
    store = open_store(f"{s3.url}/probed")
    store.create("runs/mine", b"1")
    with probing._scratch(store, "folder") as place:
        assert place.startswith(f"{store.url}/")
        open_store(f"{place}/store-1-0").create("blobs/00/other", b"2")
        assert len(list(store.list(""))) == 2
    assert [entry.path for entry in store.list("")] == ["runs/mine"]


def test_the_scratch_store_of_a_folder_is_a_temporary_folder(tmp_path: Path) -> None:
    with probing._scratch(open_store(str(tmp_path / "store")), "folder") as place:
        assert place == "folder"
