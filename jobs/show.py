"""``unclip show CONFIG``: the last runs, what is being made and by whom, pins and release; with a KEY, one artefact."""

from __future__ import annotations

import argparse
import time
from typing import Any, get_type_hints

from pipeline.config import Config, load_config
from pipeline.errors import UserError
from pipeline.graph.keys import defaults
from pipeline.store import open_store
from pipeline.upkeep.overview import find_artifact, lineage, overview
from pipeline.upkeep.show import show_lineage, show_overview


def main(arguments: argparse.Namespace) -> int:
    """Prints the last runs of a project, or the lineage of an artefact."""
    config, key = arguments.config, arguments.key
    if arguments.store is None and config:
        found = load_config(config, arguments.overrides)
        project, url = found.project, found.store
    elif arguments.store is not None and not arguments.overrides and not (config and key):
        project, url, key = None, arguments.store, config
    else:
        raise UserError("unclip show needs a configuration, or --store URL without values to override")
    store = open_store(url)
    if key:
        behind = lineage(store, find_artifact(store, key))
        print(show_lineage(behind, _defaults(behind.artifact.stage), time.time()))
    else:
        print(show_overview(overview(store, project), time.time()))
    return 0


def _defaults(stage: str) -> dict[str, Any]:
    """Returns the defaults of a stage's recipe; {} if the stage is not part of a configuration, so all is shown."""
    recipes = get_type_hints(Config)
    kind = recipes.get("source" if stage == "captions" else stage)
    return {} if kind is None else defaults(kind)
