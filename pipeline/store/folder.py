"""Keeps a store in a local or shared folder.

The folder itself may be a link. Inside it no link is followed: every path is opened part by part, relative to open
folders (pipeline.local.open_folder), so that no other user can exchange a folder for a link in between.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import UserError
from pipeline.local import open_file, open_folder
from pipeline.store.base import Entry
from pipeline.store.names import check_path

TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}")
COPIED = 1 << 20  # bytes at once
SWAPPED = ("locks/", "leases/", "releases/")  # prefixes of objects that ``swap`` may replace


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Raises UserError for errors of a disk that a user can mend."""
    try:
        yield
    except OSError as e:
        why = None
        if e.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK):
            why = f"its file system has no hard links or no locks ({e.strerror}); choose a local disk, NFS or S3"
        elif isinstance(e, PermissionError):
            why = f"no permission to write {e.filename or ''}; choose another folder or chmod it"
        elif e.errno in (errno.ENOSPC, errno.EDQUOT):
            why = "the disk is full; free space and run the same command again"
        elif e.errno in (errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP):
            why = f"cannot be written ({e.strerror}); choose another folder"
        if why:
            raise UserError(f"store {url}: {why}") from e
        raise


@dataclass(frozen=True)
class FolderStore:
    """Holds objects as files. A file whose name begins with a dot is a lock or half written.

    Without ``cached``, bytes come from the disk or its server, and not from this machine's page cache.
    """

    url: str
    cached: bool = True

    def fresh(self) -> FolderStore:
        return replace(self, cached=False)

    @contextmanager
    def _folder(self, path: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """Opens the folder that an object lies in; yields its handle and the object's name in it.

        Raises UserError for a path that leads out of the store, and where a link is in its way.
        """
        check_path(path)
        folder, _, name = path.rpartition("/")
        with self._without_links(path):
            handle = open_folder(self.url, filter(None, folder.split("/")), make)
        try:
            with self._without_links(path):
                yield handle, name
        finally:
            os.close(handle)

    @contextmanager
    def _without_links(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if e.errno != errno.ELOOP:
                raise
            raise UserError(
                f"store {self.url}: {path} is a symbolic link, or below one, and links in a store are not followed; "
                "delete the link"
            ) from e

    @contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        """Opens an object; without ``cached``, drops its pages from the page cache first."""
        with self._folder(path) as (folder, name):
            handle = open_file(name, folder)
            try:
                if not self.cached and hasattr(os, "posix_fadvise"):  # macOS has none
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                yield handle
            finally:
                os.close(handle)

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        with self._opened(path) as handle, open(handle, "rb", closefd=False) as file:
            file.seek(start)
            return file.read() if stop is None else file.read(stop - start)

    def read_parts(self, path: str, parts: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        with self._opened(path) as handle:
            for start, stop in parts:
                yield os.pread(handle, stop - start, start)

    def list(self, prefix: str) -> Iterator[Entry]:
        check_path(prefix)
        yield from self._walk(prefix[: prefix.rfind("/") + 1], prefix)

    def _walk(self, folder: str, prefix: str) -> Iterator[Entry]:
        """Yields what begins with ``prefix`` in a folder whose path is empty or ends with a slash."""
        try:
            with self._folder(folder) as (handle, _):
                with os.scandir(handle) as children:
                    # A folder sorts with its slash: "a.json" comes before the objects of "a/", as on S3.
                    found = sorted(child.name + "/" if _is_folder(child) else child.name for child in children)
                for name in found:
                    path = folder + name
                    if name.endswith("/"):
                        if path.startswith(prefix) or prefix.startswith(path):
                            yield from self._walk(path, prefix)
                    elif path.startswith(prefix) and not name.startswith("."):
                        with suppress(FileNotFoundError):  # deleted since the folder was read
                            yield self._entry(path, handle, name)
        except (FileNotFoundError, NotADirectoryError):
            return

    def stat(self, path: str) -> Entry | None:
        try:
            with self._folder(path) as (folder, name):
                return self._entry(path, folder, name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _entry(self, path: str, folder: int, name: str) -> Entry:
        """Returns the entry of a file. Its version is the content's hash where that may be swapped, else its path."""
        found = _stat(name, folder)
        if found is None or not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        version = _content_version(folder, name) if path.startswith(SWAPPED) else path
        return Entry(path, found.st_size, version, found.st_mtime)

    def create(self, path: str, data: bytes | Path, move: bool = False) -> bool:
        with _explained(self.url), self._folder(path, make=True) as (folder, name):
            if _stat(name, folder) is not None:
                return False
            temporary = _write_temporary(folder, name, data, move)
            try:
                # Atomic as a rename, but it fails if the name is taken: of several writers one wins.
                os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                return False
            except PermissionError as e:  # Linux's error on a file system without hard links
                raise OSError(errno.EOPNOTSUPP, e.strerror, path) from e
            finally:
                with suppress(FileNotFoundError):  # clear_abandoned may have been quicker
                    os.unlink(temporary, dir_fd=folder)
            os.fsync(folder)  # the name is durable only once its folder is
        return True

    def swap(self, path: str, old: str | None, new: bytes) -> bool:
        with _explained(self.url), self._folder(path, make=True) as (folder, name):
            # Outside the lock: a slow or stopped writer would hold it.
            temporary = _write_temporary(folder, name, new)
            try:
                with _locked(folder, name):
                    if (None if _stat(name, folder) is None else _content_version(folder, name)) != old:
                        return False
                    os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
            os.fsync(folder)
        return True

    def delete(self, paths: Iterable[str]) -> None:
        with _explained(self.url):
            for path in paths:
                with suppress(FileNotFoundError), self._folder(path) as (folder, name):
                    if path.startswith(SWAPPED) and _stat(_lock_name(name), folder) is not None:
                        with _locked(folder, name):
                            os.unlink(_lock_name(name), dir_fd=folder)
                            os.unlink(name, dir_fd=folder)
                    elif _stat(name, folder) is not None:
                        os.unlink(name, dir_fd=folder)

    def now(self) -> float:
        """Returns the time that the file system gives a new file; in a shared folder it is the server's."""
        with _explained(self.url), self._folder("clock", make=True) as (folder, name):
            temporary = _write_temporary(folder, name, b"")
            try:
                return os.stat(temporary, dir_fd=folder).st_mtime
            finally:
                os.unlink(temporary, dir_fd=folder)

    def clear_abandoned(self, before: float) -> int:
        count = 0
        with suppress(FileNotFoundError), self._folder("") as (root, _):
            for _, _, names, folder in os.fwalk(".", dir_fd=root):
                for name in filter(TEMPORARY.fullmatch, names):
                    with suppress(FileNotFoundError):
                        if os.stat(name, dir_fd=folder).st_mtime <= before:
                            os.unlink(name, dir_fd=folder)
                            count += 1
        return count


@contextmanager
def _locked(folder: int, name: str) -> Iterator[None]:
    """Locks an object against swaps and deletions by others."""
    # Deleting an object deletes its lock file, too. A process that waited for that file then holds a lock that nobody
    # else sees, so it looks again whether its file still has the name.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        with open(os.open(_lock_name(name), flags, 0o666, dir_fd=folder), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _stat(_lock_name(name), folder)
            if found is not None and os.path.samestat(found, os.fstat(lock.fileno())):
                yield
                return


def _is_folder(child: os.DirEntry[str]) -> bool:
    if child.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), child.name)
    return child.is_dir(follow_symlinks=False)


def _stat(name: str, folder: int) -> os.stat_result | None:
    """Returns what a folder has under a name, None for nothing. Raises OSError for a link."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
    return found


def _write_temporary(folder: int, name: str, data: bytes | Path, move: bool = False) -> str:
    """Writes a new hidden file into a folder and to the disk, and returns its name. With ``move`` it is a hard link."""
    temporary = f".{name}.{secrets.token_hex(6)}"
    try:
        if not (move and isinstance(data, Path) and _linked(data, folder, temporary)):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(temporary, flags, 0o666, dir_fd=folder), "wb") as file:
                if isinstance(data, bytes):
                    file.write(data)
                else:
                    with open(data, "rb") as source:
                        shutil.copyfileobj(source, file, COPIED)
        handle = open_file(temporary, folder)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        raise
    return temporary


def _linked(file: Path, folder: int, name: str) -> bool:
    """Gives a file another name. Returns False on another file system, or one without links."""
    try:
        os.link(file, name, dst_dir_fd=folder)
    except OSError:
        return False
    return True


def _lock_name(name: str) -> str:
    """Returns the name of an object's lock file, which is hidden beside it."""
    return f".{name}.lock"


def _content_version(folder: int, name: str) -> str:
    with open(open_file(name, folder), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
