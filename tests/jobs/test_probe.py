"""The rounds of a probe, and where they are kept. What they measure of a real chain: test_plan.py."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from jobs import probe as probing
from jobs.project import Project, open_project
from pipeline.cost.observed import Observation
from pipeline.data.source.lists import read_rows
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import ListRow
from pipeline.data.source.stage import scan
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


def _sampled(folder: Path, project: Project) -> list[list[int]]:
    """Returns the places in the list of the rows of both runs, each of whose captions is its place."""
    probing._write_lists(project, folder)
    return [[int(row["caption"][0]) for row in pq.read_table(folder / f"{run}.parquet").to_pylist()] for run in (0, 1)]


@pytest.mark.parametrize("stored", [False, True])
def test_the_rows_of_both_runs_are_spread_over_a_list_that_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    """A long list is read from a few of its stored shards; what is not stored of it, at the beginning."""
    (tmp_path / "list.csv").write_text("url,caption\n" + "".join(f"http://closed.test/{i},{i}\n" for i in range(200)))
    config = write_config(
        tmp_path, str(tmp_path / "store"), "closed:1", [tmp_path / "list.csv"], source={"shard_rows": 10}
    )
    project = open_project(config)
    if stored:
        scan(project.config.source, project.store, write=True)
        project = open_project(config)
    read: list[str] = []

    def counted(path: str, recipe: SourceRecipe) -> Iterator[ListRow]:
        for row in read_rows(path, recipe):
            read.append(row.url)
            yield row

    monkeypatch.setattr(probing, "read_rows", counted)
    few, many = _sampled(tmp_path, project)
    assert (len(read), len(few), len(many)) == (200, 20, 60)
    assert set(few) < set(many)
    for places in (few, many):
        assert {b - a for a, b in pairwise(places)} <= {200 // len(places), 200 // len(places) + 1}
    read.clear()
    monkeypatch.setattr(probing, "READ_ROWS", 100)
    monkeypatch.setattr(probing, "READ_SHARDS", 10)
    few, many = _sampled(tmp_path, project)
    assert (len(read), len(few), len(many)) == (0 if stored else 100, 20, 60)
    shards = range(1, 20, 2) if stored else range(10)
    assert {place // 10 for place in few} == {place // 10 for place in many} == set(shards)


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
