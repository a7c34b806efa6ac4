"""Writes the page's content as JSON: verdict, stages, figures, samples, the comparison with another bundle.

The classes declare its objects, and docs/report.md shows them as tables.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypedDict

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


class StageReport(TypedDict, total=False):
    """A stage. An unfinished one has only the first two fields.

    Attributes:
        stage: Name of the stage.
        made: True where its artefact exists.
        key: Key of the artefact, 64 hexadecimal digits.
        inputs: Keys of the artefacts that it was made from, by stage.
        rows: Rows that the stage processed. Each is kept, rejected or deferred.
        kept: Rows that were kept.
        rejected: Rows that were rejected, by reason.
        deferred: Rows that ``unclip data retry`` retries, by reason.
        metrics: Numbers of the artefact, by name, such as the last ``loss`` and ``validation_loss`` of a training, and
            the ``samples_seen``.
        times: Seconds, rates and shares, by name. ``finished`` is in seconds since 1970, ``seconds`` the duration,
            ``worker_hours`` the duration in hours times the number of workers.
        environment: Versions of packages, device and precision with which it was made.
    """

    stage: str
    made: bool
    key: str
    inputs: dict[str, str]
    rows: int
    kept: int
    rejected: dict[str, int]
    deferred: dict[str, int]
    metrics: dict[str, float]
    times: dict[str, float]
    environment: dict[str, str]


class SampleReport(TypedDict):
    """An image of the stage ``samples``.

    Attributes:
        file: Path of the PNG, relative to the report.
        caption: Caption that was drawn.
        seed: Seed of the image.
    """

    file: str
    caption: str | None
    seed: int | None


class Comparison(TypedDict, total=False):
    """How this bundle, the second, differs from another one, the first.

    Attributes:
        name: Name of the other bundle, as ``--against`` has it, or "the release".
        bundle: Key of the other bundle.
        figures: Figures that both have on the same rows, worse ones first.
        not_compared: Reason why no figures are compared, if none are.
        data: A line for each stage whose rows differ.
        recipes: A line for each value of a recipe that differs.
    """

    name: str
    bundle: str
    figures: list[dict[str, Any]]
    not_compared: str
    data: list[str]
    recipes: list[str]


class ReportDocument(TypedDict):
    """Content of the file. If the store is damaged, a field may be null; ``cannot_be_shown`` has the reason.

    Numbers that are not finite are null.

    Attributes:
        format: Format of the document. Fields may be added to one.
        project: Name of the project.
        written: Time of writing in UTC, such as 2026-12-01T09:30:00Z.
        cannot_be_shown: Reasons why fields are null, by field.
        verdict: Sentence at the head of the page.
        train_longer: A sentence for each model with a failing claim: whether its validation loss still falls, the
            command that trains it four times as long, and the time.
        stages: Stages in the order in which they are made.
        figures: Figures of the evaluation; empty before it is made.
        samples: Images of the stage ``samples``; empty before it is made.
        against: Comparison with another bundle, by default the release; null without one.
    """

    format: int
    project: str
    written: str
    cannot_be_shown: dict[str, str]
    verdict: str | None
    train_longer: list[str] | None
    stages: list[StageReport] | None
    figures: list[dict[str, Any]] | None
    samples: list[SampleReport] | None
    against: Comparison | None


def document(given: ReportInput, config: Config, graph: Graph, running: Sequence[Artifact] = ()) -> str:
    """Returns a ReportDocument as JSON."""
    parts: dict[str, Callable[[], Any]] = {
        "verdict": lambda: verdict(graph, given.artifacts, running),
        "train_longer": lambda: train_longer(given, config.run.output),
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


def _stage(name: str, made: Artifact | None) -> StageReport:
    if made is None:
        return {"stage": name, "made": False}
    ledger = made.ledger
    took = {"worker_hours": worker_hours(made)} if "seconds" in made.times else {}
    numbers = {name: value for name, value in made.metrics.items() if isinstance(value, int | float)}
    return {
        "stage": name,
        "made": True,
        "key": made.key,
        "inputs": dict(made.inputs),
        "rows": ledger.rows,
        "kept": ledger.kept,
        "rejected": dict(ledger.rejected),
        "deferred": dict(ledger.deferred),
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


def _samples(made: Artifact | None) -> list[SampleReport]:
    if made is None:
        return []
    found: list[SampleReport] = []
    for name in sample_names(made):
        caption, seed = asked_for(made, name)
        found.append({"file": f"samples/{name}", "caption": caption, "seed": seed})
    return found


def _against(given: ReportInput, project: str) -> Comparison | None:
    """Returns how the bundle differs from another one, the release by default."""
    other = find_other(given, project)
    if other is None:
        return None
    found = compared_figures(given, other)
    data, recipes = changes_behind(given, other)
    against: Comparison = {
        "name": other.name,
        "bundle": other.bundle.key,
        "figures": [],
        "data": data,
        "recipes": recipes,
    }
    if isinstance(found, str):
        return {**against, "not_compared": found}
    return {**against, "figures": [{**asdict(change), "verdict": change.verdict} for change, _ in found]}
