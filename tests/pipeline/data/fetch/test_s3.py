"""Pictures on S3: a real server for what it keeps, and one of our own for what S3 says when it refuses."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from pipeline.data.fetch.fetcher import Fetched, Fetcher
from pipeline.data.fetch.s3 import S3Reader
from pipeline.errors import UserError
from pipeline.ledger import REASONS
from pipeline.local import PathPolicy
from pipeline.settings import PairsSettings
from pipeline.store import open_store
from tests.aws import NEEDS, lacking
from tests.pipeline.data.bench import Bench, Page, fetch_all, picture, serving, write_list
from tests.seaweed import BUCKET, Server

MAX_BYTES = 100_000


def fetch(*references: str, **changes: Any) -> list[Fetched]:
    settings = PairsSettings(**{"threads": 4, "timeout_s": 10.0, "retries": 0, **changes})
    reach = PathPolicy(buckets=(BUCKET, "no-such-bucket-here", "not a bucket", "b"))
    return fetch_all(Fetcher(settings, MAX_BYTES, reach=reach), references)


@pytest.fixture
def pictures(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """s3:// and the prefix of a few objects; the environment of a worker that may read them."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    prefix = f"{tmp_path.name}-{os.getpid()}"
    objects = {"a.png": picture(0), "b c?#é%20.png": picture(1), "empty.png": b"", "big.png": bytes(MAX_BYTES + 1)}
    client = boto3.session.Session().client("s3")
    for name, data in (objects | {"largest": bytes(MAX_BYTES)}).items():
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=data)
    return f"s3://{BUCKET}/{prefix}"


def test_objects_are_read_within_the_budget(pictures: str) -> None:
    names = ["a.png", "b c?#é%20.png", "largest", "empty.png", "big.png", "none.png"]
    found = fetch(*(f"{pictures}/{name}" for name in names), "s3://no-such-bucket-here/a.png", f" {pictures}/a.png ")
    assert [each.data for each in found[:3]] == [picture(0), picture(1), bytes(MAX_BYTES)]
    assert [each.reason for each in found[3:7]] == ["zero_bytes", "too_large", "missing_file", "missing_file"]
    assert found[7].data == picture(0)


def test_pairs_from_s3_end_as_from_anywhere(pictures: str, tmp_path: Path) -> None:
    rows = [(f"{pictures}/{name}", name, "train") for name in ("a.png", "b c?#é%20.png", "empty.png", "none.png")]
    rows += [(f"{pictures}/a.png", "again", "train"), (f"file://{tmp_path}/file.png", "a file", "train")]
    (tmp_path / "file.png").write_bytes(picture(2))
    source, prefix = write_list(tmp_path / "list.csv", rows), {"roots": [pictures]}
    ledger = Bench(tmp_path / "store", [source], source=prefix).make("source", "captions", "pairs").ledger
    assert ledger.kept == 3
    assert ledger.rejected == {"zero_bytes": 1, "missing_file": 1, "duplicate_url": 1}


def test_a_bucket_that_the_configuration_does_not_name_is_not_asked(pictures: str, tmp_path: Path) -> None:
    """Else a list would choose among all buckets that the worker's role reads, and tell its own bucket of the role."""
    source = write_list(tmp_path / "list.csv", [(f"{pictures}/a.png", "a picture", "train")])
    for roots in ([], ["s3://another"], [f"{pictures}/a"], [f"{pictures}2"]):
        ledger = Bench(tmp_path / "store", [source], source={"roots": roots}).make("source").ledger
        assert ledger.rejected == {"forbidden_reference": 1}
    ledger = Bench(tmp_path / "store", [source], source={"roots": [f"s3://{BUCKET}/"]}).make("source").ledger
    assert ledger.kept == 1


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (f"s3://{BUCKET}/", "unsupported_reference"),
        ("s3://not a bucket/a.png", "unsupported_reference"),
        ("s3://", "forbidden_reference"),
        (f"s3://{BUCKET}", "forbidden_reference"),
        ("s3:///a.png", "forbidden_reference"),
        (f"s3://***@{BUCKET}/a.png", "forbidden_reference"),
        ("s3://arn:aws:s3:us-east-1:123456789012:accesspoint:mine/a.png", "forbidden_reference"),
    ],
)
def test_a_reference_without_a_bucket_and_a_key_is_none(pictures: str, reference: str, reason: str) -> None:
    assert fetch(reference)[0].reason == reason


def test_refused_credentials_are_no_rows_fault(pictures: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="SignatureDoesNotMatch: check the credentials"):
        fetch(f"{pictures}/a.png")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(UserError, match="every worker needs AWS_ACCESS_KEY_ID"):
        fetch(f"{pictures}/a.png")


def _error(status: int, code: str) -> Page:
    return Page(f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode(), status)


PAGES = {
    "/b/a.png": Page(b"a picture"),
    "/b/denied.png": _error(403, "AccessDenied"),
    "/b/archived.png": _error(403, "InvalidObjectState"),
    "/b/gone.png": _error(404, "NoSuchKey"),
    "/b/busy.png": _error(503, "SlowDown"),
    "/b/broken.png": _error(500, "InternalError"),
    "/b/cut.png": Page(b"half", headers={"Content-Length": "8"}),
    "/b/drip.png": Page(bytes(60), drip_s=0.1),
    "/b/endless.png": Page(bytes(MAX_BYTES), drip_s=0.1),
    "/b/expired.png": _error(400, "ExpiredToken"),
    "/b/late.png": _error(403, "RequestTimeTooSkewed"),
    "/b/many.png": _error(429, "TooManyRequests"),
    "/b/throttled.png": _error(400, "Throttling"),
}


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with serving(PAGES) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "tester")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        yield


def test_refusals_have_their_reasons(refusing: None) -> None:
    reasons = {
        "a": None, "denied": "http_4xx", "archived": "http_4xx", "gone": "missing_file", "absent": "missing_file",
        "busy": "http_5xx", "broken": "http_5xx", "cut": "truncated",
        "many": "rate_limited", "throttled": "rate_limited",
    }  # fmt: skip
    found = fetch(*(f"s3://b/{name}.png" for name in reasons))
    assert {name: each.reason for name, each in zip(reasons, found, strict=True)} == reasons
    assert set(reasons.values()) - {None} <= REASONS.keys()
    for name, code in (("expired", "ExpiredToken"), ("late", "RequestTimeTooSkewed")):
        with pytest.raises(UserError, match=code):
            fetch(f"s3://b/{name}.png")


@pytest.mark.parametrize("what", NEEDS)
def test_credentials_that_cannot_be_had_end_the_run_and_no_row(what: str, refusing: None, tmp_path: Path) -> None:
    with lacking(what, tmp_path), pytest.raises(UserError, match=NEEDS[what]) as told:
        fetch("s3://b/a.png")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("endpoint", ["localhost:8333", "//"])
def test_an_endpoint_that_is_no_url_is_said_and_rejects_nothing(
    endpoint: str, refusing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match=r"AWS_ENDPOINT_URL has to begin with http:// or https://"):
        fetch("s3://b/a.png")
    with pytest.raises(UserError, match=r"store s3://b/c: .*AWS_ENDPOINT_URL has to begin with"):
        list(open_store("s3://b/c").list(""))


def test_the_deadline_holds_and_no_server_is_unreachable(refusing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first 64 KiB of the second one take two hours.
    found = fetch("s3://b/drip.png", "s3://b/endless.png", timeout_s=0.5, retries=3)
    assert [each.reason for each in found] == ["timeout"] * 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert fetch("s3://b/a.png")[0].reason == "unreachable"


def test_only_passing_troubles_are_tried_again(refusing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hits: Counter[str] = Counter()
    original = S3Reader.read

    def counting(self: S3Reader, reference: str, deadline: float) -> bytes:
        hits[reference] += 1
        return original(self, reference, deadline)

    monkeypatch.setattr(S3Reader, "read", counting)
    monkeypatch.setattr("pipeline.data.fetch.fetcher._BACKOFF_S", 0.01)
    again, once = ("busy", "cut", "throttled"), ("denied", "gone")
    fetch(*(f"s3://b/{name}.png" for name in again + once), retries=1)
    assert hits == {f"s3://b/{name}.png": 1 + (name in again) for name in again + once}
