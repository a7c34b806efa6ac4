"""Checks names in records, tables and pins before they become paths.

A record's checksum tells damage, not who wrote it. Anyone who can write to a store can write any record, so a name in
a record may lead only to an object of the store, or to a file below the folder that its reader has chosen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"\w[\w.-]*")
_OURS = re.compile(
    r"blobs/(?P<two>[0-9a-f]{2})/(?P=two)[0-9a-f]{62}|(artifacts|shards|checkpoints|runs)/(\w[\w.-]*/)*\w[\w.-]*\.json"
)


def is_digest(value: object) -> bool:
    """Returns whether a value is the sha256 of something: 64 lower-case hex digits."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def is_part(value: object) -> bool:
    """Returns whether a value can be one part of a path, as stages, keys and projects are.

    That is a word of letters, digits, '.', '-' and '_' that does not begin with '.' or '-'.
    """
    return isinstance(value, str) and _PART.fullmatch(value) is not None


def is_file_name(value: object) -> bool:
    """Returns whether a value names a file below any folder.

    The name is relative, without empty parts, '.', '..', backslashes and control characters.
    """
    if not isinstance(value, str) or not value.isprintable() or "\\" in value:
        return False
    return not {"", ".", ".."} & set(value.split("/"))


def is_blob_or_record(path: str) -> bool:
    """Returns whether a path in a store is that of a blob or of a record, which work can make again."""
    return _OURS.fullmatch(path) is not None


def check_path(path: str) -> None:
    """Raises UserError for a path of an object, or a beginning of one, that could lead out of a store."""
    if path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise UserError(
            f"{path!r} is refused: it leads out of the store; the record or the pin that names it is forged"
        )


def check_blobs(blobs: Any) -> None:
    """Raises ValueError unless ``blobs`` maps names of files to names of blobs."""
    if not isinstance(blobs, Mapping):
        raise ValueError(f"{blobs!r} does not map names to blobs")
    for name, blob in blobs.items():
        if not is_file_name(name) or not is_digest(blob):
            raise ValueError(f"{name!r}: {blob!r} is not a file with its blob")


def check_record(body: Mapping[str, Any]) -> None:
    """Raises ValueError for a record with a name that could become a path to anything but an object of the store.

    All records pass this one gate: those of artefacts, shards, segments of a list, checkpoints, runs and releases.
    Readers judge the other fields.
    """
    parts = [body[name] for name in ("stage", "key", "project") if name in body]
    digests = list(body.get("hashes", ()))
    if body.get("shard_table") is not None:
        digests.append(body["shard_table"])
    for asked in (body, *body.get("stages", {}).values()):
        parts += [part for named in asked.get("inputs", {}).items() for part in named]
        parts += [asked[name] for name in ("key", "trajectory", "trunk") if name in asked]
    for move in body.get("moves", ()):
        parts += [move["bundle"], move["evaluation"]]
    for shard in body.get("shards", ()):
        digests += [shard["refs"], shard["captions"]]
    for line in body.get("journal", {}).get("lines", ()):
        digests += [line["preview"]] if "preview" in line else []
    for holds, names in (
        (is_part, [*parts, *body.get("stages", ())]),
        (is_digest, digests),
        (is_file_name, [body["package"]] if "package" in body else []),
    ):
        if wrong := [name for name in names if not holds(name)]:
            raise ValueError(f"{wrong[0]!r} is not a name that a record may hold")
    check_blobs(body.get("blobs", {}))
