"""The report: one HTML file that holds everything it shows, written again after every stage."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.graph.keys import flatten
from pipeline.report.data import data_section, embeddings_section
from pipeline.report.evaluation import evaluation_section
from pipeline.report.lineage import lineage_section
from pipeline.report.markup import attempt, facts, number, section, table, text
from pipeline.report.measured import measured_sections
from pipeline.report.pictures import Album
from pipeline.report.release import release_section
from pipeline.report.samples import samples_section
from pipeline.report.style import STYLE
from pipeline.report.training import codec_section, training_section, training_so_far
from pipeline.store import Store
from pipeline.store.crash import crash_point

if TYPE_CHECKING:
    from pipeline.config import Config

DATA = ("source", "captions", "pairs", "clip", "embeddings", "thresholds", "curation", "index")
MODELS = ("codec", "ar_prior", "diffusion_prior", "decoder", "upsampler_256", "upsampler_1024")
ENDS = ("samples", "evaluation")
# Of a page that is not finished. axe-core finds fault with any refresh, but without script there is no other way.
REFRESH_S = 30
LOOK_AT_ENVIRONMENT = (
    "Look here when a result differs from another machine's: keys agree everywhere, bytes only where all of this does."
)


def write_report(
    store: Store,
    config: Config,
    artifacts: Mapping[str, Artifact],
    path: Path,
    running: Artifact | None = None,
    album: Album | None = None,
) -> None:
    """Write the report of the artefacts that exist so far, and of a ``running`` training, atomically.

    ``album`` says which of other people's pictures it may show, None for all of them. What is missing, damaged or odd
    in the store becomes a line in the report. Raises UserError if the file cannot be written.
    """
    page = render(store, config, artifacts, running, album).encode("utf-8", "replace")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(page)
            crash_point("report.before_replace")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"report {path}: cannot be written ({e.strerror}); choose another run.output") from e


def render(
    store: Store,
    config: Config,
    artifacts: Mapping[str, Artifact],
    running: Artifact | None = None,
    album: Album | None = None,
) -> str:
    """The page as text, under 5 MiB, without script or any outside resource."""
    album = album or Album()
    chain = expected(config)
    head = attempt("The summary", _head, config, artifacts, chain, running)
    body = (
        attempt("The samples", samples_section, store, artifacts, album)
        + attempt("The evaluation", evaluation_section, store, artifacts, album)
        + attempt("The comparison with the release", release_section, store, config.project, artifacts)
        + attempt("What else was measured", measured_sections, store, artifacts, album)
        + attempt("The data", data_section, store, artifacts, album)
        + attempt("The embeddings", embeddings_section, store, artifacts)
        + attempt("The codec", codec_section, artifacts)
        + attempt("The trainings", training_section, store, artifacts, album, running)
        + attempt("The lineage", lineage_section, artifacts)
        + attempt("Environment and settings", _environment_section, config, artifacts)
    )
    unfinished = any(name in chain and name not in artifacts for name in ENDS)
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_S}">\n' if unfinished else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{refresh}'
        f"<title>{text(config.project)}: report</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{head}<main>\n{body}</main>\n</body>\n</html>\n"
    )


def expected(config: Config) -> tuple[str, ...]:
    """The stages of this configuration's chain in order; it ends with the index if there is nothing to bundle."""
    inputs = config.bundle.inputs
    data = (name for name in DATA if name != "thresholds" or config.thresholds.similarity)
    return (*data, *(name for name in MODELS if name in inputs), *(("bundle", *ENDS) if inputs else ()))


def _head(config: Config, artifacts: Mapping[str, Artifact], chain: tuple[str, ...], running: Artifact | None) -> str:
    names = [*chain, *sorted(artifacts.keys() - set(chain))]
    todo = [name for name in chain if name not in artifacts]
    boxes = "".join(f'<li class="{"open" if name in todo else "done"}">{text(name)}</li>\n' for name in names)
    state = f"{len(names) - len(todo)} of {len(names)} stages are done"
    if running is not None:
        state += f"; {text(running.stage)} is being trained: {training_so_far(running)}."
    else:
        state += f"; next is {todo[0]}." if todo else "."
    seconds = sum(artifact.times.get("seconds", 0.0) for artifact in artifacts.values())
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    rows = [_row(name, artifacts[name]) for name in names if name in artifacts]
    made = table(("stage", "rows or samples", "seconds", "key"), rows, numeric=(1, 2)) if rows else ""
    return (
        f"<header>\n<h1>{text(config.project)}</h1>\n"
        f"<p>{state} Together they took {number(round(seconds, 1))} seconds.</p>\n"
        f'<p class="quiet">Written {when}. A tick marks what is done, a dashed line what is still to come.</p>\n'
        f'<ol class="chain">\n{boxes}</ol>\n{made}</header>\n'
    )


def _row(name: str, artifact: Artifact) -> tuple[str, str, str, str]:
    amount = artifact.ledger.kept if name == "samples" else artifact.recipe.get("samples", artifact.ledger.kept)
    shown = number(amount) if amount else ""  # a bundle has no rows
    took = number(round(artifact.times["seconds"], 1)) if "seconds" in artifact.times else ""
    return text(name), shown, took, f'<span class="key">{text(artifact.key[:12])}</span>'


def _environment_section(config: Config, artifacts: Mapping[str, Artifact]) -> str:
    parts = [attempt("The environment", lambda: facts(_environment(artifacts)))]
    for name in (*DATA, *MODELS, "bundle", *ENDS):
        if name in artifacts:
            parts.append(attempt(f"The settings of {name}", _settings, name, artifacts[name].recipe))
    parts.append(attempt("The run settings", lambda: _settings("run", flatten(config.run))))
    return section("environment", "Environment and settings", LOOK_AT_ENVIRONMENT, *parts)


def _settings(name: str, values: Mapping[str, Any]) -> str:
    return f"<details><summary>{name}</summary>\n{facts(values)}</details>\n" if values else ""


def _environment(artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """One value a name where all artefacts agree; else each value with the stages that were made with it."""
    seen: dict[str, dict[str, list[str]]] = {}
    for stage, artifact in artifacts.items():
        for name, value in artifact.environment.items():
            seen.setdefault(name, {}).setdefault(str(value), []).append(stage)
    return {
        name: next(iter(values)) if len(values) == 1 else "; ".join(f"{v} ({', '.join(s)})" for v, s in values.items())
        for name, values in seen.items()
    }
