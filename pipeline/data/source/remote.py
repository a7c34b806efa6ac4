"""Fetches lists that lie on S3 or on a web server, once in a process."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote

from pipeline.data.fetch.references import shown
from pipeline.data.fetch.rules import user_agent
from pipeline.data.source.tables import SUFFIXES, table_kind
from pipeline.errors import UserError
from pipeline.progress import say_once
from pipeline.store import Entry, Store, open_store

SCHEMES = ("s3://", "http://", "https://")
PART_BYTES = 64 << 20
TIMEOUT_S = 60.0  # without a byte


def is_remote(path: str) -> bool:
    """Returns whether a list lies on S3 or on a web server."""
    return path.startswith(SCHEMES)


def check_remote(path: str) -> None:
    """Raises UserError for what is not a table, and for a URL with a secret: many can read where lists are named."""
    if shown(path) != path:
        raise UserError(f"source {shown(path)}: a URL with a secret in it is kept for many to read; download the list")
    if table_kind(_plain(path)) is None:
        raise UserError(
            f"source {path}: of S3 and the web only {', '.join(SUFFIXES[:4])} files (or .csv.gz and so on) are read; "
            "download folders and tars, or name each file"
        )


def remote_version(path: str) -> str:
    """Returns what changes whenever a list does. Raises UserError if it cannot be reached."""
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
    with open(file, "wb") as out:
        if path.startswith("s3://"):
            store, key, found = _object(path)
            parts = [(at, min(at + PART_BYTES, found.size)) for at in range(0, found.size, PART_BYTES)]
            for part in store.read_parts(key, parts):
                out.write(part)
        else:
            with _asked(path) as answer:
                shutil.copyfileobj(answer, out)
                promised = answer.headers["Content-Length"]
            if promised and out.tell() != int(promised):
                raise UserError(f"source {path}: {out.tell():,} of {promised} bytes came; run the same command again")
    return file


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="unclip-lists-")


@contextmanager
def _asked(path: str) -> Iterator[http.client.HTTPResponse]:
    """Asks a web server, by the proxies of the environment; the user has named it, so it may be a private one."""
    try:
        asked = urllib.request.Request(path, headers={"User-Agent": user_agent("")})  # some refuse Python's own
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
            yield answer
    except urllib.error.HTTPError as e:
        raise UserError(f"source {path}: the server answers {e.code} {e.reason}; check the URL in a browser") from None
    except (OSError, http.client.HTTPException, ValueError) as e:
        why = getattr(e, "reason", None) or e or type(e).__name__
        raise UserError(
            f"source {path}: cannot be fetched ({why}); run again, or download it and name the file"
        ) from None
