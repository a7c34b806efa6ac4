"""Writes the page's content as JSON: verdict, stages, figures, samples, the comparison with another bundle."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.config import Config
from pipeline.evaluate.figure import DOCUMENT, finite, without_values
from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Graph
from pipeline.report.comparison import changes_behind, compared_figures, find_other
from pipeline.report.inputs import ReportInput
from pipeline.report.lineage import worker_hours
from pipeline.report.longer import train_longer
from pipeline.report.samples import asked_for, sample_names
from pipeline.report.summary import verdict

FORMAT = 1


def document(given: ReportInput, config: Config, graph: Graph, running: Sequence[Artifact] = ()) -> str:
    """Returns JSON; what cannot be read is null, and ``cannot_be_shown`` says why. docs/report.md names the fields."""
    parts: dict[str, Callable[[], Any]] = {
        "verdict": lambda: verdict(graph, given.artifacts, running),
        "train_longer": lambda: train_longer(given, config.project),
        "stages": lambda: [
            _stage(name, given.artifacts.get(name)) for name in [*graph, *given.artifacts.keys() - graph]
        ],
        "figures": lambda: _figures(given),
        "samples": lambda: _samples(given.artifacts.get("samples")),
        "against": lambda: _against(given, config.project),
    }
    found: dict[str, Any] = {"format": FORMAT, "project": config.project}
    found["written"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found["cannot_be_shown"] = {}
    for name, make in parts.items():
        try:
            found[name] = make()
        except Exception as e:  # a report must never stop a run
            found[name], found["cannot_be_shown"][name] = None, str(e) or type(e).__name__
    return json.dumps(finite(found), indent=1, ensure_ascii=False) + "\n"


def _stage(name: str, made: Artifact | None) -> dict[str, Any]:
    if made is None:
        return {"stage": name, "made": False}
    ledger = made.ledger
    lost = {"rejected": dict(ledger.rejected), "deferred": dict(ledger.deferred)}
    took = {"worker_hours": worker_hours(made)} if "seconds" in made.times else {}
    numbers = {name: value for name, value in made.metrics.items() if isinstance(value, int | float)}
    return {
        "stage": name,
        "made": True,
        "key": made.key,
        "inputs": dict(made.inputs),
        "rows": ledger.rows,
        "kept": ledger.kept,
        **lost,
        "metrics": numbers,
        "times": {**made.times, **took},
        "environment": dict(made.environment),
    }


def _figures(given: ReportInput) -> list[dict[str, Any]]:
    """Returns every figure of the evaluation, without the values of its rows."""
    made = given.artifacts.get("evaluation")
    if made is None:
        return []
    full = json.loads(given.read(made.blobs[DOCUMENT])) if DOCUMENT in made.blobs else made.metrics
    return without_values(full["figures"])


def _samples(made: Artifact | None) -> list[dict[str, Any]]:
    if made is None:
        return []
    found = []
    for name in sample_names(made):
        caption, seed = asked_for(made, name)
        found.append({"file": f"samples/{name}", "caption": caption, "seed": seed})
    return found


def _against(given: ReportInput, project: str) -> dict[str, Any] | None:
    """Returns how the bundle differs from another one, the release by default."""
    other = find_other(given, project)
    if other is None:
        return None
    found = compared_figures(given, other)
    figures = [] if isinstance(found, str) else [{**asdict(change), "verdict": change.verdict} for change, _ in found]
    data, recipes = changes_behind(given, other)
    why = {"not_compared": found} if isinstance(found, str) else {}
    return {"name": other.name, "bundle": other.bundle.key, "figures": figures, **why, "data": data, "recipes": recipes}
