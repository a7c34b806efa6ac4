"""What pins and releases name, read without the code that is tested."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable
from typing import Any

from pipeline.graph.artifacts import artifact_path
from pipeline.store.records import blob_path


def is_sound(path: str, data: bytes) -> bool:
    """Returns whether an object is no blob, or has the bytes that its name says."""
    return not path.startswith("blobs/") or hashlib.sha256(data).hexdigest() == path.rpartition("/")[2]


def find_holders(objects: dict[str, bytes], projects: Iterable[str], foreign: Container[str]) -> dict[str, set[str]]:
    """Returns what each pin and each standing promotion names, read without the code that is tested."""
    found: dict[str, set[str]] = {}
    for project in projects:
        path = f"releases/{project}.json"
        if path in objects and path not in foreign:
            stack: list[dict[str, Any]] = []
            for move in json.loads(objects[path])["moves"]:
                stack.append(move) if move["action"] == "promote" else stack.pop()
            for place, move in enumerate(stack):
                named = _named(objects, "bundle", move["bundle"])
                evaluation = _named(objects, "evaluation", move["evaluation"], ("evaluation.json",))
                found[f"{path} {place} {move['at']}"] = named | evaluation
    for path, data in objects.items():
        if path.startswith("locks/") and path.endswith(".json") and "list-" not in path and path not in foreign:
            found[f"{path} {data.decode()}"] = _named(objects, "clip", json.loads(data)["key"])
    return found


def _named(objects: dict[str, bytes], stage: str, key: str, only: tuple[str, ...] = ()) -> set[str]:
    path = artifact_path(stage, key)
    try:
        blobs = json.loads(objects[path])["blobs"]
        return {path} | {blob_path(blob) for name, blob in blobs.items() if not only or name in only}
    except Exception:  # it is gone, or a stranger's: what was named before is remembered
        return {path}
