"""Checks names in records, tables and pins before they become paths.

A record's checksum tells damage, not who wrote it. Anyone who can write to a store can write any record, so a name in
a record may lead only to an object of the store, or to a file below the folder that its reader has chosen.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

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
    """Returns whether a path in a store is that of a blob or of a record, which a run can make again."""
    return _OURS.fullmatch(path) is not None


def check_path(path: str) -> None:
    """Raises UserError for a path of an object, or a beginning of one, that could lead out of a store."""
    if path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise UserError(
            f"{path!r} is refused: it leads out of the store; the record or the pin that names it is forged"
        )


def _part(value: str) -> str:
    if not is_part(value):
        raise ValueError(f"{value[:100]!r} is not a name that a record may hold")
    return value


def _file_name(value: str) -> str:
    if not is_file_name(value):
        raise ValueError(f"{value[:100]!r} is not the name of a file")
    return value


# The types of names in records, tables and pins: whatever is declared with them was checked when it was read.
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Part = Annotated[str, AfterValidator(_part)]
FileName = Annotated[str, AfterValidator(_file_name)]
