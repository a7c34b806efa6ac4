"""What a project's last run asked for: only to say why something is stale now."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from pipeline.graph import Graph, Verdict, flatten
from pipeline.records import create_record, read_record
from pipeline.store import Store


def remember(store: Store, project: str, graph: Graph, verdicts: Sequence[Verdict]) -> None:
    """Record what is asked, before it is done."""
    keys = {v.stage: v.key for v in verdicts}
    stages = {
        v.stage: {
            "key": v.key,
            "version": graph[v.stage].version,
            "recipe": flatten(graph[v.stage].recipe),
            "inputs": {name: keys[name] for name in graph[v.stage].inputs},
        }
        for v in verdicts
    }
    path = f"runs/{project}/{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}.json"
    create_record(store, path, {"project": project, "stages": stages})


def last_run(store: Store, project: str) -> dict[str, Any]:
    """Stage by stage: key, version, recipe and input keys of the last run; empty before the first."""
    newest = max((entry.path for entry in store.list(f"runs/{project}/")), default=None)
    record = read_record(store, newest) if newest else None
    return record["stages"] if record else {}
