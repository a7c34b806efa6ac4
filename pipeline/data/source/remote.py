"""Fetches lists that lie on S3 or on a web server, once in a process.

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
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

from pipeline.data.fetch.opener import Guard, Refused, Response, failures_as_reasons, normal_url
from pipeline.data.fetch.references import shown
from pipeline.data.fetch.rules import user_agent
from pipeline.data.fetch.visit import Access, Hosts, Room, Visit, host_of
from pipeline.data.source.columns import SUFFIXES, table_kind
from pipeline.data.source.reader import ListReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import ListRow
from pipeline.data.source.tables import TableFiles, listed_rows
from pipeline.errors import UserError
from pipeline.ledger import REASONS
from pipeline.local import is_cell, on_web
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
        copy = fetched(self.path)
        try:
            for row in listed_rows(copy, recipe, reader, self.policy(recipe), partial(remote_beside, self.path)):
                if is_cell(row.url):
                    raise UserError(f"source {self.path}: images inside of a file are read on this machine; {BY_HAND}")
                yield row
        except UserError as e:
            raise UserError(str(e).replace(str(copy), self.path)) from None


def check_remote(path: str) -> None:
    """Raises UserError for what is not a table, and for a URL with a secret: many can read where lists are named."""
    if shown(path) != path:
        raise UserError(f"source {shown(path)}: a URL with a secret in it is kept for many to read; download the list")
    if path.startswith("https://huggingface.co/datasets/") and table_kind(_plain(path)) is None:
        raise UserError(f"source {path}: of the Hugging Face Hub write hf://datasets/OWNER/NAME")
    if table_kind(_plain(path)) is None:
        raise UserError(
            f"source {path}: of S3 and the web only {', '.join(SUFFIXES[:4])} files (or .csv.gz and so on) are read; "
            "download folders and tars, or name each file"
        )


def remote_version(path: str) -> str:
    """Returns what changes whenever a list does. Raises UserError as check_remote does, or if it cannot be reached."""
    check_remote(path)
    if path.startswith("s3://"):
        return _object(path)[2].version
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


def _object(path: str) -> tuple[Store, str, Entry]:
    """Returns where a list lies on S3, and what is there. Raises UserError if nothing is."""
    folder, _, key = path.rpartition("/")
    store = open_store(folder)
    found = store.stat(key)
    if found is None:
        raise UserError(f"source {path}: no such object on S3")
    return store, key, found


@cache
def _fetch(path: str, version: str) -> Path:
    say_once(f"fetching {path}")
    name = os.path.basename(unquote(_plain(path)))
    file = Path(_folder().name, hashlib.sha256(f"{path} {version}".encode()).hexdigest()[:16], name)
    file.parent.mkdir(exist_ok=True)
    most = min(MOST_BYTES, shutil.disk_usage(_folder().name).free // 2)
    with open(file, "wb") as out:
        try:
            (_copy_object if path.startswith("s3://") else _copy_page)(path, out, most)
        except BaseException:
            file.unlink()
            raise
    return file


def _check_size(path: str, size: int, most: int) -> None:
    if size > most:
        raise UserError(f"source {path}: it has {size:,} bytes, and {most:,} at most are fetched; {BY_HAND}")


def _copy_object(path: str, out: BinaryIO, most: int) -> None:
    """Writes a list on S3, if it has no more than ``most`` bytes."""
    store, key, found = _object(path)
    _check_size(path, found.size, most)
    parts = [(at, min(at + PART_BYTES, found.size)) for at in range(0, found.size, PART_BYTES)]
    for part in store.read_parts(key, parts):
        out.write(part)


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
                raise UserError(f"source {path}: over {most:,} bytes came, and there is no end; {BY_HAND}")
            if out.tell() < LEAST_RATE * (time.monotonic() - begun - TIMEOUT_S):
                raise UserError(f"source {path}: the server sends less than {LEAST_RATE:,} bytes a second; {BY_HAND}")
    if promised is not None and out.tell() != promised:
        raise UserError(f"source {path}: {out.tell():,} of {promised} bytes came; run the same command again")


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
