"""Objects in a folder or on S3 behind five methods. The only module that knows one from the other.

Nothing is ever overwritten except by ``swap``, which compares first. ``create`` is atomic and durable: a reader sees
the whole object or none, and of several writers exactly one is told True.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pipeline.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One object: its path, size in bytes, and a token that changes whenever its content does."""

    path: str
    size: int
    version: str


class Store(Protocol):
    """Five methods; paths are relative, with forward slashes."""

    @property
    def url(self) -> str:
        """Where it is, as the configuration names it."""

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of an object. Raises FileNotFoundError."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Every object whose path begins with ``prefix``, in order of path."""

    def create(self, path: str, data: bytes | Path) -> bool:
        """Create an object from bytes or from a file. False: it was there, and stays as it was."""

    def swap(self, path: str, old: str | None, new: bytes) -> bool:
        """Replace the object if its version is still ``old`` (None: if it does not exist). For pins and leases."""

    def delete(self, paths: Iterable[str]) -> None:
        """Delete objects; those that are not there are passed over."""


def open_store(url: str) -> Store:
    """The store at ``url``: s3://bucket/prefix, or a folder. Raises UserError for any other scheme."""
    parts = urlsplit(url)
    if parts.scheme == "s3":
        if not parts.netloc:
            raise UserError(f"store {url}: no bucket; write s3://BUCKET/PREFIX")
        return S3Store(url.rstrip("/"), parts.netloc, parts.path.strip("/"))
    if parts.scheme in ("", "file"):
        return FolderStore(str(Path(parts.path).expanduser().absolute()))
    raise UserError(f"store {url}: only s3://BUCKET/PREFIX or a folder can be a store")


def check_conditions(store: Store) -> None:
    """Prove that the store can be written, read, listed and deleted from, and that it honours conditional writes, on
    which every rule here rests. Leaves no object behind.

    Raises UserError that names what it does not do.
    """
    path = f"locks/probe-{secrets.token_hex(8)}"
    advice = "use a store with conditional writes, such as AWS S3, SeaweedFS, MinIO or a local folder"
    try:
        if not store.create(path, b"1") or store.create(path, b"2") or store.read(path) != b"1":
            raise UserError(
                f"store {store.url} overwrites objects instead of refusing (If-None-Match is ignored); {advice}"
            )
        version = next((entry.version for entry in store.list(path)), None)
        if not store.swap(path, version, b"3") or store.swap(path, version, b"4") or store.read(path) != b"3":
            raise UserError(f"store {store.url} swaps objects without comparing (If-Match is ignored); {advice}")
    finally:
        store.delete([path, _lock_path(path)])
    if list(store.list(path)):
        raise UserError(f"store {store.url} keeps objects that were deleted; allow these credentials to delete")


def local_folder(store: Store) -> Path | None:
    """The folder of a store that is in one."""
    return Path(store.url) if isinstance(store, FolderStore) else None


def clear_abandoned(store: Store, older_s: float, now: float) -> int:
    """Delete what writers that were killed have left half written for ``older_s`` seconds; return how many."""
    if isinstance(store, FolderStore):
        return _clear_temporaries(Path(store.url), now - older_s)
    return store.abort_uploads(now - older_s) if isinstance(store, S3Store) else 0


# --- a folder ---------------------------------------------------------------------------------------------------------


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what a user can mend on a disk into one line."""
    try:
        yield
    except PermissionError as e:
        raise UserError(
            f"store {url}: no permission to write {e.filename or ''}; choose another folder or chmod it"
        ) from e
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"store {url}: the disk is full; free space and run the same command again") from e
        if e.errno in (errno.EROFS, errno.ENOTDIR):
            raise UserError(f"store {url}: cannot be written ({e.strerror}); choose another folder") from e
        raise


@dataclass(frozen=True)
class FolderStore:
    """A store in a local or shared folder."""

    url: str

    def _file(self, path: str) -> Path:
        return Path(self.url, path)

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        with open(self._file(path), "rb") as f:
            f.seek(start)
            return f.read() if stop is None else f.read(stop - start)

    def list(self, prefix: str) -> Iterator[Entry]:
        folder = self._file(prefix if prefix.endswith("/") else os.path.dirname(prefix))
        for root, folders, files in os.walk(folder):
            folders.sort()
            for name in sorted(files):
                file = Path(root, name)
                path = file.relative_to(self.url).as_posix()
                if path.startswith(prefix) and not name.startswith("."):
                    try:
                        yield Entry(path, file.stat().st_size, _version(file, path))
                    except FileNotFoundError:  # deleted since the folder was read
                        continue

    def create(self, path: str, data: bytes | Path) -> bool:
        file = self._file(path)
        if file.exists():
            return False
        with _explained(self.url):
            temporary = _write_temporary(file, data)
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
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file(_lock_path(path)), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (_content_version(file.read_bytes()) if file.exists() else None) != old:
                    return False
                os.replace(_write_temporary(file, new), file)
                _sync_folder(file.parent)
        return True

    def delete(self, paths: Iterable[str]) -> None:
        with _explained(self.url):
            for path in paths:
                self._file(path).unlink(missing_ok=True)


def _lock_path(path: str) -> str:
    """The hidden file that a swap in a folder locks."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}.{name}.lock"


def _content_version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version(file: Path, path: str) -> str:
    """Small objects that may be swapped are known by content; the rest never change, so their name will do."""
    return _content_version(file.read_bytes()) if path.startswith(("locks/", "leases/", "releases/")) else path


def _write_temporary(file: Path, data: bytes | Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(6)}")
    try:
        with open(temporary, "xb") as out:
            if isinstance(data, Path):
                with open(data, "rb") as source:
                    while chunk := source.read(1 << 20):
                        out.write(chunk)
            else:
                out.write(data)
            out.flush()
            os.fsync(out.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _clear_temporaries(folder: Path, before: float) -> int:
    count = 0
    for root, _, files in os.walk(folder):
        for name in files:
            file = Path(root, name)
            with suppress(FileNotFoundError):
                if re.fullmatch(r"\..*\.[0-9a-f]{12}", name) and file.stat().st_mtime <= before:
                    file.unlink()
                    count += 1
    return count


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- S3 ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class S3Store:
    """A store under a prefix of a bucket. Endpoint, region and credentials come from the standard AWS settings."""

    url: str
    bucket: str
    prefix: str

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        session = boto3.session.Session()  # the default one would keep the credentials it first saw
        return session.client("s3", config=Config(retries={"mode": "standard", "max_attempts": 5}, connect_timeout=10))

    def __getstate__(self) -> dict[str, str]:  # clients cannot travel between processes
        return {"url": self.url, "bucket": self.bucket, "prefix": self.prefix}

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from botocore import exceptions

        try:
            yield
        except exceptions.ClientError as e:
            code = e.response["Error"]["Code"]
            hint = {
                "NoSuchBucket": "create the bucket or correct the store's URL",
                "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY or the profile",
                "InvalidAccessKeyId": "the access key is unknown; check AWS_ACCESS_KEY_ID or the profile",
                "AccessDenied": "these credentials may not do this; see the bucket's policy",
                "403": "these credentials may not do this; see the bucket's policy",
            }.get(code)
            if hint:
                raise UserError(f"store {self.url}: {code}: {hint}") from e
            raise
        except exceptions.NoCredentialsError as e:
            raise UserError(
                f"store {self.url}: no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from e
        except exceptions.NoRegionError as e:
            raise UserError(f"store {self.url}: no AWS region; set AWS_REGION") from e
        except (exceptions.EndpointConnectionError, exceptions.ConnectTimeoutError) as e:
            raise UserError(f"store {self.url}: cannot reach the server; check AWS_ENDPOINT_URL ({e})") from e

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        from botocore.exceptions import ClientError

        if stop is not None and stop <= start:
            return b""
        asked = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}
        with self._explained():
            try:
                return self._client.get_object(Bucket=self.bucket, Key=self._key(path), **asked)["Body"].read()
            except ClientError as e:
                code = e.response["Error"]["Code"]
                if code == "InvalidRange":  # it begins behind the end, where a file has no bytes either
                    return b""
                if code in ("NoSuchKey", "404"):
                    raise FileNotFoundError(f"{self.url}/{path}") from None
                raise

    def list(self, prefix: str) -> Iterator[Entry]:
        skip = len(self._key(""))
        with self._explained():
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            for page in pages:
                for item in page.get("Contents", ()):
                    yield Entry(item["Key"][skip:], item["Size"], item["ETag"])

    def create(self, path: str, data: bytes | Path) -> bool:
        if isinstance(data, Path):
            return self._create_from_file(path, data)
        return self._put(path, data, IfNoneMatch="*")

    def swap(self, path: str, old: str | None, new: bytes) -> bool:
        return self._put(path, new, **({"IfNoneMatch": "*"} if old is None else {"IfMatch": old}))

    def delete(self, paths: Iterable[str]) -> None:
        with self._explained():
            for path in paths:
                self._client.delete_object(Bucket=self.bucket, Key=self._key(path))

    def abort_uploads(self, before: float) -> int:
        """Abort multipart uploads begun earlier than ``before``, which are paid for and never seen."""
        count = 0
        with self._explained():
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self._key("")
            )
            for page in pages:
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"].timestamp() <= before:
                        self._client.abort_multipart_upload(
                            Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                        count += 1
        return count

    def _put(self, path: str, data: bytes, **condition: str) -> bool:
        """A conditional PUT. A retried request may find its own first try there, so after a 412 the nonce is read."""
        from botocore.exceptions import ClientError

        nonce = secrets.token_hex(8)
        with self._explained():
            try:
                self._client.put_object(
                    Bucket=self.bucket, Key=self._key(path), Body=data, Metadata={"nonce": nonce}, **condition
                )
                return True
            except ClientError as e:
                status = e.response["ResponseMetadata"].get("HTTPStatusCode")
                if status in (404, 412):  # 404: If-Match on an object that is gone
                    return status == 412 and self._nonce(path) == nonce
                if status == 409:  # two conditional writes at once: somebody else is winning
                    return False
                raise

    def _nonce(self, path: str) -> str | None:
        from botocore.exceptions import ClientError

        try:
            return self._client.head_object(Bucket=self.bucket, Key=self._key(path))["Metadata"].get("nonce")
        except ClientError:
            return None

    def _create_from_file(self, path: str, file: Path, part_bytes: int = 64 << 20) -> bool:
        """A multipart upload whose completion is conditional; a single PUT when one part is enough."""
        if file.stat().st_size <= part_bytes:
            return self._put(path, file.read_bytes(), IfNoneMatch="*")
        from botocore.exceptions import ClientError

        where = {"Bucket": self.bucket, "Key": self._key(path)}
        with self._explained():
            upload = self._client.create_multipart_upload(**where)["UploadId"]
            try:
                parts: list[dict[str, Any]] = []
                with open(file, "rb") as source:
                    while chunk := source.read(part_bytes):
                        number = len(parts) + 1
                        tag = self._client.upload_part(**where, UploadId=upload, PartNumber=number, Body=chunk)["ETag"]
                        parts.append({"PartNumber": number, "ETag": tag})
                self._client.complete_multipart_upload(
                    **where, UploadId=upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
                )
                return True
            except ClientError as e:
                self._client.abort_multipart_upload(**where, UploadId=upload)
                if e.response["ResponseMetadata"].get("HTTPStatusCode") in (409, 412):
                    return False
                raise
