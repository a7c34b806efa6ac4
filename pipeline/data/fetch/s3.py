"""Reads images that lie on S3, s3://bucket/key, with the standard credentials of the worker.

Endpoint, region and credentials come from the AWS variables and profiles, as those of a store do. A key is taken as it
stands, without escapes. Reasons for a refusal are those of pipeline.ledger.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from botocore import exceptions
from botocore.config import Config
from urllib3 import exceptions as transfer

from pipeline.data.fetch.opener import Refused
from pipeline.errors import UserError
from pipeline.store.s3 import PASSING, s3_client

CHUNK = 1 << 16
PAGES, SPREAD = 2, 100  # of a listing: a page has 1,000 objects
# Errors of credentials fail the whole stage, not one row.
CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "RequestTimeTooSkewed"}
NOT_LOGGED_IN = (
    exceptions.NoCredentialsError,
    exceptions.PartialCredentialsError,
    exceptions.ProfileNotFound,
    exceptions.NoAuthTokenError,
    exceptions.TokenRetrievalError,
    exceptions.SSOError,
    exceptions.LoginError,
)


class S3Reader:
    """Reads objects of at most ``max_bytes``. ``threads`` may call it at once."""

    def __init__(self, threads: int, timeout_s: float, max_bytes: int):
        self._threads, self._timeout_s, self._max_bytes = threads, timeout_s, max_bytes
        self._lock = threading.Lock()
        self._made: Any = None

    def read(self, reference: str, deadline: float) -> bytes:
        """Returns the bytes behind s3://bucket/key. ``deadline`` is a time.monotonic().

        Raises:
            Refused: with the reason.
            UserError: where credentials or region are wrong or missing.
        """
        bucket, _, key = reference.removeprefix("s3://").partition("/")
        if not bucket or not key:
            raise Refused("unsupported_reference")
        with _failures_as_reasons():
            answer = self._client().get_object(Bucket=bucket, Key=key)
            # urllib3's response, which gives what is there instead of waiting for a whole chunk
            with answer["Body"] as response:
                if answer["ContentLength"] > self._max_bytes:
                    raise Refused("too_large")
                data = bytearray()
                while chunk := response.read1(CHUNK):
                    data += chunk
                    if time.monotonic() > deadline:
                        raise Refused("timeout")
                    if len(data) > self._max_bytes:
                        raise Refused("too_large")
                if len(data) < answer["ContentLength"]:  # where the connection ends early, read1 ends, too
                    raise Refused("truncated")
                return bytes(data)

    def tags(self, bucket: str, keys: Iterable[str]) -> dict[str, str]:
        """Returns the ETags of objects by key, as far as a listing from the first to the last of them has them.

        It ends after PAGES pages, and one more for every SPREAD keys: those of a list lie together, or in few places.

        Raises:
            Refused: with the reason.
            UserError: where credentials or region are wrong or missing.
        """
        wanted = sorted(keys)
        found: dict[str, str] = {}
        pages = PAGES + len(wanted) // SPREAD
        where = {"Bucket": bucket, "StartAfter": wanted[0][:-1]}
        with _failures_as_reasons():
            while pages and len(found) < len(wanted):
                answer = self._client().list_objects_v2(**where)
                listed = {each["Key"]: each["ETag"] for each in answer.get("Contents", ())}
                found |= {key: listed[key] for key in listed.keys() & set(wanted)}
                if not answer["IsTruncated"] or max(listed, default="") >= wanted[-1]:
                    break
                where["ContinuationToken"] = answer["NextContinuationToken"]
                pages -= 1
        return found

    def _client(self) -> Any:
        """Returns one client for all threads: it may be shared, but it takes a moment to make."""
        with self._lock:
            if self._made is None:
                config = Config(
                    retries={"total_max_attempts": 1},  # the caller tries again
                    connect_timeout=self._timeout_s,
                    read_timeout=self._timeout_s,
                    max_pool_connections=self._threads,
                )
                self._made = s3_client(boto3.session.Session(), config, "source: images on S3")
            return self._made


@contextmanager
def _failures_as_reasons() -> Iterator[None]:
    try:
        yield
    except exceptions.ClientError as e:
        code, status = e.response["Error"]["Code"], e.response["ResponseMetadata"].get("HTTPStatusCode", 0)
        # By a service that gives credentials, and not because it is busy.
        busy = status >= 500 or status == 429 or code in PASSING
        refused = e.operation_name not in ("GetObject", "ListObjectsV2", "CreateSession") and not busy
        if code in CREDENTIALS or refused:
            raise UserError(
                f"source: images on S3: {e.operation_name} was answered {code}: check the credentials, role or profile "
                "of the workers, and their clocks"
            ) from e
        if status == 404:
            raise Refused("missing_file") from None
        if busy and status < 500:
            raise Refused("timeout" if code == "RequestTimeout" else "rate_limited") from None
        raise Refused({4: "http_4xx", 5: "http_5xx"}.get(status // 100, "unreachable")) from None
    except NOT_LOGGED_IN as e:
        raise UserError(
            f"source: images on S3: {' '.join(str(e).split())}; every worker needs AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a profile"
        ) from e
    except exceptions.CredentialRetrievalError as e:
        if e.kwargs.get("provider") != "custom-process":  # a service of the machine may answer at the next try
            raise Refused("unreachable") from None
        raise UserError(f"source: images on S3: {' '.join(str(e).split())}; fix credential_process") from e
    except exceptions.NoRegionError as e:
        raise UserError("source: images on S3: no AWS region; set AWS_REGION on every worker") from e
    except exceptions.ParamValidationError:  # no name that a bucket may have
        raise Refused("unsupported_reference") from None
    except (exceptions.ConnectTimeoutError, exceptions.ReadTimeoutError, transfer.TimeoutError):
        raise Refused("timeout") from None
    except (exceptions.BotoCoreError, transfer.HTTPError):
        raise Refused("unreachable") from None
