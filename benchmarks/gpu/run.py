"""Part 11: the chain at nano size by ``unclip run``, on the device through Ray and on the CPU alone: the same keys."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import unclip
from benchmarks.gpu.bench import Bench, Outcome
from pipeline.config import TRAININGS, preset_config

LOSSES = 0.05  # of the last losses of a training, whose rows, noise and dropout are the same on both
COSINE = 0.99  # of each row's embeddings, by a CLIP that each device trained for itself
SCALE, QUICK = 0.1, 0.02  # of nano's samples
LAST = "decoder"  # on both; the device goes on to the samples, unless sizes are so small that only crashes count


def chain(bench: Bench) -> Outcome:
    """Runs the chain twice and compares keys, embeddings and losses. Each run has a store of its own.

    On the device, embeddings stream through an actor, and a training is a TorchTrainer with one worker; with a GPU, the
    decoder is compiled. The CPU's run works in one process, without Ray.
    """
    with tempfile.TemporaryDirectory() as folder:
        scale = QUICK if bench.quick else SCALE
        made = {}
        for where, until in (("device", LAST if bench.quick else "samples"), ("cpu", LAST)):
            config = Path(folder, f"{where}.yaml")
            through_ray = where == "device"
            values = _values(Path(folder, where), scale, through_ray, compiles=through_ray and bench.cuda)
            config.write_text(yaml.safe_dump(values))
            _run(config, until, visible=through_ray and bench.cuda)
            made[where] = unclip.open(config)
        return _compared(made["device"], made["cpu"])


def _values(folder: Path, scale: float, through_ray: bool, compiles: bool) -> dict[str, Any]:
    settings = vars(preset_config("nano").run)
    run: dict[str, Any] = {name: {"workers": 0} for name, each in settings.items() if hasattr(each, "workers")}
    if through_ray:
        run |= {name: {"workers": 1} for name in (*TRAININGS, "embeddings")}
    run["decoder"] |= {"compile": compiles}
    run["pairs"] |= {"timeout_s": 120.0}
    return {
        "project": "gpu-check",
        "preset": "nano",
        "scale": scale,
        "store": f"{folder / 'store'}",
        "source": {"paths": ["drawings:nano"], "shard_rows": 80},
        "samples": {"captions": ["a square yellow monster with horns"]},
        "run": {**run, "output": f"{folder / 'out'}"},
    }


def _run(config: Path, until: str, visible: bool) -> None:
    """Raises RuntimeError with the end of what the run printed, if it fails."""
    environment = os.environ | ({} if visible else {"CUDA_VISIBLE_DEVICES": ""})
    command = [sys.executable, "-m", "jobs.cli", "run", f"{config}", "--until", until, "--yes"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"unclip run {config.stem}: {(run.stderr or run.stdout)[-2000:]}")


def _compared(ours: unclip.Project, theirs: unclip.Project) -> Outcome:
    outcome = Outcome("")
    wanted = theirs.plan(until=LAST).wanted
    made = {name: (ours.artifact(name), theirs.artifact(name)) for name in ours.stages if name in wanted}
    for name, (one, other) in made.items():
        outcome.expect(one.key == other.key, f"{name}: keys differ: {one.key[:12]} and {other.key[:12]} on the CPU")
    apart = {name: _apart(*(each.metrics for each in made[name])) for name in TRAININGS if name in made}
    for name, share in apart.items():
        outcome.expect(share <= LOSSES, f"{name}: losses differ by {share:.1%}, at most {LOSSES:.0%}")
    cosine = min(cosines(*(each.table() for each in made["embeddings"])))
    outcome.expect(cosine >= COSINE, f"embeddings: a cosine of {cosine:.4f} between device and CPU, at least {COSINE}")
    seconds = {name: one.record.times["seconds"] for name, (one, _) in made.items()}
    outcome.values = {"losses": apart, "cosine": cosine, "seconds": seconds}
    outcome.line = (
        f"{len(made)} stages in {sum(seconds.values()):.0f} s, keys equal to the CPU's, losses within "
        f"{max(apart.values()):.1%}, cosines of embeddings {cosine:.4f} or more"
    )
    return outcome


def _apart(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    return abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"])


def cosines(ours: Any, theirs: Any) -> list[float]:
    """Returns the least cosine of rows for each of the two embeddings of a row."""
    found = []
    for name in ("image_embedding", "text_embedding"):
        one, other = (np.stack(table[name].to_numpy()).astype(np.float32) for table in (ours, theirs))
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        found.append(float(np.min(np.sum(one * other, axis=1) / norms)))
    return found
