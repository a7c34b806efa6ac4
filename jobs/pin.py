"""``unclip pin | unpin CONFIG STAGE``: keep an artefact for later data or lift that, and say what becomes stale."""

from __future__ import annotations

import argparse
import json

from jobs.output import say
from jobs.plan import changes
from jobs.project import open_as_run
from pipeline.errors import UserError
from pipeline.graph.artifacts import keys_of
from pipeline.graph.plan import pin_path
from pipeline.store import Store


def main(arguments: argparse.Namespace) -> int:
    """Moves a pin, or lifts it."""
    project = open_as_run(arguments.config, arguments.overrides)
    before = project.plan()
    verdict = next((v for v in before if v.stage == arguments.stage), None)
    if verdict is None or verdict.lineage is None:
        pinned = ", ".join(v.stage for v in before if v.lineage)
        raise UserError(f"{arguments.stage} cannot be pinned; {pinned} can")
    path = pin_path(verdict.lineage)
    version = next((entry.version for entry in project.store.list(path) if entry.path == path), None)
    key = None
    if arguments.command == "pin":
        key = _key(project.store, arguments.stage, arguments.key or verdict.key)
    elif version is None:
        say(f"{arguments.stage} is not pinned")
    if arguments.dry_run:
        say(changes(before, project.plan({verdict.lineage: key})))
        return 0
    if key is None:
        project.store.delete([path])
    elif not project.store.swap(path, version, json.dumps({"key": key}).encode()):
        raise UserError(
            f"{arguments.stage}: another process has moved this pin meanwhile; look with unclip plan and try again"
        )
    say(changes(before, project.plan()))
    return 0


def _key(store: Store, stage: str, key: str) -> str:
    found = keys_of(store, stage, key)
    if not found:
        raise UserError(
            f"{stage}: nothing in {store.url} has a key that begins with {key[:12]}; "
            f"unclip run with --until {stage} makes what the configuration asks for"
        )
    if len(found) > 1:
        raise UserError(
            f"{stage}: {len(found)} artefacts in {store.url} have a key that begins with {key}; one is needed"
        )
    return found[0]
