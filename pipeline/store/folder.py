"""Keeps a store in a local or shared folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.store.base import Entry, read_file
from pipeline.store.names import check_path


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turns what a user can mend on a disk into one line."""
    try:
        yield
    except OSError as e:
        why = None
        unlinked = e.errno == errno.EPERM and e.filename2 and not os.path.exists(e.filename2)  # or it would be replaced
        if unlinked or e.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK):
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

    Without ``cached``, bytes come from the disk, or the server that has it, and not from this machine's page cache.
    """

    url: str
    cached: bool = True

    def fresh(self) -> FolderStore:
        return replace(self, cached=False)

    @cached_property
    def _root(self) -> str:
        return os.path.join(os.path.realpath(self.url), "")

    def __getstate__(self) -> dict[str, Any]:  # on another machine the folder may be a link to another place
        return {name: self.__dict__[name] for name in ("url", "cached")}

    def _file(self, path: str) -> Path:
        """Returns where an object lies. Raises UserError for a path, or a link in the store, that leads out of it."""
        check_path(path)
        file = os.path.join(self.url, path)
        if not os.path.join(os.path.realpath(file), "").startswith(self._root):
            raise UserError(
                f"store {self.url}: {path} is a link, or lies behind one, that leads out of the store; delete the link"
            )
        return Path(file)

    def _readable(self, path: str) -> Path:
        """Returns where an object lies, dropped from the page cache first where that does not count."""
        file = self._file(path)
        if not self.cached and hasattr(os, "posix_fadvise"):  # macOS has none
            with open(file, "rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        with open(self._readable(path), "rb") as f:
            f.seek(start)
            return f.read() if stop is None else f.read(stop - start)

    def read_parts(self, path: str, parts: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        yield from read_file(self._readable(path), parts)

    def list(self, prefix: str) -> Iterator[Entry]:
        check_path(prefix)
        yield from self._walk(prefix[: prefix.rfind("/") + 1], prefix)

    def _walk(self, folder: str, prefix: str) -> Iterator[Entry]:
        """Yields what begins with ``prefix`` in a folder whose path is empty or ends with a slash."""
        try:
            with os.scandir(self._file(folder)) as children:
                # With their slashes folders sort among files as the paths in them do.
                found = sorted((child.name + "/" if child.is_dir() else child.name, child) for child in children)
        except (FileNotFoundError, NotADirectoryError):
            return
        for name, child in found:
            path = folder + name
            if child.is_symlink():
                self._file(path)  # is refused where it leads out
            if name.endswith("/"):
                if path.startswith(prefix) or prefix.startswith(path):
                    yield from self._walk(path, prefix)
            elif path.startswith(prefix) and not name.startswith("."):
                with suppress(FileNotFoundError):  # deleted since the folder was read
                    yield Entry(path, child.stat().st_size, _version(Path(child.path), path))

    def stat(self, path: str) -> Entry | None:
        file = self._file(path)
        try:
            return Entry(path, file.stat().st_size, _version(file, path)) if file.is_file() else None
        except FileNotFoundError:  # deleted meanwhile
            return None

    def create(self, path: str, data: bytes | Path, move: bool = False) -> bool:
        file = self._file(path)
        if file.exists():
            return False
        with _explained(self.url):
            temporary = self._write_temporary(file, data, move)
            try:
                os.link(temporary, file)  # unlike a rename, fails if the name is taken
            except FileExistsError:
                return False
            finally:
                os.unlink(temporary)
            _sync_folder(file.parent)
        return True

    def swap(self, path: str, old: str | None, new: bytes) -> bool:
        file = self._file(path)
        with _explained(self.url):
            temporary = self._write_temporary(file, new)  # outside the lock, which a process that stops here would keep
            try:
                with open(self._file(lock_path(path)), "w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if (_content_version(file.read_bytes()) if file.exists() else None) != old:
                        return False
                    os.replace(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(file.parent)
        return True

    def delete(self, paths: Iterable[str]) -> None:
        with _explained(self.url):
            for path in paths:
                self._file(path).unlink(missing_ok=True)

    def now(self) -> float:
        """Returns the time that the file system gives a new file: of a shared folder, its server's."""
        with _explained(self.url):
            file = self._write_temporary(self._file("clock"), b"")
            try:
                return file.stat().st_mtime
            finally:
                file.unlink()

    def clear_abandoned(self, before: float) -> int:
        count = 0
        for root, _, files in os.walk(self.url):
            for name in files:
                file = Path(root, name)
                with suppress(FileNotFoundError):
                    if re.fullmatch(r"\..*\.[0-9a-f]{12}", name) and file.stat().st_mtime <= before:
                        file.unlink()
                        count += 1
        return count

    def _write_temporary(self, file: Path, data: bytes | Path, move: bool = False) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(6)}")
        try:
            if isinstance(data, bytes):
                temporary.write_bytes(data)
            elif not (move and _linked(data, temporary)):
                shutil.copyfile(data, temporary)  # inside the kernel where it can
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary


def _linked(file: Path, name: Path) -> bool:
    """Gives a file another name. Returns False on another file system, or one without links."""
    try:
        os.link(file, name)
    except OSError:
        return False
    return True


def lock_path(path: str) -> str:
    """Returns the hidden file that a swap in a folder locks."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}.{name}.lock"


def _content_version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version(file: Path, path: str) -> str:
    """Returns the content's hash for small objects that may be swapped, the name of others, which never change."""
    return _content_version(file.read_bytes()) if path.startswith(("locks/", "leases/", "releases/")) else path


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
