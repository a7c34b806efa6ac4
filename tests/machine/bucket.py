"""A bucket in memory behind S3Store: answers are lost, fail after the write, and lists come in short pages.

It answers as a client of botocore that has sent each request again, as tests/pipeline/store/test_s3.py proves of the
real one.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from botocore.exceptions import ClientError

from pipeline.store.s3 import S3Store

PAGE = 7  # objects of one answer to a list, so that others write between two pages
BEGAN = datetime(2020, 1, 1, tzinfo=UTC)  # the machine knows better


class Bucket:
    """Objects by their keys. ``faulty``: the share of requests of each kind and key that are sent twice."""

    meta = SimpleNamespace(service_model=SimpleNamespace(operation_names=("GetObject", "HeadObject", "PutObject")))

    def __init__(self, faulty: float, now: Callable[[], float]):
        self.objects: dict[str, bytes] = {}
        self._faulty, self._now, self._asked = faulty, now, Counter[str]()

    def store(self) -> S3Store:
        """Returns a store in this bucket."""
        store = S3Store("s3://bucket/machine", "bucket", "machine")
        store.__dict__["_client"] = self
        return store

    def put_object(self, Key: str, Body: bytes, **condition: str) -> None:
        if self._is_lost(f"put {Key}"):  # the first try has written, or met what stands; its answer is lost
            self._put(Key, Body, condition)
            if status := self._put(Key, Body, condition):
                raise _error("PutObject", status, retries=1)
        elif status := self._put(Key, Body, condition):
            raise _error("PutObject", status)

    def _put(self, key: str, body: bytes, condition: dict[str, str]) -> int:
        """Writes an object if the condition holds, and returns the status of the error otherwise."""
        standing, match = self.objects.get(key), condition.get("IfMatch")
        if match is not None and standing is None:
            return 404
        if standing is not None and ("IfNoneMatch" in condition or (match is not None and match != _etag(standing))):
            return 412
        self.objects[key] = body
        return 0

    def upload_file(self, file: str, bucket: str, key: str, **_: Any) -> None:
        self.objects[key] = Path(file).read_bytes()

    def get_object(self, Key: str, Range: str = "", **_: str) -> dict[str, Any]:
        data = self._find("GetObject", Key)
        if Range:
            first, _, last = Range.removeprefix("bytes=").partition("-")
            if int(first) >= len(data):
                raise _error("GetObject", 416)
            data = data[int(first) : int(last) + 1 if last else None]
        return {"Body": io.BytesIO(data), "ContentLength": len(data)}

    def head_object(self, Key: str, **_: str) -> dict[str, Any]:
        data = self._find("HeadObject", Key)
        return {"ContentLength": len(data), "ETag": _etag(data), "LastModified": BEGAN}

    def _find(self, operation: str, key: str) -> bytes:
        if key not in self.objects:
            raise _error(operation, 404)
        return self.objects[key]

    def delete_objects(self, Delete: dict[str, Any], **_: str) -> dict[str, Any]:
        for each in Delete["Objects"]:
            self.objects.pop(each["Key"], None)
        return {}

    def list_objects_v2(self, **_: Any) -> dict[str, Any]:
        return {"ResponseMetadata": {"HTTPHeaders": {"date": formatdate(self._now(), usegmt=True)}}}

    def get_paginator(self, operation: str) -> Any:
        return SimpleNamespace(paginate=self._pages if operation == "list_objects_v2" else lambda **_: iter(()))

    def _pages(self, Prefix: str, **_: str) -> Iterator[dict[str, Any]]:
        after = ""
        while found := sorted(key for key in self.objects if key.startswith(Prefix) and key > after)[:PAGE]:
            sizes = [(key, self.objects[key]) for key in found]
            yield {
                "Contents": [
                    {"Key": key, "Size": len(data), "ETag": _etag(data), "LastModified": BEGAN} for key, data in sizes
                ]
            }
            after = found[-1]

    def _is_lost(self, what: str) -> bool:
        """Returns whether the answer to this request is lost, of equal ones by their number."""
        self._asked[what] += 1
        return hashlib.sha256(f"{what} {self._asked[what]}".encode()).digest()[0] / 256 < self._faulty


def _error(operation: str, status: int, retries: int = 0) -> ClientError:
    about: Any = {"HTTPStatusCode": status, "RetryAttempts": retries}
    return ClientError({"Error": {"Code": str(status)}, "ResponseMetadata": about}, operation)


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
