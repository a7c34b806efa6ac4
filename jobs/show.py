"""``unclip show CONFIG``: the last runs, what is being made and by whom, pins and release; with a KEY, one artefact."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.output import print_json, say
from pipeline.build import all_stages
from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.graph.artifacts import StageKey
from pipeline.graph.keys import defaults
from pipeline.store import local_folder, open_store
from pipeline.upkeep.overview import Lineage, Overview, find_artifact, lineage, overview
from pipeline.upkeep.show import show_lineage, show_overview


def main(arguments: argparse.Namespace) -> int:
    """Prints the last runs of a project, or the lineage of an artefact."""
    config, key = arguments.config, arguments.key
    if arguments.store is None and (config is None or Path(config).is_dir()):
        arguments.store, config, key = _store_below(config), key, None
    if arguments.store is None and config:
        found = load_config(config, arguments.overrides)
        project, url = found.project, found.store
    elif arguments.store is not None and not arguments.overrides and not (config and key):
        project, url, key = None, arguments.store, config
        if (folder := local_folder(open_store(url))) and not folder.is_dir():
            raise UserError(f"--store {url}: no such folder; name a store, as the first line of unclip plan does")
    else:
        raise UserError("--store URL takes a KEY at most, neither a configuration nor values; leave one of them out")
    store = open_store(url)
    if key:
        behind = lineage(store, find_artifact(store, key))
        if arguments.json:
            print_json(_lineage_values(behind))
        else:
            say(show_lineage(behind, _defaults(behind.artifact.stage), time.time()))
    elif arguments.json:
        print_json(_overview_values(overview(store, project)))
    else:
        say(show_overview(overview(store, project), time.time()))
    return 0


def _store_below(folder: str | None) -> str:
    """Returns the one store in a folder, of a run's output for example, or below out/. Raises UserError."""
    found = sorted(
        {*Path("out").glob("store"), *Path("out").glob("*/store")}
        if folder is None
        else {Path(folder), Path(folder, "store")}
    )
    stores = [str(path) for path in found if (path / "runs").is_dir()]
    if len(stores) != 1:
        which = f"it may be {' or '.join(stores)}" if stores else "such as my-project.yaml"
        raise UserError(
            f"unclip show: no store in {folder or 'out/*'} to take; name a configuration, or --store URL: {which}"
        )
    return stores[0]


def _overview_values(seen: Overview) -> dict[str, Any]:
    """Returns what is shown, for JSON; times are seconds since the epoch."""

    def state(name: StageKey) -> str:
        return "made" if name in seen.made else "being made" if name[1] in seen.leases else "not made"

    return {
        "store": seen.url,
        "running": [{"key": key, **asdict(lease)} for key, lease in seen.leases.items()],
        "runs": [
            {
                "project": run.project,
                "at": run.at,
                "by": run.by,
                "stages": {name: {"key": of.key, "state": state((name, of.key))} for name, of in run.stages.items()},
            }
            for run in seen.runs
        ],
        "pinned": seen.pinned,
        "releases": seen.releases,
    }


def _lineage_values(found: Lineage) -> dict[str, Any]:
    around = {
        title: [
            {"stage": stage, "key": key, "times": made.times if made else None} for (stage, key), made in those.items()
        ]
        for title, those in (("made_from", found.behind), ("used_by", found.users))
    }
    return {"artifact": found.artifact, "pinned": found.pinned, "release_of": found.released, **around}


def _defaults(stage: str) -> dict[str, Any]:
    """Returns the defaults of a stage's recipe; {} if the stage is not part of a configuration, so all is shown."""
    return next((defaults(each.recipe) for each in all_stages() if each.name == stage), {})
