"""``unclip show CONFIG``: the last runs, what is being made and by whom, pins and release; with a KEY, one artefact."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any, get_type_hints

from pipeline.config import OVERRIDES, Config, load_config
from pipeline.errors import UserError
from pipeline.graph.keys import defaults
from pipeline.store import open_store
from pipeline.upkeep.overview import find_artifact, lineage, overview
from pipeline.upkeep.show import show_lineage, show_overview


def main(argv: Sequence[str]) -> int:
    """Prints the last runs of a project, or the lineage of an artefact."""
    parser = argparse.ArgumentParser(
        prog="unclip show",
        description=__doc__,
        usage="unclip show [-h] (CONFIG [NAME=VALUE ...] | --store URL) [KEY]",
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG", help="a YAML file, of whose project the runs are shown")
    parser.add_argument("--store", metavar="URL", help="show all projects of this store, in place of a configuration")
    parser.epilog = f"NAME=VALUE: {OVERRIDES}. KEY: of an artefact of any stage; its first 12 characters suffice."
    arguments = parser.parse_intermixed_args(argv)
    words = [word for word in arguments.words if "=" not in word]
    overrides = [word for word in arguments.words if "=" in word]
    if arguments.store is None and words:
        config = load_config(words.pop(0), overrides)
        project, url = config.project, config.store
    elif arguments.store is not None and not overrides:
        project, url = None, arguments.store
    else:
        raise UserError("unclip show needs a configuration, or --store URL without values to override")
    if len(words) > 1:
        raise UserError(f"unclip show: one key at most, not {', '.join(words)}")
    store = open_store(url)
    if words:
        found = lineage(store, find_artifact(store, words[0]))
        print(show_lineage(found, _defaults(found.artifact.stage), time.time()))
    else:
        print(show_overview(overview(store, project), time.time()))
    return 0


def _defaults(stage: str) -> dict[str, Any]:
    """Returns the defaults of a stage's recipe; {} if the stage is not part of a configuration, so all is shown."""
    recipes = get_type_hints(Config)
    kind = recipes.get("source" if stage == "captions" else stage)
    return {} if kind is None else defaults(kind)
