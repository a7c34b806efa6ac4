"""A store under a prefix of an S3 bucket.

A request that fails in a way that may pass is sent again, after waiting, TRIES times in all: by boto3 until the answer
has begun, by us when its body breaks off. A write may so meet its own first try, whose answer was lost, and knows it by
a nonce in the object's metadata.
"""

from __future__ import annotations

import io
import random
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.errors import Unreachable, UserError
from pipeline.store.base import Buffers, Entry, Traffic, cut
from pipeline.store.names import check_path

TRIES = 6  # with boto3's waits about a minute at most
TIMEOUT_S = 60.0  # without a byte
LEAST_RATE = 16 << 10  # bytes a second that a body must bring from then on
PART_BYTES = 64 << 20  # what has more is uploaded in parts; S3 takes at most 10,000 of at least 5 MiB
CONNECTIONS = 32  # of as many threads at once; more wait for one
BATCH = 1000  # objects that one request may delete

REQUESTS = {
    "GetObject": "GET",
    "HeadObject": "HEAD",
    "ListObjectsV2": "LIST",
    "ListMultipartUploads": "LIST",
    "DeleteObjects": "DELETE",
    "AbortMultipartUpload": "DELETE",
}  # everything else writes, and is billed as a PUT
PERMISSIONS = {  # of AWS; S3 asks for others than the names of its operations
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "DeleteObjects": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
}  # everything else writes, and needs s3:PutObject
DENIED = "these credentials lack {permission} for {path}; docs/security.md has the policies of a bucket"
HINTS = {
    "NoSuchBucket": "create the bucket or correct the store's URL",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY or the profile",
    "InvalidAccessKeyId": "the access key is unknown; check AWS_ACCESS_KEY_ID or the profile",
    "AccessDenied": DENIED,
    "403": DENIED,
    "ExpiredToken": "the credentials have expired; renew them and run the same command again",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
}
_making = threading.Lock()  # a session may not be shared while a client is made


@dataclass(frozen=True)
class S3Store:
    """Endpoint, region and credentials come from the standard AWS settings."""

    url: str
    bucket: str
    prefix: str
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)

    def counted(self) -> S3Store:
        other = replace(self, traffic=Traffic())
        other.__dict__["_session"] = self._session  # it has read what makes a first client slow
        return other

    def fresh(self) -> S3Store:
        other = replace(self)  # without the client, and so without its connections
        other.__dict__["_session"] = self._session  # and with the same credentials
        return other

    @cached_property
    def _session(self) -> Any:
        import boto3

        return boto3.session.Session()  # the default one would keep the credentials it first saw

    @cached_property
    def _client(self) -> Any:
        from botocore.config import Config

        config = Config(
            retries={"mode": "standard", "total_max_attempts": TRIES},
            connect_timeout=10,
            read_timeout=TIMEOUT_S,
            max_pool_connections=CONNECTIONS,
        )
        with _making:
            client = self._session.client("s3", config=config)
        client.meta.events.register("before-send.s3", self._count)
        return client

    def _count(self, request: Any, event_name: str, **_: Any) -> None:
        """Called for every request that is really sent."""
        operation = event_name.rpartition(".")[2]
        payload = operation in ("PutObject", "UploadPart")
        length = request.headers.get("X-Amz-Decoded-Content-Length", request.headers.get("Content-Length", 0))
        self.traffic.add(**{REQUESTS.get(operation, "PUT"): 1}, bytes_written=int(length) if payload else 0)

    def __getstate__(self) -> dict[str, Any]:  # clients cannot travel between processes
        return {name: self.__dict__[name] for name in ("url", "bucket", "prefix", "traffic")}

    def _where(self, path: str) -> dict[str, str]:
        check_path(path)
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{path}" if self.prefix else path}

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        """Turn what a user can mend, and what did not pass by waiting, into one line."""
        from botocore import exceptions
        from urllib3.exceptions import HTTPError

        again = "then run the same command again"
        try:
            yield
        except exceptions.ClientError as e:
            code, status = e.response["Error"]["Code"], _status(e)
            if code in HINTS:
                raise UserError(f"store {self.url}: {code}: {_hint(code, e.operation_name, path)}") from e
            if status >= 500 or status in (409, 429) or code == "RequestTimeout":
                raise Unreachable(
                    f"store {self.url}: {e.operation_name} was answered {code} {TRIES} times; the server is overloaded "
                    f"or ill: wait, or use fewer workers, {again}"
                ) from e
            raise
        except exceptions.NoCredentialsError as e:
            raise UserError(
                f"store {self.url}: no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from e
        except exceptions.NoRegionError as e:
            raise UserError(f"store {self.url}: no AWS region; set AWS_REGION") from e
        except (exceptions.EndpointConnectionError, exceptions.ConnectTimeoutError) as e:
            raise Unreachable(f"store {self.url}: cannot reach the server; check AWS_ENDPOINT_URL ({e})") from e
        except (exceptions.HTTPClientError, HTTPError) as e:
            raise Unreachable(
                f"store {self.url}: the connection broke off or stood still {TRIES} times; check the network and the "
                f"server, {again} ({' '.join(str(e).split())})"
            ) from e

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        from urllib3.exceptions import HTTPError

        if stop is not None and stop <= start:
            return b""
        with self._explained(path):
            for last in _tries():
                data = io.BytesIO()
                try:
                    for chunk in self._chunks(path, start, stop):
                        data.write(chunk)
                    return data.getvalue()
                except HTTPError:  # while the body came
                    if last:
                        raise
        raise AssertionError("the last try returns or raises")

    def read_parts(self, path: str, parts: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        from urllib3.exceptions import HTTPError

        given = 0
        with self._explained(path):
            for last in _tries():
                left = parts[given:]
                try:
                    # Cut as they come: to gather all first, and then copy each, would hold up every other thread.
                    for part in cut(self._chunks(path, left[0][0], left[-1][1]), left[0][0], left):
                        yield part
                        given += 1
                    return
                except HTTPError:
                    if last:
                        raise

    def _chunks(self, path: str, start: int, stop: int | None) -> Iterator[bytes]:
        """The body of one request for bytes [start, stop). Raises FileNotFoundError, and HTTPError, of urllib3, where
        it ends early, stands still or only drips."""
        from botocore.exceptions import ClientError
        from urllib3.exceptions import HTTPError

        asked = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}
        try:
            answer = self._client.get_object(**self._where(path), **asked)
        except ClientError as e:
            if _status(e) == 416:  # the range begins behind the end, where a file has no bytes either
                return
            if _status(e) == 404 and e.response["Error"]["Code"] not in HINTS:
                raise FileNotFoundError(f"{self.url}/{path}") from None
            raise
        began, count = time.monotonic(), 0
        try:
            # urllib3's response, which gives what is there instead of waiting for a whole chunk
            with answer["Body"] as response:
                while chunk := response.read1(1 << 20):
                    count += len(chunk)
                    if time.monotonic() - began > TIMEOUT_S + count / LEAST_RATE:
                        raise HTTPError("the body comes too slowly")
                    yield chunk
        finally:
            self.traffic.add(bytes_read=count)
        if count != answer["ContentLength"]:
            raise HTTPError("the body ended early")

    def list(self, prefix: str) -> Iterator[Entry]:
        where = self._where(prefix)
        skip = len(where["Key"]) - len(prefix)
        with self._explained(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=where["Key"])
            for page in pages:
                for item in page.get("Contents", ()):
                    yield Entry(item["Key"][skip:], item["Size"], item["ETag"])

    def create(self, path: str, data: bytes | Path | Buffers, move: bool = False) -> bool:
        if isinstance(data, bytes):
            return self._put(path, data, IfNoneMatch="*")
        return self._create_in_parts(path, data)

    def swap(self, path: str, old: str | None, new: bytes) -> bool:
        return self._put(path, new, **({"IfNoneMatch": "*"} if old is None else {"IfMatch": old}))

    def delete(self, paths: Iterable[str]) -> None:
        remaining = iter(paths)
        while batch := list(islice(remaining, BATCH)):
            with self._explained(batch[0]):
                self._delete(batch)

    def _delete(self, batch: Sequence[str]) -> None:
        """One request; its answer may be a success and still name objects that were not deleted."""
        keys = [self._where(path)["Key"] for path in batch]
        for last in _tries():
            answer = self._client.delete_objects(
                Bucket=self.bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
            )
            errors = [error for error in answer.get("Errors", ()) if error.get("Code") != "NoSuchKey"]
            if not errors:
                return
            keys = [error["Key"] for error in errors]
            code = errors[0].get("Code", "unknown error")
            if last or code in HINTS:
                raise UserError(
                    f"store {self.url}: {len(keys)} objects could not be deleted, the first is {keys[0]} ({code}): "
                    f"{_hint(code, 'DeleteObjects', keys[0])}"
                )

    def now(self) -> float:
        """Returns the time that the server answers with, in whole seconds."""
        with self._explained(""):
            answer = self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._where("")["Key"], MaxKeys=1)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def clear_abandoned(self, before: float) -> int:
        """Abort multipart uploads begun earlier than ``before``, which are paid for and never seen; return how many."""
        count = 0
        with self._explained(""):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self._where("")["Key"]
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
        """A conditional PUT of one request."""
        from botocore.exceptions import ClientError

        nonce = secrets.token_hex(8)
        with self._explained(path):
            for last in _tries():
                try:
                    self._client.put_object(**self._where(path), Body=data, Metadata={"nonce": nonce}, **condition)
                    return True
                except ClientError as e:
                    if _status(e) not in (404, 409, 412) or e.response["Error"]["Code"] in HINTS:
                        raise
                    if _status(e) == 404:  # If-Match on an object that is gone
                        return False
                    ours = self._nonce(path) == nonce
                    if ours or _status(e) == 412:
                        return ours
                    if last:  # 409: somebody, perhaps our own first try, is writing, and nobody has won yet
                        raise
        raise AssertionError("the last try returns or raises")

    def _nonce(self, path: str) -> str | None:
        """Whose the object is: the nonce of its writer, empty if it has none; None if there is no object."""
        from botocore.exceptions import ClientError

        try:
            return str(self._client.head_object(**self._where(path))["Metadata"].get("nonce", ""))
        except ClientError as e:
            if _status(e) == 404:
                return None
            raise

    def _create_in_parts(self, path: str, data: Path | Buffers) -> bool:
        """A multipart upload whose completion is conditional; a single PUT when one part is enough."""
        if (data.stat().st_size if isinstance(data, Path) else sum(map(len, data))) <= PART_BYTES:
            return self._put(path, b"".join(_parts(data)), IfNoneMatch="*")
        from botocore.exceptions import ClientError

        # The nonce is given when an upload begins, so the object has it however its completion was answered.
        nonce = secrets.token_hex(8)
        with self._explained(path):
            for last in _tries():
                standing = self._nonce(path)
                if standing is not None:
                    return standing == nonce
                try:
                    self._upload(path, data, nonce)
                    return True
                except ClientError as e:
                    # 404: no such upload. Our own first try has completed it, or somebody has aborted it as abandoned.
                    if last or _status(e) not in (404, 409, 412) or e.response["Error"]["Code"] in HINTS:
                        raise
        raise AssertionError("the last try returns or raises")

    def _upload(self, path: str, data: Path | Buffers, nonce: str) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        where = self._where(path)
        upload = self._client.create_multipart_upload(**where, Metadata={"nonce": nonce})["UploadId"]
        try:
            parts: list[dict[str, Any]] = []
            for number, part in enumerate(_parts(data), start=1):
                tag = self._client.upload_part(**where, UploadId=upload, PartNumber=number, Body=part)["ETag"]
                parts.append({"PartNumber": number, "ETag": tag})
            self._client.complete_multipart_upload(
                **where, UploadId=upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
            )
        except BaseException:
            with suppress(ClientError, BotoCoreError):  # what cannot be aborted now, clear_abandoned finds
                self._client.abort_multipart_upload(**where, UploadId=upload)
            raise


def _parts(data: Path | Buffers) -> Iterator[bytes]:
    """PART_BYTES after PART_BYTES, and what is left."""
    if isinstance(data, Path):
        with open(data, "rb") as source:
            yield from iter(lambda: source.read(PART_BYTES), b"")
        return
    part: list[memoryview] = []
    room = PART_BYTES
    for buffer in data:
        while buffer:
            part.append(buffer[:room])
            room, buffer = room - len(part[-1]), buffer[room:]
            if room == 0:
                yield b"".join(part)
                part, room = [], PART_BYTES
    if part:
        yield b"".join(part)


def _hint(code: str, operation: str, path: str) -> str:
    hint = HINTS.get(code, "see the log of the server, then run the same command again")
    return hint.format(permission=PERMISSIONS.get(operation, "s3:PutObject"), path=path or "the bucket")


def _status(error: Any) -> int:
    """Of HTTP. It tells more surely than the code, which is in the body, and that may be cut off."""
    return int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0))


def _tries() -> Iterator[bool]:
    """TRIES times whether this is the last one. Between them up to 1, 2, 4 ... 20 seconds pass, at random, so that many
    clients do not come back at once."""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(random.random() * min(20, 2 ** (attempt - 1)))
        yield attempt == TRIES - 1
