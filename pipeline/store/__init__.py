"""Objects in a folder or on S3 behind seven methods. The only module that knows one from the other.

The two are in ``store_folder`` and ``store_s3``.

Nothing is ever overwritten except by ``swap``, which compares first. ``create`` is atomic and durable: a reader sees
the whole object or none, and of several writers exactly one is told True.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from pipeline.errors import UserError
from pipeline.store.base import Buffers, Entry, Traffic
from pipeline.store.folder import FolderStore, lock_path
from pipeline.store.s3 import S3Store


class Store(Protocol):
    """Seven methods; paths are relative, with forward slashes. A path that leads out of the store is refused with
    a UserError, and so is, in a folder, a link that does."""

    @property
    def url(self) -> str:
        """Where it is, as the configuration names it."""

    @property
    def traffic(self) -> Traffic:
        """What this store was asked: requests to S3 as they were sent, repetitions included; calls on a folder."""

    def counted(self) -> Store:
        """The same store with counts of its own, which begin at zero."""

    def fresh(self) -> Store:
        """The same store, read past caches: over connections of its own, from the disk instead of memory."""

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of an object. Raises FileNotFoundError."""

    def read_parts(self, path: str, parts: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes [start, stop) of each of ``parts``, which lie close together, in rising order and apart. They come
        one after the other, of one request. What lies beyond the object's end is left out. Raises FileNotFoundError."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Every object whose path begins with ``prefix``, in order of path."""

    def create(self, path: str, data: bytes | Path | Buffers, move: bool = False) -> bool:
        """Create an object from bytes or from a file. False: it was there, and stays as it was.

        ``move``: the caller gives the file up. It may become the object itself, so nobody may write to it any more.
        Buffers are for much that is not read soon: no cache is filled with it.

        Of several at once one wins. For files of more than one part that is up to the server: SeaweedFS looks, and then
        completes, so two may be told that they won. Only blobs are made of more than bytes; all of a name are the same.
        """

    def swap(self, path: str, old: str | None, new: bytes) -> bool:
        """Replace the object if its version is still ``old`` (None: if it does not exist). For pins and leases."""

    def delete(self, paths: Iterable[str]) -> None:
        """Delete objects; those that are not there are passed over."""

    def now(self) -> float:
        """Returns seconds since the epoch by the store's own clock, which all machines that use it share."""


def open_store(url: str) -> Store:
    """The store at ``url``: s3://bucket/prefix, or a folder. Raises UserError for any other scheme."""
    parts = urlsplit(url)
    if parts.scheme == "s3":
        if not parts.netloc:
            raise UserError(f"store {url}: no bucket; write s3://BUCKET/PREFIX")
        if "@" in parts.netloc:  # and is not repeated here
            raise UserError("store: no keys in its URL, which many can read; set AWS_ACCESS_KEY_ID, or use a profile")
        return S3Store(url.rstrip("/"), parts.netloc, parts.path.strip("/"))
    if parts.scheme in ("", "file"):
        folder = Path(parts.path).expanduser().absolute()
        if folder.exists() and not folder.is_dir():
            raise UserError(f"store {url}: is a file; name a folder")
        return FolderStore(str(folder))
    raise UserError(f"store {url}: only s3://BUCKET/PREFIX or a folder can be a store")


def check_conditions(store: Store) -> None:
    """Prove that the store can be written, read, listed and deleted from, and that it honours conditional writes, on
    which every rule here rests. Leaves no object behind.

    Raises UserError that names what it does not do.
    """
    path = f"locks/probe-{secrets.token_hex(8)}"
    advice = "use a store with conditional writes, such as AWS S3, SeaweedFS, MinIO or a local folder"
    created = store.create(path, b"1")  # where even this is refused there is nothing to delete
    try:
        if not created or store.create(path, b"2") or store.read(path) != b"1":
            raise UserError(
                f"store {store.url} overwrites objects instead of refusing (If-None-Match is ignored); {advice}"
            )
        version = next((entry.version for entry in store.list(path)), None)
        if not store.swap(path, version, b"3") or store.swap(path, version, b"4") or store.read(path) != b"3":
            raise UserError(f"store {store.url} swaps objects without comparing (If-Match is ignored); {advice}")
    finally:
        store.delete([path, lock_path(path)])
    if list(store.list(path)):
        raise UserError(f"store {store.url} keeps objects that were deleted; allow these credentials to delete")


def local_folder(store: Store) -> Path | None:
    """The folder of a store that is in one."""
    return Path(store.url) if isinstance(store, FolderStore) else None


def clear_abandoned(store: Store, older_s: float, now: float) -> int:
    """Delete what writers that were killed have left half written for ``older_s`` seconds; return how many."""
    return store.clear_abandoned(now - older_s) if isinstance(store, FolderStore | S3Store) else 0
