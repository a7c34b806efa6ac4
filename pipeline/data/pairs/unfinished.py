"""Keeps a shard of pairs that is being packed on this machine's disk: its tar, and how its rows have ended so far.

A worker that dies leaves both behind, and the process that makes the shard next on this machine goes on there: servers
are asked again only for what was under way, and for the images in the last 10 KiB, which webdataset's writer holds
back. So a shard takes disk and not memory.
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
from contextlib import ExitStack, suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any, BinaryIO, Self

from webdataset.writer import TarWriter

KEEP_S = 24 * 3600  # after which what nobody came back for is deleted, and answers of servers count as old


class Unfinished:
    """Takes rows in order, each once, as a context manager.

    ``ended`` has the rows that an earlier worker added, by key. Afterwards ``path`` is the tar, until ``remove``.

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
        self._file = _opened(self.path)
        self.ended = self._read_back()

    def __enter__(self) -> Self:
        self._open = ExitStack()
        self._open.enter_context(self._rows)
        self._open.enter_context(self._file)
        self._tar = self._open.enter_context(TarWriter(self._file, encoder=False, mtime=0))
        self._tar.tarstream.offset = self._file.tell()  # it counts from where it begins to write
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
                row, after = found["row"], found["end"]
            except (ValueError, KeyError, TypeError):
                break
            if row.get("offset") is not None:
                self._file.seek(row["offset"])
                if hashlib.sha256(self._file.read(row["size"])).hexdigest() != row["sha256"]:
                    break
            ended[row["key"]], end, whole = row, after, whole + len(line)
        self._rows.truncate(whole)
        self._rows.seek(whole)
        self._file.truncate(end)
        self._file.seek(end)
        return ended

    def add(self, row: dict[str, Any], image: bytes | None, extension: str) -> None:
        """Adds a row that has ended, values of JSON and tuples by name, and its image if the tar is to hold it.

        Such a row has "size" and "sha256", and gets its "offset".
        """
        if image is not None:
            row["offset"] = self._tar.tarstream.offset + tarfile.BLOCKSIZE
            self._tar.write({"__key__": row["key"], extension: image})
            self._file.flush()
        end = self._tar.tarstream.offset
        self._rows.write(json.dumps({"row": row, "end": end}, default=astuple).encode() + b"\n")
        self._rows.flush()

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
