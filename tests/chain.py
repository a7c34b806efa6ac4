"""The whole chain at the smallest size that is still real: for the tests of the commands."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from jobs.cli import main
from pipeline.data.source.drawings.listing import drawing_rows
from pipeline.data.source.drawings.world import HOST
from pipeline.graph.artifacts import load_artifact, read_shards
from pipeline.store import Store, open_store

Finished = subprocess.CompletedProcess[str]
ROOT = Path(__file__).parents[1]
DATA_STAGES = ("source", "captions", "pairs", "filter", "clip", "embeddings", "curation", "codec")

LIGHT = {"channels": 8, "patch": 8}  # an upsampler that takes an eighth of the nano preset's time
MICRO: dict[str, Any] = {
    "project": "micro",
    "preset": "nano",
    "source": {"shard_rows": 20},
    "clip": {"samples": 128, "batch": 32},
    "ar_prior": {"samples": 64, "batch": 32},
    "diffusion_prior": {"samples": 64, "batch": 32},
    "decoder": {"samples": 32, "batch": 16},
    "upsampler_256": {"samples": 16, "batch": 8, "model": LIGHT},
    "upsampler_1024": {"samples": 8, "batch": 8, "model": LIGHT},
    "bundle": {"sampling": {"prior_steps": 2, "decoder_steps": 2, "upsampler_256_steps": 2, "upsampler_1024_steps": 2}},
    "samples": {"captions": ["a red heart"]},
    "evaluation": {"rows": 8, "image_rows": 8, "upsampler_rows": 8, "samples": 2},
    "run": {"lease_s": 5}
    | {stage: {"workers": 0} for stage in ("pairs", "filter", "embeddings", "curation", "index", "codec")},
}


def write_list(path: Path, start: int, stop: int) -> Path:
    """Rows [start, stop) of the drawings as a CSV file, the ones at 1024 px and half of those for the test moved
    to the front."""
    listed = drawing_rows("nano-more")
    for_test = [row for row in listed if row.split == "test"][::2]
    rows = sorted(listed, key=lambda row: ("/1024/" not in row.url, row not in for_test))
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(("url", "caption", "group", "split", "license", "attribution"))
        writer.writerows(row._replace(captions=row.captions[0]) for row in rows[start:stop])
    return path


def write_config(folder: Path, store: str, pictures: str, lists: Sequence[Path | str], **changes: object) -> Path:
    """A configuration in ``folder``; ``pictures`` is the drawing server. ``changes`` replace top-level keys."""
    values = json.loads(json.dumps(MICRO)) | {"store": store} | changes
    values["source"] = {**values["source"], "paths": [str(path) for path in lists]}
    values["run"] = {**values["run"], "output": str(folder / "out")}
    # No row is given up because another test keeps the server of drawings from drawing.
    values["run"]["pairs"] = {"timeout_s": 120.0, **values["run"]["pairs"], "hosts": {HOST: pictures}}
    path = folder / "micro.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def unclip(*words: object, env: Mapping[str, str] | None = None, timeout: float = 900, cwd: Path = ROOT) -> Finished:
    """Run a command as a user does, in a process of its own."""
    command = [sys.executable, "-m", "jobs.cli", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | dict(env or {})
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def here(*words: object, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Finished:
    """Run a command in this process, which takes no second to start; logged lines are not in what it returns.

    A Ray that it starts ends with it, as it would with its process; its token stays, as a process can have but one.
    """
    out, err = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        if not _ray_runs():
            stack.callback(_end_ray)
        stack.enter_context(chdir(cwd))
        stack.enter_context(mock.patch.dict(os.environ, env or {}))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        try:
            code = main([*map(str, words)])
        except SystemExit as e:  # of argparse
            code = int(e.code or 0)
        token = os.environ.get("RAY_AUTH_TOKEN")
    if token:
        os.environ["RAY_AUTH_TOKEN"] = token
    return subprocess.CompletedProcess([*map(str, words)], code, out.getvalue(), err.getvalue())


def _ray_runs() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _end_ray() -> None:
    if _ray_runs():
        sys.modules["ray"].shutdown()


def done(process: Finished) -> str:
    """The output of a command that must have succeeded."""
    assert process.returncode == 0, f"exit {process.returncode}\n{process.stdout}\n{process.stderr}"
    return process.stdout


def keys(store: Store) -> dict[str, set[str]]:
    """The keys of all artefacts by stage."""
    found: dict[str, set[str]] = {}
    for entry in store.list("artifacts/"):
        _, stage, name = entry.path.split("/")
        found.setdefault(stage, set()).add(name.removesuffix(".json"))
    return found


def data_blobs(store: Store) -> dict[str, list[str]]:
    """Every blob that the data stages' artefacts name, through their shards too, by stage and sorted."""
    blobs = {}
    for stage in DATA_STAGES:
        names: set[str] = set()
        for key in keys(store)[stage]:
            artifact = load_artifact(store, stage, key)
            assert artifact is not None
            names |= set(artifact.blobs.values())
            if artifact.shard_table:
                names |= {artifact.shard_table} | {b for s in read_shards(store, artifact) for b in s.blobs.values()}
        blobs[stage] = sorted(names)
    return blobs


def shard_paths(store: Store, stage: str) -> set[str]:
    """The shard records of a stage."""
    return {entry.path for entry in store.list(f"shards/{stage}/")}


def open_at(url: str | Path) -> Store:
    return open_store(str(url))


def refused(
    *words: object,
    says: str | Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> Finished:
    """Run a command that must be refused with one line that holds ``says``, or all of them."""
    process = here(*words, env=env, cwd=cwd)
    assert "Traceback" not in process.stderr + process.stdout
    assert process.returncode == 2, process.stdout + process.stderr
    lines = [line for line in process.stderr.splitlines() if not line.startswith("  ")]  # progress is indented
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    for text in [says] if isinstance(says, str) else says:
        assert text in lines[0]
    return process
