"""Reads and writes blobs, which are named by their content, and the records that name them.

A record carries its format and its own checksum. An object that looks damaged is read again, past caches, before it is
treated as damaged (see pipeline.graph.damage).
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import CorruptObject, UserError
from pipeline.store import Store
from pipeline.store.crash import crash_point
from pipeline.store.names import check_record, is_digest, is_file_name
from pipeline.store.parallel import ordered_map

FORMAT = 2
PART_BYTES = 16 << 20  # of a blob that is read in parts
T = TypeVar("T")


def canonical(value: Any) -> bytes:
    """Returns JSON with sorted keys and without spaces: one spelling for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """Returns the sha256 of the canonical spelling of a value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def blob_path(sha256: str) -> str:
    """Returns the path of a blob in a store. Raises UserError for a name that is not a sha256."""
    if not is_digest(sha256):
        raise UserError(f"{sha256!r} is not the name of a blob, 64 hex digits; the table that names it is forged")
    return f"blobs/{sha256[:2]}/{sha256}"


def put_blob(store: Store, data: bytes | Path, move: bool = False) -> str:
    """Stores a blob under the sha256 of its bytes, which it returns. See ``Store.create``."""
    if isinstance(data, Path):
        with open(data, "rb") as f:
            name = hashlib.file_digest(f, "sha256").hexdigest()
    else:
        name = hashlib.sha256(data).hexdigest()
    store.create(blob_path(name), data, move)
    crash_point("blob.created", name)
    return name


def read_twice(store: Store, read: Callable[[Store], T]) -> T:
    """Returns what ``read`` makes of a store, of the store past all caches if it raises CorruptObject at first.

    So one failed read does not condemn a sound object. Raises the second CorruptObject.
    """
    try:
        return read(store)
    except CorruptObject:
        return read(store.fresh())


def read_blob(store: Store, sha256: str, threads: int = 1) -> bytes:
    """Returns the whole blob, checked. Raises CorruptObject if it is missing or not what its name says.

    With ``threads`` a large one is read in parts of PART_BYTES at once.
    """
    return read_twice(store, lambda store: _read_blob(store, sha256, threads))


def _read_blob(store: Store, sha256: str, threads: int) -> bytes:
    path = blob_path(sha256)

    def read(start: int) -> bytes:
        return store.read(path, start, start + PART_BYTES)

    try:
        found = store.stat(path) if threads > 1 else None
        starts = range(0, found.size if found else 0, PART_BYTES)
        data = b"".join(ordered_map(read, starts, threads)) if len(starts) > 1 else store.read(path)
    except FileNotFoundError:
        raise CorruptObject(blob_path(sha256), "is missing") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptObject(blob_path(sha256), "has other bytes than its name says")
    return data


def materialise(store: Store, blobs: Mapping[str, str], folder: str | Path, replace: bool = False) -> None:
    """Writes the named blobs as files under ``folder``.

    A file that is there already is kept as it is, unless ``replace`` is set. Raises CorruptObject, and UserError for a
    name, or a link in the folder, that leads out of it.
    """
    within = os.path.join(os.path.realpath(folder), "")
    for name, blob in blobs.items():
        file = Path(folder, name)
        if not is_file_name(name) or not os.path.join(os.path.realpath(file.parent), "").startswith(within):
            raise UserError(f"{str(file)!r} leads out of {folder}, so it is not written; delete it if it is a link")
        if replace or not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.{secrets.token_hex(6)}")
            try:
                with open(temporary, "xb") as out:  # which follows no link
                    out.write(read_blob(store, blob))
                temporary.replace(file)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def open_record(store: Store, path: str) -> dict[str, Any] | None:
    """Returns a record's body, or None if it does not exist.

    Raises CorruptObject for a record that cannot be trusted, and UserError for another format.
    """
    return read_twice(store, lambda store: _open_record(store, path))


def _open_record(store: Store, path: str) -> dict[str, Any] | None:
    try:
        data = store.read(path)
    except FileNotFoundError:
        return None
    body = unseal(data, f"{store.url}/{path}")
    if body is None:
        raise CorruptObject(path, "is corrupt")
    return body


def peek_record(store: Store, path: str) -> dict[str, Any] | None:
    """Returns a record's body, or None if there is none to be trusted.

    A damaged record stays as it is: for read-only callers.
    """
    try:
        return open_record(store, path)
    except CorruptObject:
        return None


def seal(body: dict[str, Any]) -> bytes:
    """Returns the bytes of a record, with format and checksum. Raises ValueError for a name that no record may hold."""
    check_record(body)
    body = {**body, "format": FORMAT}
    return canonical({**body, "checksum": digest(body)})


def unseal(data: bytes, where: str) -> dict[str, Any] | None:
    """Returns the body of a record, or None if it is damaged or holds a name that could lead out of the store.

    Raises UserError for another format, of the record ``where``.
    """
    try:
        body = json.loads(data)
        checksum = body.pop("checksum")
        version = body["format"]
        newer, older = version > FORMAT, version < FORMAT
        if version == FORMAT and checksum == digest(body):
            check_record(body)
            return body
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if newer:
        raise UserError(f"{where} was written by a newer version of this software; upgrade to read it")
    if older:
        raise UserError(f"{where} was written by an older version of this software; name another store to begin again")
    return None


def whoami() -> dict[str, str]:
    """Returns user and host of this process, for people who share a store. They are never part of a key.

    The user is empty where the system has no name for it, as in some containers.
    """
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = ""
    return {"user": user, "host": socket.gethostname()}


def who(by: Mapping[str, Any]) -> str:
    """Returns for example 'ana@gpu-7', or "" where a record does not say."""
    return "@".join(str(by[name]) for name in ("user", "host") if by.get(name))
