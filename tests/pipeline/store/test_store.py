import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.store import Store, check_conditions, open_store
from pipeline.store.base import cut
from tests.aws import NEEDS, lacking
from tests.pipeline.data.bench import Page, serving
from tests.pipeline.store.objects import acts


def test_create_read_and_never_overwrite(store: Store) -> None:
    assert store.create("blobs/ab/x", b"0123456789")
    assert not store.create("blobs/ab/x", b"other")
    assert store.read("blobs/ab/x") == b"0123456789"
    assert store.read("blobs/ab/x", 3) == b"3456789"
    assert store.read("blobs/ab/x", 3, 5) == b"34"
    assert store.read("blobs/ab/x", 4, 4) == b""
    assert store.read("blobs/ab/x", 8, 20) == b"89"
    assert store.read("blobs/ab/x", 10, 20) == b""


def test_parts_of_one_request(store: Store) -> None:
    data = os.urandom(3 << 20)
    store.create("blobs/p", data)
    parts = [(5, 5), (7, 700), (700, 701), (1_000, 2_500_000), (3_000_000, len(data) + 9), (4 << 20, 5 << 20)]
    assert list(store.read_parts("blobs/p", parts)) == [data[start:stop] for start, stop in parts]
    assert list(store.read_parts("blobs/p", [(4 << 20, 5 << 20), (6 << 20, 7 << 20)])) == [b"", b""]
    with pytest.raises(FileNotFoundError):
        list(store.read_parts("blobs/none", parts))


@given(st.binary(max_size=60), st.lists(st.integers(1, 9)), st.lists(st.integers(0, 70), max_size=12))
def test_a_stream_is_cut_into_its_parts(data: bytes, sizes: list[int], bounds: list[int]) -> None:
    """Whatever the chunks are, and also where parts lie beyond the end."""
    chunks: list[bytes] = []
    rest = data
    for size in sizes:
        chunks, rest = [*chunks, rest[:size]], rest[size:]
    bounds = sorted(bounds)
    parts = list(zip(bounds[::2], bounds[1::2], strict=False))
    start = parts[0][0] if parts else 0
    stream = iter([*(chunk for chunk in chunks if chunk), rest])
    assert list(cut(stream, start, parts)) == [data[first - start : last - start] for first, last in parts]


def test_create_from_a_file(store: Store, tmp_path: Path) -> None:
    file, data = tmp_path / "file", os.urandom(3 << 20)
    file.write_bytes(data)
    assert store.create("blobs/f", file)
    assert store.read("blobs/f") == data
    assert not store.create("blobs/f", file)
    file.write_bytes(b"it is the caller's")
    assert store.read("blobs/f") == data


@pytest.mark.parametrize("place", ["/tmp", "/dev/shm"])
def test_create_from_a_file_that_is_given_up(store: Store, place: str) -> None:
    """From the store's own file system, and from another one."""
    data = os.urandom(3 << 20)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        file = Path(folder, "file")
        file.write_bytes(data)
        assert store.create("blobs/f", file, move=True)
        assert not store.create("blobs/f", file, move=True)
    assert store.read("blobs/f") == data
    assert [entry.path for entry in store.list("")] == ["blobs/f"]


@pytest.mark.parametrize("path", ["blobs/a", "locks/a.json"])
def test_an_object_is_looked_at_as_in_a_listing(path: str, store: Store) -> None:
    """Neither a longer name nor a folder of the name is taken for it."""
    store.create(path + ".more", b"longer")
    store.create("folder/of/one", b"1")
    assert store.stat(path) is store.stat("folder") is store.stat("folder/of") is None
    store.create(path, b"12")
    assert store.stat(path) == next(entry for entry in store.list(path) if entry.path == path)


def test_list_is_ordered_and_by_prefix(store: Store) -> None:
    paths = [f"shards/a/{i:04}" for i in range(30)] + ["shards/ab/0", "runs/x"]
    for path in reversed(paths):
        store.create(path, b"1")
    assert [e.path for e in store.list("shards/a/")] == paths[:30]
    assert {e.path for e in store.list("shards/a")} == set(paths[:31])
    assert {e.path for e in store.list("")} == set(paths)
    assert list(store.list("nothing/")) == []


def test_swap_compares_first(store: Store) -> None:
    assert not store.swap("locks/p", "no such version", b"1")
    assert store.swap("locks/p", None, b"1")
    assert not store.swap("locks/p", None, b"2")
    version = next(store.list("locks/p")).version
    assert store.swap("locks/p", version, b"2")
    assert not store.swap("locks/p", version, b"3")
    assert store.read("locks/p") == b"2"
    assert next(store.list("locks/p")).version != version


@pytest.mark.parametrize("path", ["artifacts/race", "leases/race"])
def test_of_racing_writers_one_wins(path: str, store: Store) -> None:
    version = None
    if path.startswith("leases/"):
        store.swap(path, None, b"start")
        version = next(store.list(path)).version

    def write(number: int) -> bool:
        data = str(number).encode()
        return store.swap(path, version, data) if version else store.create(path, data)

    with ThreadPoolExecutor(12) as pool:
        won = list(pool.map(write, range(12)))
    assert sum(won) == 1
    assert store.read(path) == str(won.index(True)).encode()


def test_conditions_hold_and_leave_nothing(store: Store) -> None:
    check_conditions(store)
    assert list(store.list("")) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "secret key is wrong; check AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "access key is unknown"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot reach the server; check AWS_ENDPOINT_URL"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no AWS credentials"),
    ],
)
def test_s3_mistakes_are_one_clear_line(s3: object, monkeypatch: pytest.MonkeyPatch, change: dict, words: str) -> None:
    for name, value in change.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name)
    store = open_store("s3://unclip/mistakes")
    with pytest.raises(UserError, match=words):
        store.create("a", b"1")
    with pytest.raises(UserError, match=words):
        store.stat("a")


@pytest.mark.parametrize("what", NEEDS)
def test_credentials_that_cannot_be_had_are_one_clear_line(what: str, s3: object, tmp_path: Path) -> None:
    with lacking(what, tmp_path):
        for act in ("stat", "read"):
            with pytest.raises(UserError, match=f"store s3://unclip/mistakes: .*{NEEDS[what]}") as told:
                getattr(open_store("s3://unclip/mistakes"), act)("a")
            assert "\n" not in str(told.value)


@pytest.mark.parametrize(("code", "words"), [("ExpiredToken", "have expired"), ("InvalidToken", "AWS_SESSION_TOKEN")])
def test_a_token_that_is_not_valid_any_more_is_one_clear_line(
    code: str, words: str, s3: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the answer, to a HEAD, has no body that says so."""
    page = Page(f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode(), 400)
    with serving({"/unclip/x/a": page}) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        with pytest.raises(UserError, match=f"{code}: .*{words}"):
            open_store("s3://unclip/x").stat("a")


def test_no_such_bucket(s3: object) -> None:
    with pytest.raises(UserError, match="NoSuchBucket: create the bucket"):
        open_store("s3://no-such-bucket/x").read("a")


def test_a_name_is_taken_as_it_stands(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("run#1", "run#2", "what?", "100%25")]
    for url, folder in [*zip(folders, folders, strict=True), (f"file://{tmp_path}/a#b", str(tmp_path / "a#b"))]:
        assert open_store(url).url == folder
    for prefix in ("run#1", "what?/x"):
        store = open_store(f"s3://bucket/{prefix}/")
        assert (store.bucket, store.prefix) == ("bucket", prefix)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="write file:///FOLDER"):
        open_store("file://server/folder")


@pytest.mark.parametrize("url", ["ftp://bucket/x", "gs://", "az:///", "s3:///x", "s3:bucket/x"])
def test_unknown_stores_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="BUCKET/PREFIX"):
        open_store(url)


@pytest.mark.parametrize("path", ["../x", "blobs/../../x", "blobs/..", "blobs/../x", "/x", "blobs/\0"])
def test_no_path_leads_out_of_a_store(path: str, store: Store, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    for act in acts(store, path):
        with pytest.raises(UserError, match="leads out of the store"):
            act()
    assert (tmp_path / "x").read_text() == "precious"
