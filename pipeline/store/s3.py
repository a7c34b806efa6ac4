"""Keeps a store under a prefix of an S3 bucket.

A request with a transient error is sent again, after waiting, TRIES times in all: by boto3 until the answer has begun,
by this module when the body breaks off. A conditional write may so meet its own first try, whose answer was lost, and
recognises it by its bytes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore import exceptions
from botocore.config import Config
from botocore.exceptions import ClientError
from urllib3.exceptions import HTTPError

from pipeline.errors import Unreachable, UserError
from pipeline.pages import page
from pipeline.store.base import TRIES, Entry, cut, has_bytes, tries
from pipeline.store.names import check_path

TIMEOUT_S = 60.0  # without a byte
LEAST_RATE = 16 << 10  # bytes a second of a body, after TIMEOUT_S
PART_BYTES = 16 << 20  # a larger file is uploaded in parts, ten at once; S3 takes at most 10,000 of at least 5 MiB
CONNECTIONS = 32  # for as many threads at once; more wait for one
END = sys.maxsize  # of any object
BATCH = 1000  # objects that one request may delete

PERMISSIONS = {  # of AWS; S3 asks for others than the names of its operations
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "DeleteObjects": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
}  # everything else writes, and needs s3:PutObject
DENIED = f"these credentials lack {{permission}} for {{path}}; {page('security')} has the policies of a bucket"
HINTS = {
    "NoSuchBucket": "create the bucket or correct the store's URL",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY or the profile",
    "InvalidAccessKeyId": "the access key is unknown; check AWS_ACCESS_KEY_ID or the profile",
    "AccessDenied": DENIED,
    "403": DENIED,
    "ExpiredToken": "the credentials have expired; renew them and run the same command again",
    "InvalidToken": "AWS_SESSION_TOKEN belongs to other keys, or is from an earlier session; renew the credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
}
PASSING = {"RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded", "IDPCommunicationError"}
_making = threading.Lock()  # boto3's sessions are not thread-safe while they make a client


def s3_client(session: boto3.session.Session, config: Config, what: str) -> Any:
    """Returns a client. Raises UserError, which begins with ``what``, for an endpoint that is not a URL."""
    try:
        return session.client("s3", config=config)
    except ValueError as e:
        if "endpoint" not in str(e):
            raise
        raise UserError(f"{what}: {e}; AWS_ENDPOINT_URL has to begin with http:// or https://") from e


@dataclass(frozen=True)
class S3Store:
    """Holds objects in a bucket. Endpoint, region and credentials come from the standard AWS settings."""

    url: str
    bucket: str
    prefix: str

    def fresh(self) -> S3Store:
        other = replace(self)  # without the client, and so without its connections
        other.__dict__["_session"] = self._session  # and with the same credentials
        return other

    @cached_property
    def _session(self) -> Any:
        with self._explained(""):
            return boto3.session.Session()  # boto3's default session would keep the first credentials for ever

    @cached_property
    def _client(self) -> Any:
        config = Config(
            retries={"mode": "standard", "total_max_attempts": TRIES},
            connect_timeout=10,
            read_timeout=TIMEOUT_S,
            max_pool_connections=CONNECTIONS,
        )
        with _making:
            return s3_client(self._session, config, f"store {self.url}")

    def __getstate__(self) -> dict[str, Any]:  # clients cannot be pickled
        return {name: self.__dict__[name] for name in ("url", "bucket", "prefix")}

    def _where(self, path: str) -> dict[str, str]:
        check_path(path)
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{path}" if self.prefix else path}

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        """Raises UserError for what a user can mend, and Unreachable for errors that waiting did not cure."""
        again = "then run the same command again"
        try:
            yield
        except exceptions.ClientError as e:
            code, status = e.response["Error"]["Code"], _status(e)
            own = e.operation_name in self._client.meta.service_model.operation_names  # else of STS or SSO
            if own and code in HINTS:
                raise UserError(f"store {self.url}: {code}: {_hint(code, e.operation_name, path)}") from e
            passing = status >= 500 or status in (409, 429) or code in PASSING
            if not own and not passing:
                raise UserError(
                    f"store {self.url}: no credentials: {e.operation_name} was answered {code}; check the role and who "
                    f"may take it, {again}"
                ) from e
            if passing:
                raise Unreachable(
                    f"store {self.url}: {e.operation_name} was answered {code} {TRIES} times; the server is overloaded "
                    f"or failing: wait, or use fewer workers, {again}"
                ) from e
            raise
        except exceptions.NoCredentialsError as e:
            raise UserError(
                f"store {self.url}: no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from e
        except exceptions.NoRegionError as e:
            raise UserError(f"store {self.url}: no AWS region; set AWS_REGION") from e
        except exceptions.ConnectionError as e:  # a certificate and a proxy, too
            said = " ".join(str(e).split())
            raise Unreachable(f"store {self.url}: cannot reach the server; check AWS_ENDPOINT_URL ({said})") from e
        except (exceptions.HTTPClientError, HTTPError) as e:
            raise Unreachable(
                f"store {self.url}: the connection broke or stalled {TRIES} times; check the network and the "
                f"server, {again} ({' '.join(str(e).split())})"
            ) from e
        except exceptions.BotoCoreError as e:  # of a profile, a role, a login, or a name that S3 does not take
            raise UserError(
                f"store {self.url}: {' '.join(str(e).split())}; correct it, or log in again, {again}"
            ) from e

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None and stop <= start:
            return b""
        (data,) = self.read_parts(path, [(start, END if stop is None else stop)])
        return data

    def read_parts(self, path: str, parts: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        given = 0
        if not parts:
            return
        with self._explained(path):
            for last in tries():
                left = parts[given:]
                try:
                    # Cut as they come: to gather all and copy each would hold the interpreter's lock for long.
                    for part in cut(self._chunks(path, left[0][0], left[-1][1]), left[0][0], left):
                        yield part
                        given += 1
                    return
                except HTTPError:  # the body broke off; boto3 retries only until it begins
                    if last:
                        raise

    def _chunks(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        """Yields the body of one request for bytes [start, stop).

        Raises FileNotFoundError, and HTTPError where the body ends early, stands still or comes too slowly.
        """
        asked = {"Range": f"bytes={start}-{'' if stop == END else stop - 1}"} if start or stop != END else {}
        try:
            answer = self._client.get_object(**self._where(path), **asked)
        except ClientError as e:
            if _status(e) == 416:  # the range begins behind the end; a folder's store returns no bytes there, too
                return
            if _status(e) == 404 and e.response["Error"]["Code"] not in HINTS:
                raise FileNotFoundError(f"{self.url}/{path}") from None
            raise
        began, count = time.monotonic(), 0
        # read1 returns what has arrived instead of waiting for a whole chunk, so that the rate can be checked.
        with answer["Body"] as response:
            while chunk := response.read1(1 << 20):
                count += len(chunk)
                if time.monotonic() - began > TIMEOUT_S + count / LEAST_RATE:
                    raise HTTPError("the body comes too slowly")
                yield chunk
        if count != answer["ContentLength"]:
            raise HTTPError("the body ended early")

    def list(self, prefix: str) -> Iterator[Entry]:
        where = self._where(prefix)
        skip = len(where["Key"]) - len(prefix)
        with self._explained(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=where["Key"])
            for page in pages:
                for item in page.get("Contents", ()):
                    yield Entry(item["Key"][skip:], item["Size"], item["ETag"], item["LastModified"].timestamp())

    def stat(self, path: str) -> Entry | None:
        with self._explained(path):
            try:
                found = self._client.head_object(**self._where(path))
            except ClientError as e:
                if _status(e) == 404:
                    return None
                if _status(e) in (400, 403):
                    # The answer to a HEAD has no body that says why; that of a GET does.
                    try:
                        self.read(path, 0, 1)
                    except FileNotFoundError:
                        return None
                raise
        return Entry(path, found["ContentLength"], found["ETag"], found["LastModified"].timestamp())

    def create(self, path: str, data: bytes | Path, move: bool = False) -> bool:
        return self._put(path, data, IfNoneMatch="*") if isinstance(data, bytes) else self._upload(path, data)

    def swap(self, path: str, old: str | None, new: bytes) -> bool:
        return self._put(path, new, **({"IfNoneMatch": "*"} if old is None else {"IfMatch": old}))

    def delete(self, paths: Iterable[str]) -> None:
        remaining = iter(paths)
        while batch := list(islice(remaining, BATCH)):
            with self._explained(batch[0]):
                self._delete(batch)

    def _delete(self, batch: Sequence[str]) -> None:
        """Sends one request, whose answer may be a success and still name objects that were not deleted."""
        keys = [self._where(path)["Key"] for path in batch]
        for last in tries():
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
            # Any request would do: the time is in the headers of the answer.
            answer = self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._where("")["Key"], MaxKeys=1)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def clear_abandoned(self, before: float) -> int:
        count = 0
        with self._explained(""):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self._where("")["Key"]
            )
            for page in pages:
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"].timestamp() <= before:
                        count += self._abort(upload["Key"], upload["UploadId"])
        return count

    def _abort(self, key: str, upload: str) -> bool:
        """Aborts an upload. Returns whether it was still there: a writer, or a rule of the bucket, may end it."""
        try:
            self._client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)
        except ClientError as e:
            if e.response["Error"]["Code"] != "NoSuchUpload":
                raise
            return False
        return True

    def _put(self, path: str, data: bytes, **condition: str) -> bool:
        """Writes an object with one conditional request. Returns whether the condition held."""
        tried = False
        with self._explained(path):
            for last in tries():
                try:
                    self._client.put_object(**self._where(path), Body=data, **condition)
                    return True
                except ClientError as e:
                    if _status(e) not in (404, 409, 412) or e.response["Error"]["Code"] in HINTS:
                        raise
                    if _status(e) == 404:  # If-Match on an object that is gone
                        return False
                    tried = tried or e.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                    if _status(e) == 412:  # the condition failed, perhaps by our own try whose answer was lost
                        return tried and has_bytes(self.read, path, data)
                    if last:  # 409: somebody, perhaps our own first try, is writing, and nobody has won yet
                        raise
                    tried = True
        raise AssertionError("the last try returns or raises")

    def _upload(self, path: str, file: Path) -> bool:
        """Uploads a file, in parts if it is large, unless the object exists: then it has the same bytes."""
        where = self._where(path)
        config = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)
        for last in tries():
            if self.stat(path) is not None:
                return False
            with self._explained(path):
                try:
                    self._client.upload_file(str(file), where["Bucket"], where["Key"], Config=config)
                    return True
                except S3UploadFailedError as e:
                    why = e.__context__
                    gone = isinstance(why, ClientError) and why.response["Error"]["Code"] == "NoSuchUpload"
                    # NoSuchUpload: a try of ours completed it, or another process aborted it as abandoned.
                    if why is None or last or not gone:
                        raise why or e from None
        raise AssertionError("the last try returns or raises")


def _hint(code: str, operation: str, path: str) -> str:
    hint = HINTS.get(code, "see the log of the server, then run the same command again")
    return hint.format(permission=PERMISSIONS.get(operation, "s3:PutObject"), path=path or "the bucket")


def _status(error: Any) -> int:
    """Returns the HTTP status. It is surer than the code, which is in the body that may be cut off."""
    return int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0))
