"""The store on a real S3 server, many objects and large ones, and behind a proxy that fails as networks do."""

import hashlib
import io
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError

from pipeline.errors import UserError
from pipeline.store import Store, base, open_store
from pipeline.store import s3 as store_s3
from pipeline.store.s3 import S3Store
from tests.fault_proxy import FAULTS, FaultProxy, always, failing, never, on_first_sight
from tests.seaweed import Server

PART = 5 << 20  # the least that S3 takes
COUNT = itertools.count()


@pytest.fixture
def proxy(s3: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Before the server; nobody waits between two tries."""
    monkeypatch.setattr(store_s3, "PART_BYTES", PART)
    monkeypatch.setattr(base, "random", SimpleNamespace(random=lambda: 0.0))
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda _: None))
    with failing(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def store(proxy: FaultProxy) -> S3Store:
    return _new()


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file of three parts."""
    file = tmp_path / "big"
    file.write_bytes(random.Random(0).randbytes(2 * PART + 1000))
    return file


def _new() -> S3Store:
    store = open_store(f"s3://unclip/store-{os.getpid()}-{next(COUNT)}")
    assert isinstance(store, S3Store)
    return store


# --- under every fault ------------------------------------------------------------------------------------------------


PARTS = [(9, 20), (100, 12_000), (12_000, 30_000), (30_500, 39_999)]


def _everything(store: Store, big: Path) -> list[object]:
    """What every method answers, in a sequence of calls."""

    def version(path: str) -> str:
        found = store.stat(path)
        assert found is not None
        return found.version

    data = random.Random(1).randbytes(40_000)
    answers: list[object] = [
        store.create("blobs/a", data),
        store.create("blobs/a", b"other"),
        store.read("blobs/a") == data,
        store.read("blobs/a", 7, 30_000) == data[7:30_000],
        store.read("blobs/a", 39_000) == data[39_000:],
        store.read("blobs/a", 39_990, 50_000) == data[39_990:],
        store.read("blobs/a", 40_000, 50_000),
        [*store.read_parts("blobs/a", PARTS)] == [data[start:stop] for start, stop in PARTS],
        store.create("blobs/empty", b""),
        store.read("blobs/empty"),
        [*store.read_parts("blobs/empty", [])],
        store.create("blobs/big", big),
        store.create("blobs/big", big),
        hashlib.sha256(store.read("blobs/big")).hexdigest(),
        store.swap("locks/p", None, b"1"),
        store.swap("locks/p", None, b"2"),
        store.stat("locks/none"),
        store.stat("blobs/a") == next(store.list("blobs/a")),
    ]
    first = version("locks/p")
    answers += [store.swap("locks/p", first, b"3"), store.swap("locks/p", first, b"4"), store.read("locks/p")]
    answers += [[(entry.path, entry.size) for entry in store.list(prefix)] for prefix in ("blobs/", "locks/", "none/")]
    store.delete(["blobs/a", "blobs/none", "locks/p"])
    answers.append([entry.path for entry in store.list("")])
    try:
        store.read("blobs/a")
    except FileNotFoundError:
        answers.append("not found")
    return answers


@pytest.mark.parametrize("fault", FAULTS)
def test_every_method_answers_as_on_a_folder(
    fault: str, store: S3Store, proxy: FaultProxy, big: Path, tmp_path: Path
) -> None:
    proxy.choose = on_first_sight(fault)
    assert _everything(store, big) == _everything(open_store(str(tmp_path / "store")), big)
    assert proxy.faults() == {fault}
    proxy.choose = never
    # Where the name of an upload was lost nobody can abort it: until it is old.
    assert len(_uploads(store)) == (fault in ("cut", "lose"))
    store.clear_abandoned(time.time() + 5)
    assert _uploads(store) == []


# --- answers that are lost --------------------------------------------------------------------------------------------


def _lose(*parts: str) -> Callable[[int, str, str], str | None]:
    """Lose every answer to the first request with these words in its method and path, and only that one."""
    met: list[Any] = []

    def choose(number: int, method: str, path: str) -> str | None:
        if met or not all(part in f"{method} {path}" for part in parts):
            return None
        met.append(number)
        return "lose"

    return choose


def test_a_put_whose_answer_was_lost_is_ours(store: S3Store, proxy: FaultProxy) -> None:
    proxy.choose = _lose("PUT")
    assert store.create("a", b"1")
    proxy.choose = _lose("PUT")
    assert store.swap("a", next(store.list("a")).version, b"2")
    proxy.choose = _lose("PUT")
    assert not store.create("a", b"3")
    assert store.read("a") == b"2"


def test_a_completion_whose_answer_was_lost_is_found(store: S3Store, proxy: FaultProxy, big: Path) -> None:
    proxy.choose = _lose("POST", "uploadId=")
    store.create("blobs/big", big)
    assert proxy.faults() == {"lose"}
    assert store.read("blobs/big") == big.read_bytes()
    assert not store.create("blobs/big", big)


def test_an_object_that_came_meanwhile_is_not_ours(store: S3Store, proxy: FaultProxy) -> None:
    """Another writer comes first, and the answer that would say so is lost."""
    lose = _lose("PUT")

    def choose(number: int, method: str, path: str) -> str | None:
        if method == "PUT" and not proxy.requests:
            assert _direct(store, proxy).create("a", b"theirs")
        return lose(number, method, path)

    proxy.choose = choose
    assert not store.create("a", b"ours")
    assert proxy.faults() == {"lose"}
    assert store.read("a") == b"theirs"


def test_an_upload_that_was_aborted_as_abandoned_is_begun_again(store: S3Store, proxy: FaultProxy, big: Path) -> None:
    aborted: list[Any] = []

    def choose(number: int, method: str, path: str) -> str | None:
        if method == "POST" and "uploadId=" in path and not aborted:
            aborted.append(_direct(store, proxy).clear_abandoned(time.time() + 5))
        return None

    proxy.choose = choose
    assert store.create("blobs/big", big)
    assert aborted == [1]
    assert store.read("blobs/big") == big.read_bytes()


# --- when it does not pass --------------------------------------------------------------------------------------------


BROKE = "the connection broke or stalled 6 times; check the network and the server, then run the same command"
BUSY = (
    r"was answered \w+ 6 times; the server is overloaded or failing: wait, or use fewer workers, then run the same "
    "command"
)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("refuse", BUSY),
        ("reset", BROKE),
        ("lose", BROKE),
        ("cut", f"{BROKE}|{BUSY}"),  # boto3 takes half a listing for an error of the server
        ("delay", BROKE),
        ("drip", BROKE),
    ],
)
def test_what_does_not_pass_is_one_clear_line(
    fault: str, words: str, store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault in ("delay", "drip"):
        monkeypatch.setattr(store_s3, "TIMEOUT_S", 0.15)
    store.create("a", b"0123456789" * 100)
    proxy.choose, proxy.pause_s, proxy.requests = always(fault), 0.3, []
    calls: list[Callable[[], Any]] = [
        lambda: store.read("a", 2, 900),
        lambda: list(store.read_parts("a", [(2, 600), (610, 900)])),
    ]
    if fault != "drip":  # it is bodies that drip, and these answers are short
        calls += [lambda: store.create("b", b"1"), lambda: list(store.list("")), lambda: store.delete(["a"])]
    for call in calls:
        proxy.requests = []
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
        deadline = time.monotonic() + 30
        while len(proxy.requests) < base.TRIES and time.monotonic() < deadline:
            time.sleep(0.01)  # on a busy machine the proxy reads a request after its client has given up
        # A creation that was cut off looks whether what stands is its own.
        assert base.TRIES <= len(proxy.requests) <= base.TRIES + 2


def test_a_connection_is_used_again(store: S3Store, proxy: FaultProxy) -> None:
    store.create("a", bytes(3 << 20))
    for _ in range(3):
        store.read("a")
        store.read("a", 5, 9)
        list(store.read_parts("a", [(5, 9), (100, 2 << 20)]))
    assert len(proxy.connections) == 1


def test_a_body_that_only_drips_is_given_up(store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece comes in time, and all of it would never end."""
    monkeypatch.setattr(store_s3, "LEAST_RATE", 1 << 30)
    store.create("a", b"0123456789")
    store.read("a")
    monkeypatch.setattr(store_s3, "TIMEOUT_S", 0.1)
    proxy.choose, proxy.pause_s = always("drip"), 0.06
    with pytest.raises(UserError, match="the body comes too slowly"):
        store.read("a")
    with pytest.raises(UserError, match="the body comes too slowly"):
        list(store.read_parts("a", [(0, 10)]))


def test_an_upload_that_fails_leaves_nothing(store: S3Store, proxy: FaultProxy, big: Path) -> None:
    proxy.choose = lambda number, method, path: "refuse" if "partNumber=2" in path else None
    with pytest.raises(UserError, match="UploadPart was answered SlowDown"):
        store.create("blobs/big", big)
    proxy.choose = never
    assert _uploads(store) == []
    assert list(store.list("")) == []


# --- large objects and many -------------------------------------------------------------------------------------------


def _uploads(store: S3Store) -> list[object]:
    """Uploads that are neither completed nor aborted."""
    answer = store._client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)
    return answer.get("Uploads", [])


def _direct(store: S3Store, proxy: FaultProxy) -> S3Store:
    """The same store past the proxy."""
    other = S3Store(store.url, store.bucket, store.prefix)
    other.__dict__["_client"] = other._session.client("s3", endpoint_url=proxy.upstream)
    return other


def test_racing_uploads_leave_a_whole_object(store: S3Store, proxy: FaultProxy, big: Path) -> None:
    """Several may be told that they won: all of a name have the same bytes."""
    with ThreadPoolExecutor(4) as pool:
        assert any(pool.map(lambda _: store.create("blobs/race", big), range(4)))
    assert store.read("blobs/race") == big.read_bytes()
    assert _uploads(store) == []


def test_an_upload_that_ends_before_it_is_aborted_is_no_error(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 answers NoSuchUpload then, the server of the tests does not."""
    store._client.create_multipart_upload(**store._where("blobs/big"))
    code = "NoSuchUpload"

    def abort(**where: str) -> None:
        raise ClientError(
            {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 404}}, "AbortMultipartUpload"
        )

    monkeypatch.setattr(store._client, "abort_multipart_upload", abort)
    assert store.clear_abandoned(time.time() + 5) == 0
    code = "NoSuchBucket"
    with pytest.raises((ClientError, UserError)):
        store.clear_abandoned(time.time() + 5)


def test_abandoned_uploads_are_aborted_when_they_are_old(store: S3Store) -> None:
    for name in "ab":
        upload = store._client.create_multipart_upload(**store._where(name))["UploadId"]
        store._client.upload_part(**store._where(name), UploadId=upload, PartNumber=1, Body=io.BytesIO(b"1" * 1000))
    assert store.clear_abandoned(time.time() - 3600) == 0
    assert len(_uploads(store)) == 2
    assert store.clear_abandoned(time.time() + 5) == 2
    assert _uploads(store) == []


def test_more_objects_than_one_answer_names(store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    def pages(word: str) -> int:
        return sum(word in request.path for request in proxy.requests)

    def of_ten(params: dict[str, object], **_: object) -> dict[str, object]:
        return {**params, "MaxKeys": 10}

    monkeypatch.setattr(store_s3, "BATCH", 10)
    store._client.meta.events.register("provide-client-params.s3.ListObjectsV2", of_ten)
    paths = [f"shards/pairs/{hashlib.sha256(b'%d' % i).hexdigest()}.json" for i in range(17)]
    others = ["shards/pairs-b/x", "shards/paint/x", "shards/a"]
    for path in paths + others:
        assert store.create(path, path.encode())
    assert [entry.path for entry in store.list("shards/pairs/")] == sorted(paths)
    assert pages("list-type=2") == 2
    assert {entry.path for entry in store.list("shards/pairs")} == {*paths, "shards/pairs-b/x"}
    store.delete(iter(paths))
    assert pages("?delete") == 2
    assert {entry.path for entry in store.list("")} == set(others)


def test_an_object_that_was_not_deleted_is_tried_again_and_then_named(store: S3Store, proxy: FaultProxy) -> None:
    paths = [f"a/{i}&<'>" for i in range(3)]
    for path in paths:
        store.create(path, b"1")
    proxy.choose = always("keep")
    with pytest.raises(UserError, match=r"3 objects could not be deleted, the first is .*a/0.*InternalError"):
        store.delete(paths)
    proxy.choose = never
    assert [entry.path for entry in store.list("a/")] == paths
    proxy.choose = on_first_sight("keep")
    store.delete(["a/none", *paths])
    assert [request.fault for request in proxy.requests[-2:]] == ["keep", None]
    proxy.choose = never
    assert list(store.list("")) == []
