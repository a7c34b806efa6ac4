"""Keeps a shard of pairs that is being fetched on this machine's disk: its images, and how its rows have ended so far.

Images come in any order and go into a spool; the tar is written from it in the order of its keys. A worker that dies
leaves the spool behind, and the process that makes the shard next on this machine goes on there: servers are asked
again only for what was under way. So a shard takes disk and not memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tarfile
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any, BinaryIO, Self

from webdataset.writer import TarWriter

KEEP_S = 24 * 3600  # after which what nobody came back for is deleted, and answers of servers count as old


class Unfinished:
    """Takes rows in any order, each once, as a context manager.

    ``ended`` has the rows that an earlier worker added, by key. ``path`` is the tar that ``pack`` writes, until
    ``remove``.

    ``name`` says what is packed: all that rows depend on. If another process is at it, this one has a place of its own.
    """

    def __init__(self, name: str):
        everything = Path(tempfile.gettempdir(), f"unclip-pairs-{os.getuid()}")
        try:
            _check_own(everything)
            _clear(everything)
            self._folder = everything / name
            self._rows = _locked(self._folder)
        except OSError as e:
            inside = everything if isinstance(e, BlockingIOError) else None  # locked by another, and cleared some day
            self._folder = Path(tempfile.mkdtemp(prefix="unclip-pairs-", dir=inside))
            self._rows = _opened(self._folder / "rows")
        self.path = self._folder / "images.tar"
        self._spool = _opened(self._folder / "spool")
        self._starts: dict[str, int] = {}  # of images in the spool, by key
        self.ended = self._read_back()

    def __enter__(self) -> Self:
        self._open = ExitStack()
        self._open.enter_context(self._rows)
        self._open.enter_context(self._spool)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _read_back(self) -> dict[str, dict[str, Any]]:
        """Returns the rows that are whole, and cuts off what comes after them."""
        ended: dict[str, dict[str, Any]] = {}
        self._rows.seek(0)
        whole = end = 0
        for line in self._rows:
            try:
                found = json.loads(line) if line.endswith(b"\n") else {}
                row, start = found["row"], found["start"]
            except (ValueError, KeyError, TypeError):
                break
            if start is not None:
                self._spool.seek(start)
                if hashlib.sha256(self._spool.read(row["size"])).hexdigest() != row["sha256"]:
                    break
                self._starts[row["key"]], end = start, start + row["size"]
            ended[row["key"]], whole = row, whole + len(line)
        for file, length in ((self._rows, whole), (self._spool, end)):
            file.truncate(length)
            file.seek(length)
        return ended

    def add(self, row: dict[str, Any], image: bytes | None) -> None:
        """Adds a row that has ended, values of JSON and tuples by name, and its image if the tar is to hold it.

        Such a row has "size" and "sha256".
        """
        start = None
        if image is not None:
            self._starts[row["key"]] = start = self._spool.tell()
            self._spool.write(image)
            self._spool.flush()
        self._rows.write(json.dumps({"row": row, "start": start}, default=astuple).encode() + b"\n")
        self._rows.flush()

    def pack(self, rows: Iterable[dict[str, Any]], extension: str) -> None:
        """Writes the tar of the images of ``rows``, in that order; each of these rows gets its "offset".

        The bytes of the tar depend on the images and their keys alone, not on the order in which they were added.
        """
        with _opened(self.path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
            file.truncate()  # of an earlier worker's
            for row in rows:
                if (start := self._starts.get(row["key"])) is not None:
                    self._spool.seek(start)
                    row["offset"] = tar.tarstream.offset + tarfile.BLOCKSIZE
                    tar.write({"__key__": row["key"], extension: self._spool.read(row["size"])})

    def remove(self) -> None:
        """Deletes it: the shard is in the store."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")


def _check_own(everything: Path) -> None:
    """Makes the folder. Raises OSError where others may write into it, or have put a link in its place."""
    everything.mkdir(mode=0o700, exist_ok=True)
    found = everything.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{everything} is not this user's alone")


def _locked(folder: Path) -> BinaryIO:
    """Opens the file of rows for this process alone. Raises OSError where that cannot be."""
    folder.mkdir(mode=0o700, exist_ok=True)
    rows = _opened(folder / "rows")
    try:
        fcntl.flock(rows, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(folder / "rows").st_ino != os.fstat(rows.fileno()).st_ino:
            raise FileNotFoundError(f"{folder} was deleted meanwhile")
    except OSError:
        rows.close()
        raise
    return rows


def _clear(everything: Path) -> None:
    """Deletes what nobody has added to for a day."""
    for rows in everything.glob("*/rows"):
        with suppress(OSError):
            if time.time() - rows.stat().st_mtime > KEEP_S:
                shutil.rmtree(rows.parent, ignore_errors=True)
