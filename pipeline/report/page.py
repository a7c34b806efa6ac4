"""Writes the report: one HTML file that holds everything it shows, and its twin for programs, after every stage."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.graph.keys import flatten
from pipeline.graph.stages import Graph, Stage
from pipeline.report.comparison import comparison_section
from pipeline.report.data import data_section
from pipeline.report.document import document
from pipeline.report.evaluation import evaluation_section
from pipeline.report.html import ENVIRONMENT, PARTS, Section, attempt, facts
from pipeline.report.images import Album
from pipeline.report.inputs import ComparedBundle, ReportInput
from pipeline.report.lineage import lineage_section
from pipeline.report.longer import train_longer
from pipeline.report.samples import samples_section
from pipeline.report.summary import HEAD, head
from pipeline.report.training import codec_section, training_section
from pipeline.store import Store
from pipeline.store.crash import crash_point

# Of an unfinished page. axe-core objects to any refresh, but a page without script has no other way to reload.
REFRESH_S = 30
SHOWN_SIDE = 512  # pixels


def write_report(
    store: Store,
    config: Config,
    graph: Graph,
    artifacts: Mapping[str, Artifact],
    path: Path,
    running: Sequence[Artifact] = (),
    album: Album | None = None,
    other: ComparedBundle | None = None,
) -> None:
    """Writes the report of the artefacts that exist so far, and a .json of it for programs, each atomically.

    What is missing, damaged or odd in the store becomes a line in the report.

    Args:
        store: Store of the artefacts.
        config: Configuration that the graph was built from.
        graph: Stages in order, all of them.
        artifacts: Artefacts that are made, by stage.
        path: File to write.
        running: Artefacts, as far as they go, of trainings that are not done.
        album: Rule of which of other people's images are shown; all of them without one.
        other: Bundle to compare with; the project's release without one.

    Raises:
        UserError: The file cannot be written.
    """
    given = ReportInput(store, artifacts, album or Album(), path.parent, other)
    page = render(given, config, graph, running)
    twin = document(given, config, graph, running)
    replace_file(path.with_suffix(".json"), twin)
    replace_file(path, page)


def replace_file(path: Path, text: str, remedy: str = "choose another run.output") -> None:
    """Writes a page or its twin, atomically. Raises UserError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A lone surrogate, as in the name of a file that is not UTF-8, cannot be encoded.
            temporary.write_bytes(text.encode("utf-8", "replace"))
            crash_point("report.before_replace")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}); {remedy}") from e


def render(given: ReportInput, config: Config, graph: Graph, running: Sequence[Artifact] = ()) -> str:
    """Returns the page as text, under 5 MiB, without script or any outside resource."""
    artifacts = given.artifacts
    in_order = [name for name in graph if name in artifacts]
    trained = [artifacts[name] for name in in_order if "samples_seen" in artifacts[name].metrics]
    shown = attempt("The summary", head, config, graph, artifacts, running)
    compared = attempt("The comparison with another bundle", comparison_section, given, config.project)
    learns = attempt("The evaluation", evaluation_section, given)
    sections = (
        attempt("What to train longer", _longer, given, config.run.output),
        attempt("The samples", samples_section, given),
        *((compared, learns) if given.other else (learns, compared)),
        attempt("The data", data_section, given),
        attempt("The codec", codec_section, given),
        attempt("The trainings", training_section, given, trained, running),
        *(attempt(f"The section of {name}", _own_section, given, graph[name]) for name in in_order),
        attempt("The lineage", lineage_section, artifacts),
        attempt("Environment and settings", _environment_section, config, [artifacts[name] for name in in_order]),
    )
    refresh = REFRESH_S if any(s.kind == "result" and s.name not in artifacts for s in graph.values()) else None
    contents = [section for section in sections if isinstance(section, Section)]
    page = ENVIRONMENT.get_template("page.html")
    return page.render(
        project=config.project, kind="report", refresh=refresh, head=shown, sections=sections, contents=contents
    )


def _longer(given: ReportInput, output: str) -> Markup:
    lines = train_longer(given, output)
    return HEAD.longer(lines) if lines else Markup()


def _own_section(given: ReportInput, stage: Stage) -> Markup:
    """Shows what a stage declares for it; of images nothing where licences decide, as theirs are not known."""
    shown = stage.show(given.store, given.artifacts[stage.name]) if stage.show else {}
    images = {name: data for name, data in shown.items() if isinstance(data, bytes)}
    rest = {name: value for name, value in shown.items() if name not in images}
    figures = [
        PARTS.figure(attempt(name, given.album.image, data, SHOWN_SIDE, name), name)
        for name, data in images.items()
        if given.album.licenses is None
    ]
    parts = [facts(rest), PARTS.beside(figures)]
    return Section.of(PARTS.own, f"stage-{stage.name}", stage.name, parts) if shown else Markup()


def _environment_section(config: Config, artifacts: Sequence[Artifact]) -> Markup:
    settings = [attempt(f"The settings of {made.stage}", _settings, made.stage, made.recipe) for made in artifacts]
    settings.append(attempt("The run settings", lambda: _settings("run", flatten(config.run))))
    parts = [
        attempt("The environment", lambda: PARTS.folded("Packages and devices", facts(_environment(artifacts)))),
        PARTS.folded("Settings of every stage", Markup().join(settings)),
    ]
    return Section.of(HEAD.environment, "environment", "Environment and settings", parts)


def _settings(name: str, values: Mapping[str, Any]) -> Markup:
    return PARTS.folded(name, facts(values)) if values else Markup()


def _environment(artifacts: Sequence[Artifact]) -> dict[str, str]:
    """Returns one value a name where all artefacts agree; else each value with the stages that were made with it."""
    seen: dict[str, dict[str, list[str]]] = {}
    for artifact in artifacts:
        for name, value in artifact.environment.items():
            seen.setdefault(name, {}).setdefault(str(value), []).append(artifact.stage)
    return {
        name: next(iter(values)) if len(values) == 1 else "; ".join(f"{v} ({', '.join(s)})" for v, s in values.items())
        for name, values in seen.items()
    }
