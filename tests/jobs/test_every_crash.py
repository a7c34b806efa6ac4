"""Every crash point is passed with every object once, and each time the process is killed there.

A run is started again until it ends. The processes are forked from one that has imported everything and run nothing, so
that hundreds of them take no longer than a few that start as a user starts them.
"""

import importlib
import inspect
import pkgutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline.data
from pipeline.build import build
from pipeline.config import make_config
from pipeline.data.codec import fit as codec_fit
from pipeline.data.curation import near_rows
from pipeline.data.neighbours import indices
from pipeline.data.neighbours.exchange import Fan
from pipeline.data.neighbours.stage import IndexRecipe
from pipeline.data.source import passes
from pipeline.data.source.journal import read_journal
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.stage import scan
from pipeline.graph import shards
from pipeline.graph.artifacts import Artifact, Shard, load_artifact, read_shards
from pipeline.graph.stages import Context
from pipeline.graph.workers import ShardWorker
from pipeline.store import Store
from pipeline.store.records import blob_path
from tests.chain import keys, open_at
from tests.faults import artifact
from tests.jobs.kills import FORKED, IN_ARTIFACTS, IN_DRIVER, IN_SHARDS, contents, forked, killed_everywhere, unclip
from tests.pipeline.data import vectors
from tests.pipeline.data.bench import picture, save_clip, write_list

FORKED.set_forkserver_preload([__name__])
SLOW = pytest.mark.slow
VALUES: dict[str, Any] = {
    "project": "crash",
    "preset": "nano",
    "store": "store",
    "source": {"paths": ["list.csv"]},
    "thresholds": {"similarity": 0.05},
    "curation": {"near_duplicate": 0.8, "near_held_out": 0.8},
    "index": {"flat_rows": 256},
    "codec": {"components": 4, "buckets": 8},
    "ar_prior": {"model": {"buckets": 8}},
}
GRAPH = build(make_config(VALUES))
STAGES = [GRAPH[name] for name in ("thresholds", "curation", "index", "codec")]
STAGES.append(replace(GRAPH["index"], name="flat", recipe=IndexRecipe()))  # as the index of a small list is
BEFORE = {"Packer", "Captioner", "CaptionJoin", "FilterRows", "Encoder"}  # the workers of the stages before
IN_LISTS = {"ReadParts", "CompareReferences", "CutSpool"}  # those over a list: test_in_every_pass_over_a_list


def workers() -> set[str]:
    """The names of all classes of the data stages that make shards."""
    found = set()
    for module in pkgutil.walk_packages(pipeline.data.__path__, "pipeline.data."):
        for name, value in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            call = vars(value).get("__call__")
            if value.__module__ == module.name and call and "task" in inspect.signature(call).parameters:
                found.add(name)
    return found


def make_passes(url: str, inputs: dict[str, Artifact], seen: str) -> None:
    """All stages after embeddings, cut as a large list is. A file in ``seen`` for each class of workers."""
    for module, name, value in (
        (near_rows, "FIRST_ROWS", 150),
        (near_rows, "BLOCK_ROWS", 120),
        (near_rows, "CLUSTER_ROWS", 25),
        (near_rows, "GROUP_ROWS", 100),
        (near_rows, "ROWS_FAN", Fan(2, 2)),
        (indices, "CODED_BLOCK_ROWS", 250),
        (codec_fit, "BLOCK_ROWS", 200),
    ):
        setattr(module, name, value)
    make = shards.make_shard

    def noting(
        store: Store, stage: str, worker: shards.ShardWorker, task: shards.ShardTask, clock: shards.WorkerClock
    ) -> tuple[shards.Shard, shards.WorkTimes]:
        Path(seen, type(worker).__name__).touch()
        return make(store, stage, worker, task, clock)

    shards.make_shard = noting
    store, made = open_at(url), dict(inputs)
    for stage in STAGES:
        ctx = vectors.context(store, stage, made)
        made[stage.name] = load_artifact(store, stage.name, ctx.key) or stage.run(ctx)


@pytest.mark.parametrize(
    "points",
    [
        IN_ARTIFACTS[:1],
        pytest.param(IN_ARTIFACTS[1:], marks=SLOW),
        pytest.param(("shard.before_record",), marks=SLOW),
        pytest.param(("shard.after_record",), marks=SLOW),
        pytest.param(("blob.created",), marks=SLOW),
    ],
)
def test_in_every_pass_after_embeddings(
    points: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "SHARD_ROWS", 125)
    rows, *_ = vectors.planted(500, 64, 60, 0, 0.7)
    splits = ["validation" if i % 10 == 3 else "test" if i % 10 == 7 else "train" for i in range(500)]
    calm, killed = (open_at(tmp_path / name) for name in ("calm", "killed"))
    given = [vectors.publish(store, vectors.Listed(rows, splits, [64] * 500)) for store in (calm, killed)]
    for name in ("seen", "again"):
        (tmp_path / name).mkdir()
    assert forked(make_passes, calm.url, given[0], str(tmp_path / "seen")) == 0
    assert {file.name for file in (tmp_path / "seen").iterdir()} == workers() - BEFORE - IN_LISTS
    found = killed_everywhere(points, tmp_path / "kills", make_passes, killed.url, given[1], str(tmp_path / "again"))
    assert found == set(points)
    if "shard.before_record" in points:  # once for every shard that there is
        records = [e.path.replace("/", " ") for s in STAGES for e in killed.list(f"shards/{s.name}/")]
        kills = {file.name for file in (tmp_path / "kills").iterdir()}
        assert {f"shard.before_record {name}" for name in records} <= kills
    for stage in STAGES:
        assert contents(killed, stage.name) == contents(calm, stage.name)
    assert all(entry.path in {e.path for e in calm.list("blobs/")} for entry in killed.list("blobs/"))


def read_files(url: str, folder: str, seen: str) -> None:
    """Reads a folder of files in passes. A file in ``seen`` for each class of workers."""
    passes.TASK_BYTES = 1
    run = passes._run

    def noting(ctx: Context, worker: ShardWorker, *rest: Any) -> list[Shard]:
        Path(seen, type(worker).__name__).touch()
        return run(ctx, worker, *rest)

    passes._run = noting
    scan(SourceRecipe((folder,), shard_rows=4), open_at(url), write=True)


@pytest.mark.parametrize("point", IN_SHARDS)
def test_in_every_pass_over_a_list(point: str, tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    for name, numbers in (("a", range(6)), ("b", range(4, 11))):
        folder.mkdir(exist_ok=True)
        write_list(folder / f"{name}.csv", [(f"http://h/{i}.png", f"picture {i}") for i in numbers])
    (tmp_path / "seen").mkdir()
    calm, killed = (open_at(tmp_path / name) for name in ("calm", "killed"))
    assert forked(read_files, calm.url, str(folder), str(tmp_path / "seen")) == 0
    assert {file.name for file in (tmp_path / "seen").iterdir()} == IN_LISTS
    given = killed.url, str(folder), str(tmp_path / "seen")
    assert killed_everywhere((point,), tmp_path / "kills", read_files, *given) == {point}
    assert paths(killed, "") == paths(calm, "")
    assert scan(SourceRecipe((str(folder),), shard_rows=4), killed, write=False).rows == 11


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip") / "clip")


def configure(folder: Path, clip: str) -> Path:
    """A configuration in a folder of its own, over pictures beside it, of which one is missing."""
    pictures = folder.parent / "pictures"
    if not pictures.exists():
        pictures.mkdir()
        for i in range(1, 16):
            (pictures / f"{i}.png").write_bytes(picture(i))
        rows = [(f"file://{pictures}/{i}.png", f"picture {i}", "test" if i == 5 else "train") for i in range(16)]
        write_list(folder.parent / "list.csv", rows)
    folder.mkdir(exist_ok=True)
    stages = ("pairs", "embeddings", "thresholds", "curation", "index", "codec")
    values = VALUES | {
        "store": str(folder / "store"),
        "source": {"paths": [str(folder.parent / "list.csv")], "shard_rows": 8},
        "clip": {"weights": clip},
        "thresholds": {"similarity": 0.1},
        "curation": {"near_duplicate": 0.999, "near_held_out": 0.999},
        "codec": {"components": 3, "buckets": 8},
        "run": {"output": str(folder / "out"), "lease_s": 0.2} | {stage: {"workers": 0} for stage in stages},
    }
    (folder / "crash.yaml").write_text(yaml.safe_dump(values))
    return folder / "crash.yaml"


@SLOW
def test_in_every_stage_of_a_run(clip: str, tmp_path: Path) -> None:
    calm, killed = (configure(tmp_path / name, clip) for name in ("calm", "killed"))
    every = {*IN_SHARDS, *IN_ARTIFACTS, *IN_DRIVER}
    found = set()
    for until in ("source", "captions", "pairs", "embeddings", "index", "codec"):
        assert unclip("run", calm, "--until", until) == 0
        # Notes of what pairs took are other blobs each time.
        points = tuple(every - {"blob.created"} if until == "pairs" else every)
        found |= killed_everywhere(points, tmp_path / f"until {until}", unclip, "run", killed, "--until", until)
    assert found == every
    ours, theirs = (open_at(config.parent / "store") for config in (killed, calm))
    for stage in keys(theirs):
        assert contents(ours, stage) == contents(theirs, stage), stage


def test_in_what_changes_the_list_and_removes_objects(clip: str, tmp_path: Path) -> None:
    """In data retry, data forget, data gc and data check --repair, one after another."""
    calm, killed = (configure(tmp_path / name, clip) for name in ("calm", "killed"))
    ours, theirs = (open_at(config.parent / "store") for config in (killed, calm))

    def make() -> None:
        for config in (calm, killed):
            assert unclip("run", config, "--until", "pairs") == 0
        assert contents(ours, "pairs") == contents(theirs, "pairs")

    def kill(points: tuple[str, ...], command: str, *words: str) -> None:
        assert unclip("data", command, calm, *words) == 0
        folder = tmp_path / f"kills of {command}"
        assert killed_everywhere(points, folder, unclip, "data", command, killed, *words) == set(points)
        assert read_journal(ours, "crash") == read_journal(theirs, "crash")
        assert paths(ours, "artifacts/", "shards/") == paths(theirs, "artifacts/", "shards/")

    make()
    [reason] = artifact(ours, "pairs").ledger.rejected
    kill(("blob.created", "journal.before_swap"), "retry", "--reason", reason)
    kill(("journal.before_swap",), "forget", f"file://{tmp_path}/pictures/3.png")
    assert read_journal(ours, "crash").retries
    assert read_journal(ours, "crash").forgotten
    before = paths(ours, "blobs/", "artifacts/", "shards/")
    for config in (calm, killed):
        assert unclip("run", config, "--until", "pairs") == 0
    kill(("gc.before_delete",), "gc", "--yes", "--grace-hours", "0")
    assert before - paths(ours, "blobs/", "artifacts/", "shards/")
    path = blob_path(read_shards(ours, artifact(ours, "pairs"))[0].blobs["index"])
    Path(ours.url, path).write_bytes(b"rot")
    assert killed_everywhere(
        ("damage.before_delete",), tmp_path / "kills of check", unclip, "data", "check", killed, "--repair"
    ) == {"damage.before_delete"}
    make()
    assert len(list(ours.list(f"damaged/{path}."))) == 1


def paths(store: Store, *prefixes: str) -> set[str]:
    return {entry.path for prefix in prefixes for entry in store.list(prefix)}
