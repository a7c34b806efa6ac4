"""Fetches lists that lie on S3 or on a web server, once in a process, and the tables of a folder on S3 one by one.

The user names the address of a list himself, so it may be a private one; where its server redirects to is the
server's word, and judged as images' addresses are.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

from pipeline.data.fetch.opener import Guard, Refused, Response, failures_as_reasons, normal_url
from pipeline.data.fetch.references import shown
from pipeline.data.fetch.rules import user_agent
from pipeline.data.fetch.visit import Access, Hosts, Room, Visit, host_of
from pipeline.data.source.columns import SUFFIXES, table_kind
from pipeline.data.source.duplicates import scratch
from pipeline.data.source.reader import ListReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import ListPart, ListRow, Source, suffix_of, unread_files
from pipeline.data.source.tables import TableFiles, listed_rows
from pipeline.errors import UserError
from pipeline.ledger import REASONS
from pipeline.local import PathPolicy, is_cell, on_web
from pipeline.progress import say_once
from pipeline.store import Entry, Store, open_store

PART_BYTES = 64 << 20
TIMEOUT_S = 60.0  # without a byte
MOST_S = 6 * 3600.0  # for a whole list
LEAST_RATE = 16 << 10  # bytes a second, on average after TIMEOUT_S
MOST_BYTES = 8 << 30  # of a list, and at most half of what is free on the disk
BY_HAND = "download it and name the file"


class RemoteTable(TableFiles):
    """A table on S3 or on a web server."""

    everywhere = True

    @classmethod
    def matches(cls, path: str) -> bool:
        return on_web(path)

    @property
    def own(self) -> str:
        return os.path.dirname(self.path) if self.path.startswith("s3://") else ""

    def files(self) -> Iterable[Path]:
        return (fetched(self.path),)

    def fingerprint(self) -> Any:
        return ["remote", self.path, remote_version(self.path)]

    def rows(self, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        return _copied_rows(self.path, fetched(self.path), recipe, reader, self.policy(recipe))


class RemoteFolder(Source):
    """A folder of tables on S3, in the order of their keys. Each is fetched when it is read, and its copy deleted."""

    everywhere = True

    @classmethod
    def matches(cls, path: str) -> bool:
        return path.startswith("s3://") and table_kind(path) is None

    @property
    def own(self) -> str:
        return self.path.rstrip("/")

    def fingerprint(self) -> Any:
        return [part.fingerprint() for part in self.parts()]

    def parts(self) -> Sequence[ListPart]:
        """Returns the tables, each known by its key, its size and its ETag. Raises UserError without one."""
        check_secret(self.path)
        store = open_store(self.own)
        found = [
            ListPart(
                f"{self.own}/{entry.path}",
                partial(_version, self.own, entry),
                partial(self._rows, store, entry),
                size=entry.size,
            )
            for entry in store.list("")
            if table_kind(entry.path) and not _hidden(entry.path)
        ]
        if not found:
            raise UserError(
                f"source {self.path}: no {', '.join(SUFFIXES[:4])} file (or .csv.gz and so on) in this folder on S3; "
                "download images and tars, which are not read there"
            )
        return found

    def rows(self, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        for part in self.parts():
            yield from part.rows(recipe, reader)

    def _rows(self, store: Store, entry: Entry, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        path = f"{self.own}/{entry.path}"
        with tempfile.TemporaryDirectory(prefix="unclip-lists-") as folder:
            copy = Path(folder, os.path.basename(entry.path))
            with _new_file(copy) as (out, most):
                _copy_object(path, store, entry, out, most)
            now = store.stat(entry.path)
            if now is None or now.version != entry.version:
                raise UserError(f"source {path}: changed while the list was read; run again")
            yield from _copied_rows(path, copy, recipe, reader, self.policy(recipe))

    def unread(self, recipe: SourceRecipe) -> str:
        found = defaultdict(list)
        for entry in open_store(self.own).list(""):
            if not (table_kind(entry.path) or _hidden(entry.path) or entry.path.endswith("/")):
                found[suffix_of(PurePosixPath(entry.path))].append(entry.path)
        return unread_files(self.own, found)


def _hidden(path: str) -> bool:
    """Returns whether an object belongs to what writes a table, as Spark's ``_temporary``, or is hidden."""
    return any(name.startswith((".", "_")) for name in path.split("/"))


def _version(folder: str, entry: Entry) -> Any:
    return ["remote", folder, entry.path, entry.size, entry.version]


def _copied_rows(path: str, copy: Path, recipe: SourceRecipe, reader: ListReader, may: PathPolicy) -> Iterator[ListRow]:
    """Yields the rows of a copy of a table, in whose messages the table is named."""
    try:
        for row in listed_rows(copy, recipe, reader, may, partial(remote_beside, path)):
            if is_cell(row.url):
                raise UserError(f"source {path}: images inside of a file are read on this machine; {BY_HAND}")
            yield row
    except UserError as e:
        raise UserError(str(e).replace(str(copy), path)) from None


def check_secret(path: str) -> None:
    """Raises UserError for a URL with a secret: many can read where lists are named."""
    if shown(path) != path:
        raise UserError(
            f"source {shown(path)}: its URL contains a secret, which the store would show to its readers; download "
            "the list"
        )


def check_remote(path: str) -> None:
    """Raises UserError for what is not a table, and as check_secret does."""
    check_secret(path)
    if path.startswith("https://huggingface.co/datasets/") and table_kind(_plain(path)) is None:
        raise UserError(f"source {path}: for the Hugging Face Hub, write hf://datasets/OWNER/NAME")
    if table_kind(_plain(path)) is None:
        raise UserError(
            f"source {path}: of the web only {', '.join(SUFFIXES[:4])} files (or .csv.gz and so on) are read; "
            "download folders and tars, or name each file"
        )


def remote_version(path: str) -> str:
    """Returns what changes whenever a list does. Raises UserError as check_remote does, or if it cannot be reached."""
    check_remote(path)
    if path.startswith("s3://"):
        return _object(path)[1].version
    with _asked(path) as answer:
        headers = answer.headers
    said = headers["ETag"] or f"{headers['Last-Modified'] or ''} {headers['Content-Length'] or ''}".strip()
    if headers["ETag"] or headers["Last-Modified"]:
        return said
    return hashlib.sha256(_fetch(path, "").read_bytes()).hexdigest()


def fetched(path: str) -> Path:
    """Returns a copy of a list on this machine, which ends with the process. Raises UserError."""
    return _fetch(path, remote_version(path))


def remote_beside(path: str, reference: str) -> str:
    """Returns the reference of an image by its path relative to the folder of a list; keys of S3 have no escapes."""
    folder = _plain(path).rpartition("/")[0]
    return f"{folder}/{reference if path.startswith('s3://') else quote(reference)}"


def _plain(path: str) -> str:
    return path if path.startswith("s3://") else path.partition("?")[0].partition("#")[0]


def _object(path: str) -> tuple[Store, Entry]:
    """Returns the folder of a list on S3, and its object there. Raises UserError if there is none."""
    folder, _, key = path.rpartition("/")
    store = open_store(folder)
    found = store.stat(key)
    if found is None:
        raise UserError(f"source {path}: no such object on S3")
    return store, found


@cache
def _fetch(path: str, version: str) -> Path:
    say_once(f"fetching {path}")
    name = os.path.basename(unquote(_plain(path)))
    file = Path(_folder().name, hashlib.sha256(f"{path} {version}".encode()).hexdigest()[:16], name)
    file.parent.mkdir(exist_ok=True)
    with _new_file(file) as (out, most):
        if path.startswith("s3://"):
            _copy_object(path, *_object(path), out, most)
        else:
            _copy_page(path, out, most)
    return file


@contextmanager
def _new_file(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a file, which an error deletes. Yields it, and how many bytes it may have."""
    most = min(MOST_BYTES, shutil.disk_usage(file.parent).free // 2)
    with open(file, "wb") as out:
        try:
            yield out, most
        except BaseException:
            file.unlink()
            raise


def _check_size(path: str, size: int, most: int) -> None:
    if size > most:
        raise UserError(f"source {path}: it has {size:,} bytes; the limit is {most:,}; {BY_HAND}")


def _copy_object(path: str, store: Store, found: Entry, out: BinaryIO, most: int) -> None:
    """Writes a list on S3, if it has no more than ``most`` bytes."""
    _check_size(path, found.size, most)
    parts = [(at, min(at + PART_BYTES, found.size)) for at in range(0, found.size, PART_BYTES)]
    try:
        for part in store.read_parts(found.path, parts):
            with scratch():
                out.write(part)
    except FileNotFoundError:
        raise UserError(f"source {path}: deleted while the list was read; run again") from None


def _copy_page(path: str, out: BinaryIO, most: int) -> None:
    """Writes a list on a web server within the budgets of bytes and time."""
    begun = time.monotonic()
    with _asked(path) as answer:
        promised = int(said) if (said := answer.headers["Content-Length"] or "").isdecimal() else None
        _check_size(path, promised or 0, most)
        while data := answer.read1(1 << 20):
            answer.reader.deadline = min(time.monotonic() + TIMEOUT_S, begun + MOST_S)
            try:
                out.write(data)
            except OSError as e:
                raise UserError(f"source {path}: no room for it in {_folder().name} ({e.strerror})") from None
            if out.tell() > most:
                raise UserError(f"source {path}: the server sent over {most:,} bytes; {BY_HAND}")
            if out.tell() < LEAST_RATE * (time.monotonic() - begun - TIMEOUT_S):
                raise UserError(f"source {path}: the server sends less than {LEAST_RATE:,} bytes a second; {BY_HAND}")
    if promised is not None and out.tell() != promised:
        raise UserError(f"source {path}: {out.tell():,} of {promised} bytes arrived; run the same command again")


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="unclip-lists-")


@contextmanager
def _asked(path: str) -> Iterator[Response]:
    """Asks a web server, and where it redirects to. Raises UserError for whatever goes wrong, in the body too."""
    visit = None
    try:
        with failures_as_reasons(), ExitStack() as stack:
            url = normal_url(path)
            # The addresses of the host that the user named, as they are now: a name that changes its address in between
            # must not lead a redirect into a private network.
            found = socket.getaddrinfo(host_of(url), None)
            guard = Guard({}, sorted({str(place[0]).partition("%")[0] for *_, place in found}))
            access = Access(guard, Hosts(1), user_agent(""), Room(0))
            visit = stack.enter_context(closing(Visit(access, TIMEOUT_S, MOST_BYTES, lambda _: None, image=False)))
            yield stack.enter_context(visit.open(url))
    except Refused as e:
        why, where = str(e), ""
        if visit is not None and visit.url not in ("", url):
            where = f", where it redirects to {shown(visit.url)}"
        if why == "forbidden_address":
            raise UserError(f"source {path}: not fetched{where}: that address is not public; name that URL") from None
        if visit is not None and visit.status >= 400:
            said = f"the server answers {visit.status}{where}; check the URL in a browser"
            raise UserError(f"source {path}: {said}") from None
        raise UserError(
            f"source {path}: cannot be fetched ({why}: {REASONS[why]}{where}); run again, or download it and name "
            "the file"
        ) from None
