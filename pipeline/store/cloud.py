"""Keeps a store in a bucket of Google Cloud Storage or a container of Azure Blob Storage, by the library obstore.

obstore sends a request again after a transient error. Conditional writes are sent again here, since one of them may
meet its own first try, whose answer was lost, and recognises it by its bytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore, from_url

from pipeline.errors import Unreachable, UserError
from pipeline.store.base import Entry, cut, has_bytes, tries
from pipeline.store.names import check_path

PART_BYTES = 16 << 20  # a larger file is uploaded in parts
CHUNK_BYTES = 1 << 20
BATCH = 100  # objects that are deleted at once
CREDENTIALS = {
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_TOKEN",
}


@dataclass(frozen=True)
class CloudStore:
    """Holds objects in a bucket, gs://BUCKET/PREFIX, or in a container, az://CONTAINER/PREFIX.

    Endpoint, account and credentials come from the standard settings of the cloud (GOOGLE_..., AZURE_...).
    """

    url: str

    def fresh(self) -> CloudStore:
        return replace(self)  # without the client, and so without its connections

    @cached_property
    def _client(self) -> AzureStore | GCSStore:
        return self._open()

    @cached_property
    def _once(self) -> AzureStore | GCSStore:
        """A client that sends a request only once."""
        return self._open(retry_config={"max_retries": 0})

    def _open(self, **options: Any) -> Any:
        with self._explained():
            return from_url(self.url, **options)

    def __getstate__(self) -> dict[str, Any]:  # connections cannot be pickled
        return {"url": self.url}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raises UserError for what a user can mend, and Unreachable for errors that waiting did not cure."""
        hint = CREDENTIALS.get(self.url.partition(":")[0], "")
        try:
            yield
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as e:
            why = "these credentials may not read, write, list or delete there"
            raise UserError(f"store {self.url}: {why}; grant it to them, or {hint} ({_said(e)})") from e
        except exceptions.GenericError as e:  # of the network, of a failing server, or of missing credentials
            raise Unreachable(
                f"store {self.url}: cannot be reached; check the network, and the credentials: {hint} ({_said(e)})"
            ) from e
        except exceptions.BaseError as e:
            raise UserError(f"store {self.url}: {_said(e)}; correct it, then run the same command again") from e

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None and stop <= start:
            return b""
        if stop is not None:
            (data,) = self.read_parts(path, [(start, stop)])
            return data
        found = self._get(path, {"range": {"offset": start}} if start else {}, start)
        with self._explained():
            return found.bytes().to_bytes() if found else b""

    def read_parts(self, path: str, parts: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        if not parts:
            return
        start, stop = parts[0][0], parts[-1][1]
        found = self._get(path, {"range": (start, stop)}, start) if stop > start else None
        with self._explained():
            yield from cut(found.stream(CHUNK_BYTES) if found else (), start, parts)

    def _get(self, path: str, options: Any, start: int) -> Any:
        """Returns the answer to a request, None where the object ends before ``start``. Raises FileNotFoundError."""
        check_path(path)
        with self._explained():
            try:
                return obstore.get(self._client, path, options=options)
            except FileNotFoundError:
                raise FileNotFoundError(f"{self.url}/{path}") from None
            except exceptions.BaseError:  # also raised for a range behind the end
                found = self.stat(path)
                if found is None or start < found.size:
                    raise
                return None

    def list(self, prefix: str) -> Iterator[Entry]:
        check_path(prefix)
        folder = prefix.rpartition("/")[0]  # obstore lists folders, and not beginnings of names
        with self._explained():
            try:
                for chunk in obstore.list(self._client, folder or None):
                    yield from (_entry(found) for found in chunk if found["path"].startswith(prefix))
            except FileNotFoundError as e:
                raise self._no_bucket(e) from e

    def stat(self, path: str) -> Entry | None:
        check_path(path)
        with self._explained():
            try:
                return _entry(obstore.head(self._client, path))
            except FileNotFoundError:
                return None

    def create(self, path: str, data: bytes | Path, move: bool = False) -> bool:
        if isinstance(data, bytes):
            return self._put(path, data, "create")
        if self.stat(path) is not None:
            return False
        with self._explained():
            obstore.put(self._client, path, data, chunk_size=PART_BYTES)
        return True

    def swap(self, path: str, old: str | None, new: bytes) -> bool:
        if old is None:
            return self._put(path, new, "create")
        check_path(path)
        with self._explained():
            try:
                found = obstore.head(self._client, path)
            except FileNotFoundError:
                return False
        # Google compares a number of the object's generation, which a listing does not have, and Azure the ETag.
        state = {name: found[name] for name in ("e_tag", "version") if found[name]}
        return _entry(found).version == old and self._put(path, new, state)

    def _put(self, path: str, data: bytes, mode: Any) -> bool:
        """Writes an object with one conditional request. Returns whether the condition held."""
        check_path(path)
        tried = False
        with self._explained():
            for last in tries():
                try:
                    obstore.put(self._once, path, data, mode=mode, use_multipart=False)
                    return True
                except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                    return tried and has_bytes(self.read, path, data)  # perhaps by our own try whose answer was lost
                except FileNotFoundError as e:
                    if mode == "create":
                        raise self._no_bucket(e) from e
                    return False
                except exceptions.GenericError:
                    if last:
                        raise
                    tried = True
        raise AssertionError("the last try returns or raises")

    def _no_bucket(self, error: Exception) -> UserError:
        return UserError(
            f"store {self.url}: there is no such bucket; create it or correct the store's URL ({_said(error)})"
        )

    def delete(self, paths: Iterable[str]) -> None:
        remaining = iter(paths)
        while batch := list(islice(remaining, BATCH)):
            for path in batch:
                check_path(path)
            with self._explained():
                try:
                    obstore.delete(self._client, batch)
                except FileNotFoundError:  # names one of them, and may have left out others
                    for path in batch:
                        with suppress(FileNotFoundError):
                            obstore.delete(self._client, path)

    def now(self) -> float:
        """Returns the time at which the server wrote an object for this."""
        path = f"locks/clock-{secrets.token_hex(8)}"
        self.create(path, b"")
        try:
            written = self.stat(path)
        finally:
            self.delete([path])
        if written is None:
            raise Unreachable(f"store {self.url}: {path} was written and is gone; run the same command again")
        return written.modified

    def clear_abandoned(self, before: float) -> int:
        """Returns 0: Azure forgets parts of an upload after a week, and Google by a rule of the bucket."""
        return 0


def _entry(found: Any) -> Entry:
    version = (found["e_tag"] or "").strip('"')  # Azure's listings leave the quotes out
    return Entry(found["path"], found["size"], version, found["last_modified"].timestamp())


def _said(error: Exception) -> str:
    """Returns the first line of what obstore says."""
    return str(error).partition("\n")[0][:300]
