"""Reads and stores files that a recipe names by path or by sha256; keys hold the sha256.

A file by path lies where the user said; one by sha256 is a blob of the store.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.errors import CorruptObject, UserError
from pipeline.local import read_local
from pipeline.parse import ContentFile
from pipeline.store import Store
from pipeline.store.records import put_blob, read_blob


def put_content(store: Store, file: ContentFile, where: str) -> None:
    """Puts a file into the store as a blob, where every worker can read it.

    Raises UserError, which begins with the setting ``where``, if the file cannot be read or has changed since it was
    named, and if the store does not have a blob of the name.
    """
    if not file.path:
        _read_named(store, file, where)
        return
    try:
        name = put_blob(store, Path(file.path))
    except (FileNotFoundError, PermissionError) as e:
        raise UserError(f"{where}: {file.path} cannot be read ({e.strerror})") from None
    _check(name, file, where)


def read_content(store: Store, file: ContentFile, where: str, max_bytes: int) -> bytes:
    """Returns the bytes of a file. Raises UserError as ``put_content`` does, and for more than ``max_bytes``."""
    if not file.path:
        return _read_named(store, file, where)
    try:
        data = read_local(file.path, max_bytes)
    except OSError as e:
        raise UserError(f"{where}: {file.path} cannot be read ({e.strerror})") from None
    _check(hashlib.sha256(data).hexdigest(), file, where)
    return data


def _read_named(store: Store, file: ContentFile, where: str) -> bytes:
    try:
        return read_blob(store, file)
    except CorruptObject as e:
        raise UserError(f"{where}: {e} in {store.url}; name a file, or a blob of this store") from e


def _check(sha256: str, file: ContentFile, where: str) -> None:
    if sha256 != file:
        raise UserError(f"{where}: {file.path} changed during this command; run it again")
