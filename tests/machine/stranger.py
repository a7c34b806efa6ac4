"""What somebody writes who may write to a store and wishes nobody well: any object, anywhere, never over another."""

from __future__ import annotations

import copy
import gzip
import json
import random
from typing import Any

from pipeline.store.records import FORMAT, canonical, digest

ODD: tuple[Any, ...] = (
    None, True, -1, 2**70, 1.5, float("inf"), "", "x", "../../x", "/etc/passwd", "\ud800", "a\nb", [], {}, [[]], [None],
    {"": None}, {"x": {"key": 1}}, ["x"], [{"action": "rollback"}], {"lines": [1]}, {"lines": [{"preview": 1}]},
    {"rows": 1, "kept": 0, "rejected": {"no such reason": 1}, "deferred": {}}, {"rows": 0, "kept": "0"},
)  # fmt: skip
DEEP = 100_000
RAW = (
    b"", b"{", b"null", b"[]", b"7", b'"x"', b"\xff\xfe\x00", b"{}", b'{"checksum": 1}',
    b'{"checksum":"","format":null}',
    b"[" * DEEP, b'{"a":' * DEEP, b"[" * DEEP + b"]" * DEEP, b'{"key": ["a"]}', b'{"key": "../../x"}', b'{"key": "x"}',
    b'{"retries": [1], "forgotten": [], "forgettings": 0}', b'{"retries": [], "forgotten": [], "forgettings": "x"}',
    b'{"retries": [], "forgotten": [[]], "forgettings": 1}', b'{"nonce": 1, "at": 1e999, "since": "x", "pid": "1"}',
    b'{"at": NaN, "boot": [], "host": {}, "released": []}',
)  # fmt: skip
TOMBSTONES = (b"[]", b"{}", b"[[1]]", b'{"blobs/x": "y"}', b'{"blobs/x": null}', b"[" * DEEP, b"7", b'[["a", 1]]')
# Paths that no command asks for, beside the ones that it does.
PATHS = (
    "runs/p/x.json", "runs/p/99999999T999999.000000-x.json", "runs/x.json", "runs/p/q/x.json", "artifacts/x.json",
    "artifacts/bundle/x.json", "artifacts/bundle/a/b.json", "artifacts/clip/x", "shards/x.json", "shards/pairs/x.json",
    "shards/source/segment-x.json", "checkpoints/x.json", "checkpoints/x/1-a.json", "leases/x.json", "leases/a/b.json",
    "releases/x", "releases/z.json", "releases/a/b.json", "locks/x.json", "locks/list-z.json", "locks/list-p.json",
    "locks/tombstones.json.gz", "damaged/x", "packages/x", "blobs/x", "blobs/aa/" + "a" * 64,
)  # fmt: skip


def seal_as_it_is(body: Any, version: Any = FORMAT) -> bytes:
    """Returns a record with a right checksum, whatever it holds: a checksum does not say who wrote."""
    body = {**body, "format": version}
    try:
        return canonical({**body, "checksum": digest(body)})
    except (UnicodeEncodeError, ValueError):  # which no writer can spell either
        return b"{"


def mutated(record: Any, draw: random.Random) -> bytes:
    """Returns a copy of a record with one to three fields, at any depth, gone or odd; sealed again, or cut short."""
    body = copy.deepcopy(record)
    body.pop("checksum", None)
    version = body.pop("format", FORMAT)
    for _ in range(draw.randint(0, 3)):
        place = body
        while isinstance(place, dict | list) and place:
            key = draw.choice(sorted(place, key=str) if isinstance(place, dict) else range(len(place)))
            below = place[key]
            if not isinstance(below, dict | list) or not below or draw.random() < 0.4:
                if draw.random() < 0.4:
                    del place[key]
                else:
                    place[key] = copy.deepcopy(draw.choice(ODD))
                break
            place = below
    if draw.random() < 0.1:
        version = draw.choice((0, 1, FORMAT + 1, "2", None, 2.0, [2]))
    data = seal_as_it_is(body, version)
    return data[: draw.randrange(len(data))] if draw.random() < 0.1 else data


def thing(path: str, records: dict[str, bytes], draw: random.Random) -> bytes:
    """Returns what a stranger writes at a path: often a record of its kind that is nearly right."""
    kind = path.partition("/")[0]
    if path.endswith(".gz"):
        content = draw.choice(TOMBSTONES)
        return gzip.compress(content, mtime=0) if draw.random() < 0.8 else content
    templates = sorted(name for name in records if name.split("/")[:-1] == path.split("/")[:-1])
    templates = templates or sorted(name for name in records if name.startswith(f"{kind}/"))
    if templates and kind != "blobs" and draw.random() < 0.7:
        try:
            record = json.loads(records[draw.choice(templates)])
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            sealed = "checksum" in record
            data = mutated(record, draw)
            if not sealed:  # pins, leases and journals carry none
                try:
                    body = json.loads(data)
                    data = json.dumps({k: v for k, v in body.items() if k not in ("checksum", "format")}).encode()
                except ValueError:
                    pass
            return data
    return draw.choice(RAW)
