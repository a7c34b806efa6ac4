import errno
import fcntl
import itertools
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.store import Store, check_conditions, open_store
from pipeline.store.base import cut
from tests.aws import NEEDS, lacking
from tests.pipeline.data.bench import Page, serving


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
    chunks, rest = [], data
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


def test_a_file_that_is_given_up_is_not_copied(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    assert open_store(str(tmp_path / "store")).create("blobs/f", file, move=True)
    assert (tmp_path / "store/blobs/f").samefile(file)


def test_missing_object(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("artifacts/none.json")
    assert store.stat("artifacts/none.json") is None
    store.delete(["artifacts/none.json"])


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


def test_in_a_folder_the_order_is_that_of_whole_paths(tmp_path: Path) -> None:
    """As S3 defines it: the names of folders alone do not decide."""
    store = open_store(str(tmp_path))
    paths = ["a-b/x", "a.json", "a/b/y", "a/x", "a0", "b", "z/-/1", "z/a"]
    for path in reversed(paths):
        store.create(path, b"1")
    assert [e.path for e in store.list("")] == sorted(paths)
    assert [e.path for e in store.list("a/")] == ["a/b/y", "a/x"]


def test_swap_compares_first(store: Store) -> None:
    assert not store.swap("locks/p", "no such version", b"1")
    assert store.swap("locks/p", None, b"1")
    assert not store.swap("locks/p", None, b"2")
    version = next(store.list("locks/p")).version
    assert store.swap("locks/p", version, b"2")
    assert not store.swap("locks/p", version, b"3")
    assert store.read("locks/p") == b"2"
    assert next(store.list("locks/p")).version != version


def test_racing_creates_have_one_winner(store: Store) -> None:
    with ThreadPoolExecutor(12) as pool:
        won = list(pool.map(lambda i: store.create("artifacts/race", str(i).encode()), range(12)))
    assert sum(won) == 1
    assert store.read("artifacts/race") == str(won.index(True)).encode()


def test_racing_swaps_have_one_winner(store: Store) -> None:
    store.swap("leases/race", None, b"start")
    version = next(store.list("leases/race")).version
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.swap("leases/race", version, str(i).encode()), range(8)))
    assert sum(won) == 1
    assert store.read("leases/race") == str(won.index(True)).encode()


def test_one_that_stops_in_a_swap_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may stand still where its disk does; a lease that it keeps from all others would be of no use."""
    store, fsync, stopped, go_on = open_store(str(tmp_path)), os.fsync, Event(), Event()

    def stop_the_first(file: int) -> None:
        if not stopped.is_set():
            stopped.set()
            assert go_on.wait(60)
        fsync(file)

    monkeypatch.setattr(os, "fsync", stop_the_first)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(store.swap, "leases/a", None, b"1")
        assert stopped.wait(60)
        try:
            assert pool.submit(store.swap, "leases/a", None, b"2").result(30)
        finally:
            go_on.set()
        assert not first.result()
    assert store.read("leases/a") == b"2"
    assert sorted(file.name for file in (tmp_path / "leases").iterdir()) == [".a.lock", "a"]


def test_locks_go_with_their_deleted_objects(tmp_path: Path) -> None:
    store, paths = open_store(str(tmp_path)), ["leases/a", "leases/b", "locks/p.json", "releases/p.json"]
    for path in paths:
        assert store.swap(path, None, b"1")
    with open(tmp_path / "leases/.a.lock") as held, ThreadPoolExecutor(1) as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        deleting = pool.submit(store.delete, paths)
        _wait_for_waiter(held)
        assert store.read("leases/a") == b"1"
        fcntl.flock(held, fcntl.LOCK_UN)
        deleting.result(60)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
    assert all(store.swap(path, None, b"2") for path in paths)


def test_who_waited_for_a_lock_that_was_deleted_takes_a_new_one(tmp_path: Path) -> None:
    """Else two would hold two files of one name, and both write."""
    store, (file, lock) = open_store(str(tmp_path)), (tmp_path / "leases/a", tmp_path / "leases/.a.lock")
    assert store.swap("leases/a", None, b"1")
    with ThreadPoolExecutor(1) as pool:
        with open(lock) as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            swapping = pool.submit(store.swap, "leases/a", None, b"2")
            _wait_for_waiter(held)
            lock.unlink()
            file.unlink()
            lock.touch()  # somebody else comes first
            with open(lock) as new:
                fcntl.flock(new, fcntl.LOCK_EX)
                fcntl.flock(held, fcntl.LOCK_UN)
                _wait_for_waiter(new)
                assert not file.exists()
        assert swapping.result(60)
    assert store.read("leases/a") == b"2"


def _wait_for_waiter(held: IO[str]) -> None:
    """Returns once somebody waits for a file lock, as the kernel lists them."""
    inode = f":{os.fstat(held.fileno()).st_ino} "
    end = time.monotonic() + 60
    while not any("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines()):
        assert time.monotonic() < end, "nobody waits for the lock"
        time.sleep(0.01)


def test_conditions_hold_and_leave_nothing(store: Store) -> None:
    check_conditions(store)
    assert list(store.list("")) == []


@pytest.mark.parametrize("folder", ["/proc", __file__])
def test_a_folder_that_cannot_be_made_is_one_clear_line(folder: str) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        open_store(f"{folder}/store").create("a", b"1")


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(UserError, match="disk is full"):
        store.create("blobs/a", b"1")
    monkeypatch.undo()
    assert list(store.list("")) == []
    assert store.create("blobs/a", b"1")


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM])
def test_a_file_system_without_hard_links_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def link(file: str, name: str, **_: object) -> None:
        raise OSError(code, os.strerror(code), file, None, name)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UserError, match=r"no hard links or no locks .*choose a local disk, NFS or S3"):
        check_conditions(open_store(str(tmp_path / "store")))


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
        for act in (
            lambda store: store.stat("a"),
            lambda store: store.create("a", b"1"),
            lambda store: store.fresh().read("a"),
        ):
            with pytest.raises(UserError, match=f"store s3://unclip/mistakes: .*{NEEDS[what]}") as told:
                act(open_store("s3://unclip/mistakes"))
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


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3:///x", "s3:bucket/x"])
def test_unknown_stores_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="s3://BUCKET/PREFIX"):
        open_store(url)


@pytest.mark.parametrize("path", ["../x", "blobs/../../x", "blobs/..", "blobs/../x", "/x", "blobs/\0"])
def test_no_path_leads_out_of_a_store(path: str, store: Store, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    acts = (
        lambda: store.read(path),
        lambda: list(store.read_parts(path, [(0, 1)])),
        lambda: list(store.list(path)),
        lambda: store.create(path, b"1"),
        lambda: store.stat(path),
        lambda: store.swap(path, None, b"1"),
        lambda: store.delete([path]),
    )
    for act in acts:
        with pytest.raises(UserError, match="leads out of the store"):
            act()
    assert (tmp_path / "x").read_text() == "precious"


def test_no_link_leads_out_of_a_folder(tmp_path: Path) -> None:
    """Neither to a folder, which garbage collection would empty, nor to a file, nor to one that is not there yet."""
    outside, store = tmp_path / "store-of-others", open_store(str(tmp_path / "store"))
    outside.mkdir()
    (outside / "x").write_text("precious")
    store.create("blobs/aa/a", b"1")
    for name, target in (("bb", outside), ("aa/b", outside / "x"), ("aa/c", outside / "new")):
        link = tmp_path / "store/blobs" / name
        link.symlink_to(target)
        path = f"blobs/{name}/x" if target == outside else f"blobs/{name}"
        acts = (
            lambda path=path: store.read(path),
            lambda path=path: list(store.read_parts(path, [(0, 1)])),
            lambda path=path: store.stat(path),
            lambda path=path: store.create(path, b"1"),
            lambda path=path: store.swap(path, None, b"1"),
            lambda path=path: store.delete([path]),
            lambda: list(store.list("")),
            lambda name=name: list(store.list(f"blobs/{name}")),
        )
        for act in acts:
            with pytest.raises(UserError, match=r"is a link, or lies behind one, .*; delete the link"):
                act()
        link.unlink()
    assert [entry.path for entry in store.list("")] == ["blobs/aa/a"]
    assert [(file.name, file.read_text()) for file in outside.iterdir()] == [("x", "precious")]


def test_a_link_to_a_folder_is_followed_and_none_inside_it(tmp_path: Path) -> None:
    open_store(str(tmp_path / "real")).create("blobs/aa/a", b"1")
    (tmp_path / "store").symlink_to(tmp_path / "real")
    store = open_store(str(tmp_path / "store"))
    assert store.read("blobs/aa/a") == b"1"
    assert store.create("blobs/aa/b", b"2")
    (tmp_path / "real/blobs/bb").symlink_to("aa")
    for act in (lambda: store.read("blobs/bb/a"), lambda: store.create("blobs/bb/c", b"2"), lambda: [*store.list("")]):
        with pytest.raises(UserError, match="no link in a store is followed; delete the link"):
            act()
    assert sorted(file.name for file in (tmp_path / "real/blobs/aa").iterdir()) == ["a", "b"]


def test_who_exchanges_folders_for_links_leads_nobody_out_of_a_store(tmp_path: Path) -> None:
    """A writer of a shared folder puts a link in the place of a folder, and back, as fast as renames go."""
    outside, inside, aside = tmp_path / "outside", tmp_path / "store/blobs/aa", tmp_path / "store/blobs/aside"
    store = open_store(str(tmp_path / "store"))
    store.create("blobs/aa/a", b"ours")
    outside.mkdir()
    (outside / "a").write_bytes(b"a secret")
    link, stop, exchanges, numbers = tmp_path / "store/blobs/link", Event(), 0, itertools.count()

    def move(source: Path, target: Path) -> None:
        while True:
            try:
                source.rename(target)
                return
            except OSError:  # a create has made the folder meanwhile
                target.rename(tmp_path / f"made meanwhile {next(numbers)}")

    def exchange() -> None:
        nonlocal exchanges
        link.symlink_to(outside)
        while not stop.is_set():
            inside.rename(aside)
            move(link, inside)
            inside.rename(link)
            move(aside, inside)
            exchanges += 1

    def attempt(act: Callable[[], object]) -> object:
        try:
            return act()
        except (UserError, OSError):
            return None

    refused = 0
    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(exchange)
        try:
            for i in range(300):
                read = attempt(lambda: store.read("blobs/aa/a"))
                refused += read is None
                assert read in (b"ours", None)
                assert attempt(lambda: [*store.read_parts("blobs/aa/a", [(0, 4)])]) in ([b"ours"], None)
                entry = attempt(lambda: store.stat("blobs/aa/a"))
                assert entry is None or entry.size == 4  # type: ignore[attr-defined]
                attempt(lambda i=i: store.create(f"blobs/aa/{i}", b"1"))
                attempt(lambda i=i: store.swap(f"blobs/aa/{i}", None, b"1"))
                attempt(lambda i=i: store.delete([f"blobs/aa/{i}"]))
                if i % 10 == 0:
                    found = attempt(lambda: [(entry.path, entry.size) for entry in store.list("blobs/aa/")])
                    assert ("blobs/aa/a", 8) not in (found or ())  # type: ignore[operator]
                    attempt(lambda: store.delete(["blobs/aa/none"]))
                    attempt(lambda: store.clear_abandoned(0.0))
                assert [file.name for file in outside.iterdir()] == ["a"]
        finally:
            stop.set()
        thread.result()
    assert exchanges > 100
    assert refused > 10
    assert (outside / "a").read_bytes() == b"a secret"


def test_a_folder_that_is_elsewhere_on_another_machine_is_found_there(tmp_path: Path) -> None:
    link = tmp_path / "store"
    for place in ("a", "b"):
        open_store(str(tmp_path / place)).create("blobs/x", place.encode())
    link.symlink_to(tmp_path / "a")
    store = open_store(str(link))
    assert store.read("blobs/x") == b"a"
    sent = pickle.dumps(store)
    link.unlink()
    link.symlink_to(tmp_path / "b")
    assert pickle.loads(sent).read("blobs/x") == b"b"
