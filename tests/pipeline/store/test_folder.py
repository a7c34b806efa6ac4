"""Tests what a store in a folder does with links, locks and the disk."""

import errno
import fcntl
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import IO

import pytest

from pipeline.errors import UserError
from pipeline.store import check_conditions, open_store
from tests.links import exchanging
from tests.pipeline.store.objects import acts


def test_a_file_that_is_given_up_is_not_copied(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    assert open_store(str(tmp_path / "store")).create("blobs/f", file, move=True)
    assert (tmp_path / "store/blobs/f").samefile(file)


def test_in_a_folder_the_order_is_that_of_whole_paths(tmp_path: Path) -> None:
    """As S3 defines it: the names of folders alone do not decide."""
    store = open_store(str(tmp_path))
    paths = ["a-b/x", "a.json", "a/b/y", "a/x", "a0", "b", "z/-/1", "z/a"]
    for path in reversed(paths):
        store.create(path, b"1")
    assert [e.path for e in store.list("")] == sorted(paths)
    assert [e.path for e in store.list("a/")] == ["a/b/y", "a/x"]


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


def test_no_link_leads_out_of_a_folder(tmp_path: Path) -> None:
    """Neither to a folder, which garbage collection would empty, nor to a file, nor to one that is not there yet."""
    outside, store = tmp_path / "store-of-others", open_store(str(tmp_path / "store"))
    outside.mkdir()
    (outside / "x").write_text("precious")
    store.create("blobs/aa/a", b"1")
    for name, target in (("bb", outside), ("aa/b", outside / "x"), ("aa/c", outside / "new")):
        link = tmp_path / "store/blobs" / name
        link.symlink_to(target)
        lists = (lambda: list(store.list("")), lambda name=name: list(store.list(f"blobs/{name}")))
        for act in (*acts(store, f"blobs/{name}/x" if target == outside else f"blobs/{name}"), *lists):
            with pytest.raises(UserError, match=r"is a symbolic link, or below one, .*; delete the link"):
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
        with pytest.raises(UserError, match="links in a store are not followed; delete the link"):
            act()
    assert sorted(file.name for file in (tmp_path / "real/blobs/aa").iterdir()) == ["a", "b"]


def test_who_exchanges_folders_for_links_leads_nobody_out_of_a_store(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "store/blobs/aa"
    store = open_store(str(tmp_path / "store"))
    store.create("blobs/aa/a", b"ours")
    outside.mkdir()
    (outside / "a").write_bytes(b"a secret")

    def attempt(act: Callable[[], object]) -> object:
        try:
            return act()
        except (UserError, OSError):
            return None

    refused = 0
    with exchanging(inside, outside):
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
                assert ("blobs/aa/a", 8) not in (found or ())
                attempt(lambda: store.delete(["blobs/aa/none"]))
                attempt(lambda: store.clear_abandoned(0.0))
            assert [file.name for file in outside.iterdir()] == ["a"]
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
