"""Blobs named by their content, and records that name blobs and are created last.

A record carries its format and its own checksum. One that cannot be trusted is deleted with a warning, and the work
behind it is done again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from pipeline.crash import crash_point
from pipeline.errors import CorruptObject, UserError
from pipeline.store import Store
from pipeline.store_shared import Buffers

FORMAT = 1
log = logging.getLogger("unclip")


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: one spelling for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """sha256 of the canonical spelling."""
    return hashlib.sha256(canonical(value)).hexdigest()


def blob_path(sha256: str) -> str:
    return f"blobs/{sha256[:2]}/{sha256}"


def put_blob(store: Store, data: bytes | Path | Buffers, move: bool = False) -> str:
    """Store ``data`` under the sha256 of the content, and return it. See ``Store.create``."""
    if isinstance(data, Path):
        with open(data, "rb") as f:
            name = hashlib.file_digest(f, "sha256").hexdigest()
    else:
        content = hashlib.sha256()
        for buffer in [data] if isinstance(data, bytes) else data:
            content.update(buffer)
        name = content.hexdigest()
    store.create(blob_path(name), data, move)
    crash_point("blob.created", name)
    return name


def read_blob(store: Store, sha256: str) -> bytes:
    """The whole blob, checked. Raises CorruptObject if it is missing or not what its name says."""
    try:
        data = store.read(blob_path(sha256))
    except FileNotFoundError:
        raise CorruptObject(blob_path(sha256), "is missing") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptObject(blob_path(sha256), "has other bytes than its name says")
    return data


def create_record(store: Store, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Create a record, or adopt the one that somebody else created first. Returns the one that stands."""
    while not store.create(path, seal(body)):
        standing = read_record(store, path)
        if standing is not None:
            return standing
    return {**body, "format": FORMAT}


def read_record(store: Store, path: str) -> dict[str, Any] | None:
    """A record's body, or None if there is none to be trusted. Raises UserError for a newer format."""
    try:
        data = store.read(path)
    except FileNotFoundError:
        return None
    body = unseal(data, f"{store.url}/{path}")
    if body is None:
        log.warning("%s is corrupt; it is deleted and its work done again", path)
        store.delete([path])
    return body


def peek_record(store: Store, path: str) -> dict[str, Any] | None:
    """As ``read_record``, but a damaged record stays as it is: for who only looks, and may not be allowed to delete."""
    try:
        return unseal(store.read(path), f"{store.url}/{path}")
    except FileNotFoundError:
        return None


def seal(body: dict[str, Any]) -> bytes:
    """The bytes of a record, with format and checksum."""
    body = {**body, "format": FORMAT}
    return canonical({**body, "checksum": digest(body)})


def unseal(data: bytes, where: str) -> dict[str, Any] | None:
    """The body of a record, or None if it is damaged. Raises UserError for a newer format, of the record ``where``."""
    try:
        body = json.loads(data)
        checksum = body.pop("checksum")
        newer = body["format"] > FORMAT
        sound = newer or checksum == digest(body)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if newer:
        raise UserError(f"{where} was written by a newer version of this software; upgrade to read it")
    return body if sound else None
