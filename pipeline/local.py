"""Says which files and buckets a list may name, and opens files of this machine.

A list often comes from strangers, so what its rows name is confined. A table may name files below its own folder, a
folder of images holds its own files, and ``source.roots`` adds folders, tars and buckets. Only the configuration adds
them: a list cannot. A link counts as the file it leads to: one that stays inside these places is followed, one that
leads out of them never. A file that the configuration or a command names may lie anywhere and be a link.

Other users may write in such places. What is inside is therefore opened part by part from the place itself, so that
nobody leads a reader out by a link that takes a folder's place after it was looked at.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
MAX_REFERENCE = 8 << 10  # characters; no server takes a longer URL, and each rule of a robots.txt is compared with it
MEMBER, EMBEDDING = "tar://", "embedding://"  # a member of a tar and a row of embeddings, used where they lie
CELL = "parquet://"  # an image in a row of a Parquet file (see pipeline.data.source.cells)


class Outside(OSError):
    """Raised for a path that leads out of what a list may name."""


class TooLarge(OSError):
    """Raised for a file with more bytes than its budget."""


@dataclass(frozen=True)
class PathPolicy:
    """Holds what lists may name on this machine and on S3.

    Args:
        own: absolute paths of folders and tars that are lists, and of folders in which tables lie.
        roots: absolute paths that ``source.roots`` names.
        buckets: "BUCKET" or "BUCKET/PREFIX", as ``source.roots`` names them.
    """

    own: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    buckets: tuple[str, ...] = ()

    @classmethod
    def of(cls, own: Sequence[str], roots: Sequence[str]) -> PathPolicy:
        """Returns the reach of lists at ``own``. Raises ValueError for a root that is neither a path nor a bucket."""
        buckets, paths = [], []
        for root in roots:
            scheme, separator, rest = root.partition("://")
            bucket = rest.strip("/") if scheme == "s3" else ""
            if not root or (separator and not bucket):
                raise ValueError(f"roots: {root!r} is neither a path nor s3://BUCKET or s3://BUCKET/PREFIX")
            if separator:
                buckets.append(bucket)
            else:
                paths.append(os.path.abspath(os.path.expanduser(root)))
        return cls(tuple(own), tuple(paths), tuple(buckets))

    def refusal(self, reference: str) -> str | None:
        """Returns "forbidden_reference" for what a table may not name, None for all else.

        Follows no links, for it runs once a row of every list. ``open_local`` does.
        """
        if reference.startswith(("http://", "https://")):
            return None
        try:
            parts, path = urlsplit(reference), local_path(reference)
        except ValueError:  # the fetch counts it
            return None
        if reference.startswith((MEMBER, EMBEDDING, CELL)):
            places = self._everything if reference.startswith(CELL) else self._rooted
            named = _is_below(os.fsdecode(unquote_to_bytes(parts.path)), places)
        elif path is not None:
            named = _is_below(path, self._everything)
        elif parts.scheme == "s3":
            place = reference.removeprefix("s3://")
            named = any(place.startswith(f"{bucket}/") for bucket in self.buckets)
            named = named and not {".", ".."} & set(place.split("/"))  # which some servers resolve
        else:
            named = True
        return None if named else "forbidden_reference"

    def resolve(self, path: str | Path) -> tuple[str, list[str]]:
        """Returns what a path leads to, after all links: a folder that is in reach, and the parts of the path below it.

        Raises Outside if that is out of reach.
        """
        found = os.path.realpath(path)
        for place in self._everything:
            if found == place:  # the place is a file
                return os.path.dirname(place), [os.path.basename(place)]
            if _is_below(found, (place,)):
                return place, found[len(place.rstrip("/")) + 1 :].split("/")
        raise Outside(errno.EACCES, "out of the list's own folder and of source.roots", str(path))

    @property
    def named(self) -> list[str]:
        """Returns what lists may name besides files of their own, as ``source.roots`` would name it."""
        return [*self.roots, *(f"s3://{bucket}" for bucket in self.buckets)]

    @cached_property
    def _rooted(self) -> tuple[str, ...]:
        return self.roots + tuple(map(os.path.realpath, self.roots))

    @cached_property
    def _everything(self) -> tuple[str, ...]:
        return self.own + tuple(map(os.path.realpath, self.own)) + self._rooted


NOTHING = PathPolicy()


def on_web(reference: str) -> bool:
    """Returns whether a reference names what every machine finds: on a web server or on S3."""
    return reference.startswith(("http://", "https://", "s3://"))


def names_file(reference: str) -> bool:
    """Returns whether a reference names a file, or a part of one, which machines must have at the same place."""
    return reference.startswith(("/", "file:", MEMBER, EMBEDDING, CELL))


def is_cell(reference: str) -> bool:
    """Returns whether a reference names an image in a row of a Parquet file."""
    return reference.startswith(CELL)


def is_member(reference: str) -> bool:
    """Returns whether a reference names a member of a tar (see pipeline.data.source.tars)."""
    return reference.startswith(MEMBER)


def is_embedding(reference: str) -> bool:
    """Returns whether a reference names an embedding without an image (see pipeline.data.source.imported)."""
    return reference.startswith(EMBEDDING)


def _is_below(path: str, places: Sequence[str]) -> bool:
    path = os.path.normpath(path)
    return any(path == place or path.startswith(f"{place.rstrip('/')}/") for place in places)


def local_path(reference: str) -> str | None:
    """Returns the path that a file:// reference or an absolute path names, None for any other reference.

    Raises ValueError for what is not a URL, and for a path with a NUL.
    """
    path = reference
    if not reference.startswith("/"):
        parts = urlsplit(reference)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            return None
        path = os.fsdecode(unquote_to_bytes(parts.path))
    if "\0" in path:
        raise ValueError("a path has no NUL")
    return path


def open_folder(place: str | Path, parts: Iterable[str] = (), make: bool = False) -> int:
    """Opens a folder below ``place``, part by part, and returns its handle.

    ``place`` may be a link, and what is below it may not: so nobody who exchanges a folder for a link meanwhile leads
    out of it. With ``make`` a folder that is missing is made.

    Raises:
        OSError: as ``open`` does; ELOOP where a part is a link.
    """
    if make:
        os.makedirs(place, exist_ok=True)
    folder = os.open(place, FOLDER)
    try:
        for part in parts:
            inner = _open_inner(folder, part, make)
            os.close(folder)
            folder = inner
    except BaseException:
        os.close(folder)
        raise
    return folder


def _open_inner(folder: int, name: str, make: bool) -> int:
    try:
        return os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=folder)
    except FileNotFoundError:
        if not make:
            raise
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=folder)
            os.fsync(folder)
        return os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=folder)
    except NotADirectoryError as e:  # as Linux calls a link here
        if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name) from e
        raise


def open_file(path: str | Path, folder: int | None = None) -> int:
    """Opens a regular file for reading, without ever waiting for it, and returns its handle.

    Neither a device nor a pipe is opened, not even for a moment: some devices act on that. With the handle of a
    ``folder``, ``path`` is a name in it, and may not be a link.

    Raises:
        OSError: as ``open`` does, and for what is not a regular file.
    """
    alone = {} if folder is None else {"dir_fd": folder, "follow_symlinks": False}
    _check_regular(os.stat(path, **alone), path)  # type: ignore[arg-type]
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if folder is None else os.O_NOFOLLOW)
    handle = os.open(path, flags, dir_fd=folder)
    try:
        _check_regular(os.fstat(handle), path)
        return handle
    except BaseException:
        os.close(handle)
        raise


def open_local(path: str | Path, within: PathPolicy | None = None) -> BufferedReader:
    """Opens a regular file for reading and never waits for it.

    With ``within``, links are followed first, and what they lead to must lie within.

    Raises:
        OSError: as ``open_file`` does, and for a name with a NUL.
        Outside: of the OSErrors, where it leads out of ``within``.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "a path has no NUL", repr(path))
    if within is None:
        return os.fdopen(open_file(path), "rb")
    place, parts = within.resolve(path)
    folder = open_folder(place, parts[:-1])
    try:
        return os.fdopen(open_file(parts[-1], folder), "rb")
    finally:
        os.close(folder)


def _check_regular(found: os.stat_result, path: str | Path) -> None:
    for kind, code in ((stat.S_ISDIR, errno.EISDIR), (stat.S_ISLNK, errno.ELOOP)):
        if kind(found.st_mode):
            raise OSError(code, os.strerror(code), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_local(
    path: str | Path, max_bytes: int, within: PathPolicy | None = None, offset: int = 0, size: int | None = None
) -> bytes:
    """Returns the bytes of a regular file, or ``size`` of them from ``offset``, fewer where the file ends.

    Raises what ``open_local`` does, and TooLarge for more than ``max_bytes``.
    """
    if size is None or size <= max_bytes:
        with open_local(path, within) as file:
            file.seek(min(offset, sys.maxsize))  # behind every end; a larger number would be no OSError
            # None: some files in /proc have nothing to say now, and the handle does not wait.
            data = file.read(max_bytes + 1 if size is None else size) or b""
        if len(data) <= max_bytes:
            return data
    raise TooLarge(errno.EFBIG, f"more than {max_bytes:,} bytes", str(path))


def reason_of(error: OSError) -> str:
    """Returns the reason (see pipeline.ledger) for a row whose file could not be read."""
    if isinstance(error, Outside):
        return "forbidden_reference"
    return "too_large" if isinstance(error, TooLarge) else "missing_file"
