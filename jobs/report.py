"""Writes the report of what the store holds again, for example to show it to others: unclip report CONFIG."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.project import open_project
from pipeline.errors import UserError
from pipeline.report.images import Album
from pipeline.report.page import write_report


def main(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    project = open_project(arguments.config, arguments.overrides)
    artifacts = project.finished()
    if not artifacts:
        raise UserError(f"{arguments.config}: nothing of it is made yet; unclip run makes it")
    path = Path(arguments.output) if arguments.output else project.report
    album = Album(licenses=arguments.license)
    write_report(project.store, project.config, project.graph, artifacts, path, album=album)
    if unmet := sorted(set(arguments.license or ()) - album.met):
        known = f"its images have {', '.join(sorted(album.met))}" if album.met else "its images name none"
        print(f"no image of the report has the licence {', '.join(unmet)}; {known}", file=sys.stderr)
    print(f"report: {path}")
    return 0
