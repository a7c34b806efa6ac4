"""A bucket in memory behind a real botocore client: answers are lost, fail after the write, and lists are short."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import boto3
from botocore.awsrequest import AWSResponse, HeadersDict
from botocore.config import Config
from botocore.exceptions import ConnectionClosedError
from urllib3.response import HTTPResponse

from pipeline.store.s3 import TRIES, S3Store

PAGE = 7  # objects of one answer to a list, so that others write between two pages
BEGAN = "<LastModified>2020-01-01T00:00:00Z</LastModified>"  # the machine knows better
NO_BODY = ("HEAD", "DELETE")


class Bucket:
    """Objects by their keys. ``faulty``: the share of requests of each kind and path that go wrong, by ``seed``."""

    def __init__(self, seed: int, faulty: float, now: Callable[[], float]):
        self.objects: dict[str, bytes] = {}
        self.faults: Counter[str] = Counter()
        self._seed, self._faulty, self._now = seed, faulty, now
        self._asked: Counter[str] = Counter()

    def store(self) -> S3Store:
        """Returns a store in this bucket."""
        store = S3Store("s3://bucket/machine", "bucket", "machine")
        client = _client()
        client.meta.events.unregister("before-send.s3", unique_id="bucket")
        client.meta.events.register("before-send.s3", self._answer, unique_id="bucket")
        store.__dict__["_client"] = client
        return store

    def _answer(self, request: Any, **_: Any) -> AWSResponse:
        url = urlsplit(request.url)
        key, query = unquote(url.path).removeprefix("/bucket").lstrip("/"), parse_qs(url.query, keep_blank_values=True)
        fault = self._fault(f"{request.method} {key} {url.query}")
        if fault == "refused":
            raise ConnectionClosedError(endpoint_url=request.url)
        if fault == "busy":
            return self._respond(request, 503, _error("SlowDown"))
        answer = self._serve(request, key, query)
        if fault == "lost":
            raise ConnectionClosedError(endpoint_url=request.url)
        return self._respond(request, 500, _error("InternalError")) if fault == "late" else answer

    def _fault(self, what: str) -> str | None:
        """Returns what goes wrong with this request, of equal ones by their number; never thrice in a row."""
        self._asked[what] += 1
        drawn = hashlib.sha256(f"{self._seed} {what} {self._asked[what]}".encode()).digest()
        if drawn[0] / 256 >= self._faulty or self._asked[what] % 3 == 0:
            return None
        fault = ("refused", "busy", "lost", "late")[drawn[1] % 4]
        self.faults[fault] += 1
        return fault

    def _serve(self, request: Any, key: str, query: dict[str, list[str]]) -> AWSResponse:
        if request.method == "PUT":
            return self._put(request, key)
        if request.method == "POST" and "delete" in query:
            for element in ElementTree.fromstring(_body(request)).iter():
                if element.tag.rpartition("}")[2] == "Key":
                    self.objects.pop(element.text or "", None)
            return self._respond(request, 200, b"<DeleteResult/>")
        if "list-type" in query:
            return self._list(request, query)
        if "uploads" in query:
            return self._respond(request, 200, b"<ListMultipartUploadsResult/>")
        return self._get(request, key)

    def _put(self, request: Any, key: str) -> AWSResponse:
        standing, match = self.objects.get(key), _header(request, "If-Match")
        if _header(request, "If-None-Match") == "*" and standing is not None:
            return self._respond(request, 412, _error("PreconditionFailed"))
        if match is not None and standing is None:
            return self._respond(request, 404, _error("NoSuchKey"))
        if match is not None and standing is not None and match != _etag(standing):
            return self._respond(request, 412, _error("PreconditionFailed"))
        self.objects[key] = _body(request)
        return self._respond(request, 200, b"", {"ETag": _etag(self.objects[key])})

    def _get(self, request: Any, key: str) -> AWSResponse:
        data = self.objects.get(key)
        if data is None:
            return self._respond(request, 404, _error("NoSuchKey"))
        head, status = {"ETag": _etag(data), "Last-Modified": formatdate(0, usegmt=True)}, 200
        if asked := _header(request, "Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            if int(first) >= len(data):
                return self._respond(request, 416, _error("InvalidRange"))
            data, status = data[int(first) : int(last) + 1 if last else None], 206
        return self._respond(request, status, data, head)

    def _list(self, request: Any, query: dict[str, list[str]]) -> AWSResponse:
        prefix, after = query.get("prefix", [""])[0], query.get("continuation-token", [""])[0]
        found = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
        page = found[: min(PAGE, int(query.get("max-keys", ["1000"])[0]))]
        parts = [f"<IsTruncated>{str(len(page) < len(found)).lower()}</IsTruncated>"]
        if len(page) < len(found):
            parts.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
        for key in page:
            data = self.objects[key]
            about = f"<Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>{escape(_etag(data))}</ETag>{BEGAN}"
            parts.append(f"<Contents>{about}</Contents>")
        body = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{"".join(parts)}</ListBucketResult>'
        return self._respond(request, 200, body.encode())

    def _respond(self, request: Any, status: int, data: bytes, more: dict[str, str] | None = None) -> AWSResponse:
        headers = {"Content-Length": str(len(data)), "Date": formatdate(self._now(), usegmt=True), **(more or {})}
        body = b"" if request.method in NO_BODY else data
        raw = HTTPResponse(io.BytesIO(body), headers, status, preload_content=False, request_method=request.method)
        return AWSResponse(request.url, status, HeadersDict(headers), raw)


_made: list[Any] = []


def _client() -> Any:
    """Returns the one client of this process, which retries at once; to make one takes longer than most programs."""
    if not _made:
        retries = {"mode": "standard", "total_max_attempts": TRIES}
        session = boto3.session.Session("key", "secret", region_name="us-east-1")
        style = {"addressing_style": "path"}
        config = Config(retries=retries, s3=style)
        _made.append(session.client("s3", config=config, endpoint_url="http://bucket.test"))
    return _made[0]


def _header(request: Any, name: str) -> str | None:
    value = request.headers.get(name)
    return value.decode() if isinstance(value, bytes) else value


def _body(request: Any) -> bytes:
    data = request.body
    if data is None or isinstance(data, bytes | bytearray):
        data = bytes(data or b"")
    else:
        data.seek(0)
        data = data.read()
    return _without_chunks(data) if "aws-chunked" in (_header(request, "Content-Encoding") or "") else data


def _without_chunks(data: bytes) -> bytes:
    """Returns the content of a body in chunks with a checksum behind them, as botocore sends files."""
    content = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        count = int(size.partition(b";")[0], 16)
        if not count:
            break
        content, data = content + data[:count], data[count + 2 :]
    return content


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
