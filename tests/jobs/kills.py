"""Commands in processes of their own that are killed at named points."""

import dataclasses
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import jobs.cli
import jobs.data
import jobs.run
from pipeline.data.source import reader
from pipeline.graph.artifacts import read_shards
from pipeline.store import Store
from tests.faults import artifact
from tests.reader_thread import IN_A_THREAD

FORKED = multiprocessing.get_context("forkserver")
IN_SHARDS = ("blob.created", "shard.before_record", "shard.after_record")
IN_ARTIFACTS = ("artifact.before_record", "artifact.after_record")
IN_DRIVER = ("pin.before_swap", "report.before_replace")


def _within(environment: Mapping[str, str], target: Callable[..., int | None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    reader.subprocess = IN_A_THREAD
    sys.exit(target(*arguments))


def forked(target: Callable[..., int | None], *arguments: Any, **environment: str) -> int:
    """The exit code of a process that calls ``target``."""
    process = FORKED.Process(target=_within, args=(environment, target, arguments))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def killed_everywhere(
    points: tuple[str, ...], folder: Path, target: Callable[..., int | None], *arguments: Any
) -> set[str]:
    """Call ``target`` in new processes until one ends; returns the points at which the others were killed."""
    folder.mkdir(exist_ok=True)
    wanted = ",".join(f"{point}@{folder}" for point in points)
    before = len(list(folder.iterdir()))
    for kills in range(500):
        code = forked(target, *arguments, UNCLIP_CRASH=wanted)
        if code == 0:
            assert len(list(folder.iterdir())) - before >= kills  # threads may come to two points at once
            return {file.name.partition(" ")[0] for file in folder.iterdir()}
        assert code == -signal.SIGKILL
    raise AssertionError("it is killed again and again")


def contents(store: Store, stage: str) -> Any:
    """All of a stage's only artefact that is part of its result."""
    made = artifact(store, stage)
    listed = read_shards(store, made) if made.shard_table else []
    return made.key, made.blobs, made.metrics, made.ledger, [dataclasses.asdict(shard) for shard in listed]


def unclip(*words: object) -> int:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return jobs.cli.main([str(word) for word in words])
