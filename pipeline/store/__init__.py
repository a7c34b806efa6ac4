"""Keeps objects in a folder or in a bucket behind one protocol. Only this package knows which of them it is.

Only ``swap`` overwrites an object, and it compares first. ``create`` is atomic and durable: a reader sees the whole
object or none.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from pipeline.errors import UserError, install
from pipeline.store.base import Entry
from pipeline.store.folder import FolderStore


class Store(Protocol):
    """Reads and writes objects by relative paths with forward slashes.

    A path that leads out of the store, and in a folder a link that does, is refused with a UserError.
    """

    @property
    def url(self) -> str:
        """Returns the folder or the URL of the store, as the configuration names it."""

    def fresh(self) -> Store:
        """Returns the same store without caches: over other connections, or past the page cache."""

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Returns bytes [start, stop) of an object. Raises FileNotFoundError."""

    def read_parts(self, path: str, parts: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Yields the bytes [start, stop) of each of ``parts``, all of them with one request.

        Parts are in rising order, do not overlap, and lie close together. Bytes beyond the object's end are left out.
        Raises FileNotFoundError.
        """

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yields every object whose path begins with ``prefix``, in order of path."""

    def stat(self, path: str) -> Entry | None:
        """Returns an object's size and version, None if it does not exist."""

    def create(self, path: str, data: bytes | Path, move: bool = False) -> bool:
        """Creates an object from bytes or from a file. Returns False if it existed; then it stays as it was.

        Of several callers with bytes, exactly one gets True. Callers with a file name the object by its content: in a
        bucket several at once may all write it, with the same bytes.

        Args:
            path: Path of the object.
            data: Bytes, or the file that holds them.
            move: The caller gives the file up. It may become the object itself, so nobody may write to it any more.
        """

    def swap(self, path: str, old: str | None, new: bytes) -> bool:
        """Replaces a small object if its version is still ``old`` (None: if it does not exist), and returns whether."""

    def delete(self, paths: Iterable[str]) -> None:
        """Deletes objects, and passes over those that do not exist."""

    def now(self) -> float:
        """Returns seconds since the epoch by the store's own clock, which all machines that use it share."""

    def clear_abandoned(self, before: float) -> int:
        """Deletes half-written data that killed writers began earlier than ``before``. Returns how many."""


def open_store(url: str) -> Store:
    """Returns the store at ``url``: s3://, gs:// or az:// and BUCKET/PREFIX, or a folder.

    Raises UserError for any other scheme, and where packages for one are missing.

    Characters such as # and ? after the scheme belong to the name.
    """
    # urlsplit would cut the name at them.
    scheme = urlsplit(url).scheme
    name = url[len(scheme) + 1 :].removeprefix("//") if scheme else url
    if scheme == "s3":
        bucket, _, prefix = name.partition("/")
        if not bucket or not url.lower().startswith("s3://"):
            raise UserError(f"store {url}: no bucket; write s3://BUCKET/PREFIX")
        if "@" in bucket:  # the message must not repeat it
            raise UserError(
                "store: its URL contains credentials, which others can read; set AWS_ACCESS_KEY_ID, or use a profile"
            )
        from pipeline.store.s3 import S3Store  # loads boto3

        return S3Store(url.rstrip("/"), bucket, prefix.strip("/"))
    if scheme in ("gs", "az"):
        if not name.strip("/"):
            raise UserError(f"store {url}: no bucket; write {scheme}://BUCKET/PREFIX")
        try:
            from pipeline.store.cloud import CloudStore
        except ImportError as e:
            raise UserError(f"store {url}: needs obstore; {install('cloud')}") from e
        return CloudStore(f"{scheme}://{name.strip('/')}")
    if scheme == "file" and not name.startswith("/"):
        raise UserError(f"store {url}: not an absolute path; write file:///FOLDER, or the folder alone")
    if scheme in ("", "file"):
        folder = Path(os.path.expanduser(name)).absolute()
        if folder.exists() and not folder.is_dir():
            raise UserError(f"store {url}: is a file; name a folder")
        return FolderStore(str(folder))
    raise UserError(f"store {url}: only a folder or s3://, gs:// or az:// and BUCKET/PREFIX can be a store")


def check_conditions(store: Store) -> None:
    """Proves that a store can be written, read, listed and deleted from, and honours conditional writes.

    Leaves no object behind. Raises UserError that names what the store does not do.
    """
    # Some S3 servers accept If-None-Match and If-Match and ignore them: two runs would overwrite each other.
    path = f"locks/probe-{secrets.token_hex(8)}"
    advice = "use a store with conditional writes, such as AWS S3, Google, Azure, SeaweedFS, MinIO or a local folder"
    created = store.create(path, b"1")  # outside the try: where it is refused, there is nothing to delete
    try:
        if not created or store.create(path, b"2") or store.read(path) != b"1":
            raise UserError(
                f"store {store.url} overwrites objects instead of refusing (If-None-Match is ignored); {advice}"
            )
        standing = store.stat(path)
        version = standing.version if standing else None
        if not store.swap(path, version, b"3") or store.swap(path, version, b"4") or store.read(path) != b"3":
            raise UserError(f"store {store.url} swaps objects without comparing (If-Match is ignored); {advice}")
    finally:
        store.delete([path])
    if list(store.list(path)):
        raise UserError(f"store {store.url} keeps objects that were deleted; allow these credentials to delete")


def local_folder(store: Store) -> Path | None:
    """Returns the folder of a store that is in one, else None."""
    return Path(store.url) if isinstance(store, FolderStore) else None
