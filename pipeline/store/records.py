"""Reads and writes blobs, which are named by their content, and the records that name them.

A record carries its format and its own checksum, and is an instance of a subclass of Record: its fields are its schema.
The checksum tells damage, not who wrote it: anyone who can write to a store can write a record that is well sealed. So
every read names the kind of record that it expects, and anything else there is a damaged object. An object that looks
damaged is read again, past caches, before it is reported as damaged. Reads change nothing: pipeline.upkeep.repair does.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic_core import from_json

from pipeline.errors import CorruptObject, OtherFormat, UserError
from pipeline.store import Store
from pipeline.store.crash import crash_point
from pipeline.store.names import is_digest, is_file_name
from pipeline.store.parallel import ordered_map

FORMAT = 3
PART_BYTES = 16 << 20  # of a blob that is read in parts
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Seconds = Annotated[FiniteFloat, Field(ge=0, lt=1 << 37)]  # as a time of day until the year 6325
T = TypeVar("T")
_adapters: dict[Any, TypeAdapter[Any]] = {}  # by kind: to build one takes milliseconds


class Record:
    """Marks the dataclasses that are stored as records. Their fields are the schema: types, names and ranges.

    Unknown fields are ignored, so that a newer version may add one within a format.
    """

    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(ser_json_inf_nan="constants")

    @property
    def named(self) -> list[str]:
        """Returns the blobs that the record names."""
        return []

    def check(self, path: str) -> None:
        """Raises ValueError unless the record may lie at this path."""


R = TypeVar("R", bound=Record)


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
    """Stores a blob under the sha256 of its bytes, which it returns. See ``Store.create``.

    Raises CorruptObject where it is there already and damaged.
    """
    if isinstance(data, Path):
        with open(data, "rb") as f:
            name = hashlib.file_digest(f, "sha256").hexdigest()
    else:
        name = hashlib.sha256(data).hexdigest()
    if not store.create(blob_path(name), data, move):
        check_blob(store, name)  # it was there; if an earlier writer left it damaged, no record may name it
    crash_point("blob.created", name)
    return name


def read_twice(store: Store, read: Callable[[Store], T]) -> T:
    """Returns the result of ``read``; if it raises CorruptObject, that of a second read past all caches.

    So one failed read does not condemn a sound object. Raises the second CorruptObject.
    """
    try:
        return read(store)
    except CorruptObject:
        return read(store.fresh())


def read_blob(store: Store, sha256: str) -> bytes:
    """Returns the whole blob, checked. Raises CorruptObject if it is missing or not what its name says."""
    return read_twice(store, lambda store: _read_blob(store, sha256))


def _read_blob(store: Store, sha256: str) -> bytes:
    path = blob_path(sha256)
    try:
        data = store.read(path)
    except FileNotFoundError:
        raise CorruptObject(path, "is missing") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptObject(path, "has other bytes than its name says")
    return data


def blob_parts(store: Store, sha256: str, threads: int = 1) -> Iterator[bytes]:
    """Yields the bytes of a blob in parts of PART_BYTES, which as many threads read.

    Raises CorruptObject as ``read_blob``, but after the last part: until then nothing that was yielded can be trusted.
    """
    path, found = blob_path(sha256), hashlib.sha256()

    def read(start: int) -> bytes:
        return store.read(path, start, start + PART_BYTES)

    try:
        entry = store.stat(path)
        if entry is None:
            raise FileNotFoundError(path)
        starts = range(0, entry.size, PART_BYTES)
        for data in ordered_map(read, starts, threads) if threads > 1 else map(read, starts):
            found.update(data)
            yield data
    except FileNotFoundError:
        raise CorruptObject(path, "is missing") from None
    if found.hexdigest() != sha256:
        raise CorruptObject(path, "has other bytes than its name says")


def check_blob(store: Store, sha256: str) -> int:
    """Returns the bytes of a blob, whose content is checked a part at a time. Raises CorruptObject as ``read_blob``."""
    return read_twice(store, lambda store: sum(map(len, blob_parts(store, sha256))))


def copy_blob(store: Store, sha256: str, file: IO[bytes]) -> None:
    """Writes a whole blob into an empty file, checked, a part in memory at a time. Raises CorruptObject."""

    def copy(store: Store) -> None:
        file.seek(0)
        file.truncate()
        file.writelines(blob_parts(store, sha256))
        file.flush()

    read_twice(store, copy)


def materialise(store: Store, blobs: Mapping[str, str], folder: str | Path, replace: bool = False) -> None:
    """Writes the named blobs as files under ``folder``.

    Existing files stay as they are, unless ``replace`` is set. Raises CorruptObject, and UserError for a
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
                with open(temporary, "xb") as out:  # "x" follows no link
                    out.write(read_blob(store, blob))
                temporary.replace(file)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def create_record(store: Store, path: str, record: R) -> R:
    """Creates a record, or adopts the one that another process created first. Returns the stored one.

    Raises ValueError for a record that no reader would accept, and as ``read_record`` where the stored one is damaged.
    """
    while not store.create(path, seal(record, path)):
        stored = read_record(store, path, type(record))
        if stored is not None:  # else it was deleted meanwhile
            return stored
    return record


def read_record(store: Store, path: str, kind: type[R]) -> R | None:
    """Returns a record of this kind, or None if it does not exist.

    Raises CorruptObject for a record that cannot be trusted, and OtherFormat.
    """
    return read_twice(store, lambda store: _read_record(store, path, kind))


def _read_record(store: Store, path: str, kind: type[R]) -> R | None:
    try:
        data = store.read(path)
    except FileNotFoundError:
        return None
    if _format(store, path, data) < FORMAT:
        raise OtherFormat(
            f"{store.url}/{path}",
            "was written by an older version of this software; name another store, and run again",
        )
    return _parse_record(data, path, kind)


def _format(store: Store, path: str, data: bytes) -> int:
    """Returns the format of a record. Raises CorruptObject unless it is sealed, and OtherFormat for a newer one."""
    try:
        body = from_json(data)
        checksum, version = body.pop("checksum"), body["format"]
        # A newer format may compute its checksum in another way.
        sealed = type(version) is int and (version > FORMAT or checksum == digest(body))
    except (ValueError, KeyError, TypeError, AttributeError):
        sealed = False
    if not sealed:
        raise CorruptObject(path, "is corrupt")
    if version > FORMAT:
        raise OtherFormat(f"{store.url}/{path}", "was written by a newer version of this software; upgrade to read it")
    return int(version)


def _parse_record(data: bytes, path: str, kind: type[R]) -> R:
    try:
        record = parse_object(data, kind)
        record.check(path)
    except ValueError as e:
        raise CorruptObject(path, f"is not a record that belongs there ({said(e)})") from None
    return record


def read_plain(store: Store, path: str, kind: type[T]) -> T | None:
    """Returns a small object without checksum, such as a pin or a lease, which are swapped; None if it does not exist.

    Raises CorruptObject for anything else than JSON of this kind.
    """

    def read(store: Store) -> T | None:
        try:
            return parse_object(store.read(path), kind)
        except FileNotFoundError:
            return None
        except ValueError as e:
            raise CorruptObject(path, f"is damaged ({said(e)})") from None

    return read_twice(store, read)


def parse_object(data: bytes, kind: type[T]) -> T:
    """Returns the value that JSON holds. Raises ValueError unless it has exactly the types of ``kind``."""
    value: T = _adapter(kind).validate_json(data, strict=True)
    return value


def said(error: ValueError) -> str:
    """Returns one line that names the first wrong field of an object, and why."""
    if not isinstance(error, ValidationError):
        return str(error)[:200]
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")[:200]


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def peek_record(store: Store, path: str, kind: type[R]) -> R | None:
    """Returns a record of this kind, or None if it is missing or damaged, for callers that can do without it."""
    try:
        return read_record(store, path, kind)
    except CorruptObject:
        return None


def seal(record: Record, path: str) -> bytes:
    """Returns the bytes of a record. Raises ValueError for one that no reader would accept at this path."""
    body = {**_adapter(type(record)).dump_python(record, mode="json", warnings=False), "format": FORMAT}
    data = canonical({**body, "checksum": digest(body)})
    parse_object(data, type(record)).check(path)  # better an error here than a damaged record in the store
    return data


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
