"""A project small enough for thousands of runs, with the shapes of the real one, and the real commands on it.

Source, captions, forgetting and retries are the pipeline's own; the other stages copy what the real ones leave in a
store: shards with rows, a pinned model, a training with checkpoints and previews, a bundle, its evaluation.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pyarrow as pa

import jobs.data
import jobs.pin
import jobs.release
from jobs.project import Project
from pipeline.config import Run
from pipeline.data.source import lists as source_lists
from pipeline.data.source import stage as source_stage
from pipeline.data.source.journal import read_journal
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.rows import counted_of
from pipeline.data.source.source import ListPart, ListRow
from pipeline.data.source.stage import run_captions, run_source, scan
from pipeline.graph import artifacts, leases, runs
from pipeline.graph import execute as execution
from pipeline.graph.artifacts import (
    Artifact,
    Shard,
    ShardRow,
    publish_artifact,
    publish_shard,
    read_shard,
    read_shards,
    read_table,
    write_shard_table,
    write_table,
)
from pipeline.graph.execute import execute
from pipeline.graph.runs import record_run
from pipeline.graph.stages import Context, Graph, Stage, shard_key, trajectory_key
from pipeline.ledger import Ledger
from pipeline.local import PathPolicy
from pipeline.release.pointer import read_releases
from pipeline.settings import ReleaseGates, TrainingSettings
from pipeline.store.records import digest, put_blob, read_blob
from tests.machine.driver import Clock, StepStore
from tests.machine.stranger import seal_as_it_is

LEASE_S = 4.0
SHARD_ROWS = 2


@dataclass(frozen=True)
class Plain:
    """A recipe without fields."""


@dataclass(frozen=True)
class Trained:
    samples: int = 2
    decay: int = 0
    batch: int = 1


@dataclass
class List:
    """The rows of a user's list. Of a reference with "slow" the first fetch fails, with "dead" each."""

    rows: list[str] = field(default_factory=list)

    def read(self, *_: Any) -> Iterator[ListRow]:
        for url in self.rows:
            yield ListRow(url, (f"caption of {url}",), split="train")


def graph(source: SourceRecipe) -> Graph:
    """Returns the stages, in order."""
    stages = [
        Stage("source", 1, source, (), run_source, "source"),
        Stage("captions", 1, source, (), run_captions, "source"),
        Stage("pairs", 1, Plain(), ("source",), _pairs),
        Stage("clip", 1, Plain(), ("pairs",), _clip, pinned=True),
        Stage("curation", 1, Plain(), ("pairs", "captions", "clip"), _curation),
        Stage(
            "decoder", 1, Trained(), ("curation", "clip"), _decoder, "training", settings=TrainingSettings(workers=0)
        ),
        Stage("bundle", 1, Plain(), ("clip", "decoder"), _bundle, "bundle"),
        Stage("evaluation", 1, Plain(), ("bundle", "curation"), _evaluation, "result"),
    ]
    return {stage.name: stage for stage in stages}


def _shards(ctx: Context, name: str, make: Callable[[ShardRow], tuple[Ledger, dict[str, bytes]]]) -> Artifact:
    made: list[Shard] = []
    for row in read_shards(ctx.store, ctx.inputs[name]):
        whole = {other: artifact.key for other, artifact in ctx.inputs.items() if other != name}
        key = shard_key(ctx, {name: row.key, **whole})
        shard = read_shard(ctx.store, ctx.stage, key)
        if shard is None:
            ledger, blobs = make(row)
            note = {"note.times": json.dumps([ctx.began, ctx.stage]).encode()}
            made_of: Any = {**blobs, **note}, {}, {name: row.key}
            shard = publish_shard(ctx.store, ctx.stage, row.number, key, ledger, *made_of)
        made.append(replace(shard, number=row.number))
    table, ledger = write_shard_table(ctx.store, made)
    return publish_artifact(ctx.store, ctx.publishable(shard_table=table, ledger=ledger), 0.0)


def _pairs(ctx: Context) -> Artifact:
    def fetch(row: ShardRow) -> tuple[Ledger, dict[str, bytes]]:
        refs = read_table(ctx.store, row.blobs["refs"])
        table = refs.to_pylist()
        ends = [_ended(each["url"], counted) for each, counted in zip(table, counted_of(refs), strict=True)]
        reasons = [each["reject"] or end for each, end in zip(table, ends, strict=True)]
        urls = [each["url"] if not reason else "" for each, reason in zip(table, reasons, strict=True)]
        hashes = [digest(url) if url else "" for url in urls]
        index = {"url": urls, "sha256": hashes, "reason": pa.array(reasons, pa.string())}
        return Ledger.count(reasons), {"index": write_table(index), "tar": f"images {urls}".encode()}

    return _shards(ctx, "source", fetch)


def _ended(url: str, counted: str) -> str | None:
    return "http_4xx" if "dead" in url else "timeout" if "slow" in url and "try" not in counted else None


def _clip(ctx: Context) -> Artifact:
    blobs = {"model.safetensors": put_blob(ctx.store, f"clip of {ctx.inputs['pairs'].key}".encode())}
    return publish_artifact(ctx.store, ctx.publishable(blobs=blobs, ledger=Ledger()), 0.0)


def _curation(ctx: Context) -> Artifact:
    read_blob(ctx.store, ctx.inputs["clip"].blobs["model.safetensors"])

    def keep(row: ShardRow) -> tuple[Ledger, dict[str, bytes]]:
        urls = read_table(ctx.store, row.blobs["index"], ["url"])["url"].to_pylist()
        kept = [url for url in urls if url]
        return Ledger(len(kept)), {"keep": f"kept {kept}".encode()}

    return _shards(ctx, "pairs", keep)


def _decoder(ctx: Context) -> Artifact:
    rows = [read_blob(ctx.store, shard.blobs["keep"]) for shard in read_shards(ctx.store, ctx.inputs["curation"])]
    for samples in range(1, ctx.recipe.samples + 1):
        state = put_blob(ctx.store, f"state of {ctx.key} at {samples}".encode())
        journal = {"lines": [], "sums": {}, "steps": 0}
        body = {
            "samples": samples,
            "attempt": 1,
            "seconds": 0.0,
            "laps": {},
            "journal": journal,
            "blobs": {"state": state},
        }
        sealed = seal_as_it_is(body)  # the training's own records need torch
        ctx.store.create(f"checkpoints/{trajectory_key(ctx)}/{samples:012d}-0001.json", sealed)
    blobs = {
        "model.safetensors": put_blob(ctx.store, f"decoder {ctx.key}".encode()),
        "previews/1.png": put_blob(ctx.store, b"preview of " + b"".join(rows)),
    }
    return publish_artifact(ctx.store, ctx.publishable(blobs=blobs, ledger=Ledger()), 0.0)


def _bundle(ctx: Context) -> Artifact:
    blobs = {f"{name}/model.safetensors": made.blobs["model.safetensors"] for name, made in ctx.inputs.items()}
    blobs["README.md"] = put_blob(ctx.store, b"a bundle")
    return publish_artifact(ctx.store, ctx.publishable(blobs=blobs, ledger=Ledger()), 0.0)


def _evaluation(ctx: Context) -> Artifact:
    rows = [read_blob(ctx.store, shard.blobs["keep"]) for shard in read_shards(ctx.store, ctx.inputs["curation"])]
    for blob in ctx.inputs["bundle"].blobs.values():
        read_blob(ctx.store, blob)
    document = {"version": 1, "recipe": {}, "rows": {}, "figures": []}
    blobs = {
        "evaluation.json": put_blob(ctx.store, json.dumps(document).encode()),
        "images.png": put_blob(ctx.store, b"beside " + b"".join(rows)),
    }
    return publish_artifact(ctx.store, ctx.publishable(blobs=blobs, ledger=Ledger()), 0.0)


class House:
    """The projects of one store, by name. Commands take the store of the driver that runs them."""

    def __init__(self, clock: Clock, projects: Sequence[str]):
        self.clock = clock
        self.lists = {name: List() for name in projects}

    @contextlib.contextmanager
    def living(self) -> Iterator[None]:
        """Lets everything that runs inside see the clock and the lists of this house."""
        count = iter(range(10**9))
        tokens = SimpleNamespace(token_hex=lambda n=8: f"{next(count):0{2 * n}x}")
        with ExitStack() as stack:
            for module in (leases, runs, jobs.release, execution):
                if hasattr(module, "time"):
                    stack.enter_context(mock.patch.object(module, "time", self.clock))
            for module in (leases, runs):
                stack.enter_context(mock.patch.object(module, "secrets", tokens))
            for module in (source_lists, source_stage):
                stack.enter_context(mock.patch.object(module, "parts_of", self._parts))
            stack.enter_context(mock.patch.object(source_stage, "unread", return_value=""))
            stack.enter_context(mock.patch.object(jobs.data, "path_policy", return_value=PathPolicy()))
            stack.enter_context(mock.patch.object(jobs.data, "build", lambda config: graph(config.source)))
            stack.enter_context(mock.patch("time.sleep"))
            # What takes most of the time, and nothing that the machine asks about depends on it.
            stack.enter_context(mock.patch.object(artifacts, "environment", dict))
            stack.enter_context(mock.patch("os.fsync"))
            for module, name in ((jobs.data, "open_as_run"), (jobs.pin, "open_as_run"), (jobs.release, "project_of")):
                stack.enter_context(mock.patch.object(module, name, self._again))
            log, before = logging.getLogger("unclip"), logging.getLogger("unclip").disabled
            log.disabled = True
            stack.callback(setattr, log, "disabled", before)
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield

    def _parts(self, path: str) -> list[ListPart]:
        return [ListPart(path, lambda: self.lists[path].rows[:], self.lists[path].read)]

    def config(self, store: StepStore, name: str) -> Any:
        """Returns what stands for a project's configuration."""
        source = SourceRecipe((name,), shard_rows=SHARD_ROWS)
        gates = ReleaseGates()
        return SimpleNamespace(project=name, source=source, store=store, run=Run(lease_s=LEASE_S), release=gates)

    def project(self, store: StepStore, name: str, write: bool = False) -> Project:
        """Returns a project as ``open_project`` does."""
        config, journal = self.config(store, name), read_journal(store, name)
        found = scan(config.source, store, write, journal, name)
        return Project(config, store, graph(config.source), found, journal)

    def _again(self, config: Any, store: Any = (), write: bool = False) -> Project:
        """Opens the project of a command line, whose configuration is a store and a name here."""
        place = config if isinstance(config, tuple) else (store, config.project)
        return self.project(*place, write=write)

    def run(self, store: StepStore, name: str) -> dict[str, Artifact]:
        """Makes what is stale, as ``unclip run`` does."""
        project = self.project(store, name, write=True)
        verdicts = project.plan()
        asked: Any = store, name, project.graph, verdicts
        made = all(verdict.state != "stale" for verdict in verdicts)
        record_run(*asked, forgettings=project.journal.forgettings, segments=project.scan.segments, repeated=made)
        if made:
            return project.finished(verdicts)
        config, wanted, nothing = project.config, set(project.graph), lambda *_: None
        return execute(project.graph, project.plan(), wanted, store, config, {}, nothing, nothing)

    def plan(self, store: StepStore, name: str) -> Any:
        return self.project(store, name).plan()

    def data(self, store: StepStore, name: str, action: str, **words: Any) -> int:
        """Runs ``unclip data ACTION``."""
        arguments: Any = SimpleNamespace(config=(store, name), overrides=(), json=False, **words)
        if action in ("gc", "check"):
            run = {"gc": jobs.data._collect, "check": jobs.data._check}[action]
            return run(self.config(store, name), store, arguments)
        commands = {"retry": jobs.data._retry, "forget": jobs.data._forget}
        return commands[action](self.project(store, name, write=True), arguments)

    def pin(self, store: StepStore, name: str, command: str, key: str | None = None) -> int:
        arguments: Any = SimpleNamespace(
            config=(store, name), overrides=(), command=command, stage="clip", key=key, dry_run=False
        )
        return jobs.pin.main(arguments)

    def release(self, store: StepStore, name: str, command: str) -> int:
        config = self.config(store, name)
        asked = jobs.release.ReleaseProject(name, config, store, read_releases(store, name))
        arguments: Any = SimpleNamespace(force="the machine says so", reason="", key=None, json=False)
        return jobs.release.RUNS[command](asked, arguments)
