"""Writes the report of what the store holds again, for example to show it to others: unclip report CONFIG."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from jobs.bundles import find_bundle
from jobs.output import say, warn
from jobs.project import Project, open_as_run, remember_config
from pipeline.config import RUN_FILE
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.release.diff import find_bundle as find_in_store
from pipeline.release.pointer import read_releases
from pipeline.report.images import Album
from pipeline.report.inputs import ComparedBundle
from pipeline.report.page import write_report


def main(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    project = open_as_run(arguments.config, arguments.overrides)
    artifacts = project.finished()
    if not artifacts:
        raise UserError(f"{arguments.config}: nothing has been made yet; use unclip run")
    path = Path(arguments.output) if arguments.output else project.report
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; name a file, such as {path / 'report.html'}")
    if path.suffix == ".json":
        raise UserError(f"--output {path} ends with .json, which is reserved for the figures; name an .html file")
    if not arguments.output:
        _check_fuller(path, artifacts)
    if not arguments.overrides and not Path(project.config.run.output, RUN_FILE).is_file():  # a cluster ran it
        with suppress(OSError, UserError):  # nothing but a command of the page needs it
            remember_config(project.config)
    album = Album(licenses=arguments.license)
    other = _other(project, arguments.against) if arguments.against else None
    if other and other.bundle.key == project.made("bundle")["bundle"].key:
        raise UserError(f"--against {other.name}: is the same bundle, {other.bundle.key[:12]}; name another one")
    write_report(project.store, project.config, project.graph, artifacts, path, album=album, other=other)
    if unmet := sorted(set(arguments.license or ()) - album.met):
        known = f"its images have {', '.join(sorted(album.met))}" if album.met else "its images name none"
        warn(f"no image of the report has the licence {', '.join(unmet)}; {known}")
    say(f"report: {path}")
    return 0


def _check_fuller(path: Path, artifacts: Mapping[str, Artifact]) -> None:
    """Raises UserError where the report that is there shows more stages than these artefacts."""
    try:
        told = json.loads(path.with_suffix(".json").read_text())["stages"]
        shown = sum(bool(stage["made"]) for stage in told)
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or one that shows nothing
        return
    if shown > len(artifacts):
        raise UserError(
            f"{path} shows {shown} finished stages, but with these values {len(artifacts)} are finished: name another "
            "file with --output, or finish the rest with unclip run"
        )


def _other(project: Project, name: str) -> ComparedBundle:
    """Returns the bundle that ``--against`` names. Raises UserError."""
    if name.isalnum() and not Path(name).exists():
        releases = read_releases(project.store, project.config.project)
        return ComparedBundle(name, project.store, find_in_store(project.store, releases, name))
    found = find_bundle(name)
    bundle = load_artifact(found.store, "bundle", found.key) if found.store else None
    if found.store is None or bundle is None:
        raise UserError(f"--against {name}: weights alone have neither samples nor figures; name their project")
    return ComparedBundle(name, found.store, bundle)
