"""A shard whose worker dies is gone on with: servers are not asked again, and its bytes are those of one that lived."""

import hashlib
import io
import multiprocessing
import os
import signal
import tarfile
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.pairs.unfinished import KEEP_S, Unfinished
from pipeline.store.records import read_blob
from tests.pipeline.data.bench import Bench, Page, picture, serving, write_list

multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])


def make_and_die(settings: dict[str, Any], store: Path, source: str, rows: int, temporary: str) -> None:
    """Makes pairs in a process of its own, until some rows are there."""
    tempfile.tempdir = temporary
    add, left = Unfinished.add, [rows]

    def dying(self: Unfinished, row: dict[str, Any], image: bytes | None) -> None:
        add(self, row, image)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    Unfinished.add = dying
    Bench(store, [source], run={"pairs": settings}).make("source", "pairs")


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    forkserver.ensure_running()  # whose socket would have too long a path in that folder
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def all_pages() -> dict[str, Page]:
    """A row was opted out, one is a 404, one is not an image."""
    pages = {f"/{i}.png": Page(picture(i)) for i in range(8) if i != 6}
    pages["/2.png"] = Page(picture(2), headers={"X-Robots-Tag": "noai"})
    return pages | {"/5.png": Page(b"<html>")}


def fetching(address: str) -> dict[str, Any]:
    return {"workers": 0, "hosts": {"a.test": address}, "retries": 0, "threads": 1}


def stored(bench: Bench) -> list[list[str]]:
    return [[blobs["images"], blobs["index"]] for _, blobs in bench.blobs("pairs")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[str]]]:
    """A list, and what is stored of it by a worker that lives."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_list(folder / "list.csv", [(f"http://a.test/{i}.png", f"row {i}") for i in range(8)])
    with serving(all_pages()) as address:
        bench = Bench(folder / "store", [source], run={"pairs": fetching(address)})
        bench.make("source", "pairs")
    return source, stored(bench)


def test_a_shard_goes_on_where_its_worker_died(
    whole: tuple[str, list[list[str]]], tmp_path: Path, own_temporary_folder: Path
) -> None:
    """Killed between rows that are not stored: no row that has ended is asked for again."""
    pages, (source, expected) = all_pages(), whole
    rows, store = 4, tmp_path / "store"
    with serving(pages) as address:
        words = (fetching(address), store, source, rows, str(own_temporary_folder))
        process = multiprocessing.get_context("forkserver").Process(target=make_and_die, args=words)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        for i in range(rows):
            pages[f"/{i}.png"] = Page(b"<html>asked again")
        bench = Bench(store, [source], run={"pairs": fetching(address)})
        bench.make("source", "pairs")
    reasons = [None, None, "opted_out", None, None, "not_an_image", "http_4xx", None]
    assert [row["reason"] for row in bench.rows("pairs")] == reasons
    assert list((own_temporary_folder / f"unclip-pairs-{os.getuid()}").iterdir()) == []
    assert stored(bench) == expected
    assert len(read_blob(bench.store, expected[0][0])) % 10240 == 0


def added(unfinished: Unfinished, count: int) -> None:
    with unfinished:
        for i in range(len(unfinished.ended), count):
            data = bytes([i]) * 700
            unfinished.add({"key": f"{i}", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}, data)


@pytest.mark.parametrize("damage", ["torn line", "torn spool", "other bytes", "no json"])
def test_what_is_damaged_is_made_again(damage: str) -> None:
    first = Unfinished("a")
    added(first, 3)
    spool, rows = (first.path.with_name(name) for name in ("spool", "rows"))
    sound = spool.read_bytes()
    if damage == "torn line":
        rows.write_bytes(rows.read_bytes()[:-5])
    elif damage == "no json":
        rows.write_bytes(rows.read_bytes().rstrip(b"\n").rpartition(b"\n")[0] + b"\n[]\n")
    elif damage == "torn spool":
        os.truncate(spool, 2 * 700 + 600)
    else:
        data = bytearray(sound)
        data[2 * 700 + 600] ^= 1
        spool.write_bytes(data)
    again = Unfinished("a")
    assert list(again.ended) == ["0", "1"]
    added(again, 3)
    assert spool.read_bytes() == sound


def test_the_tar_does_not_depend_on_the_order_in_which_answers_came() -> None:
    """Nor on where a worker died, and images lie where their rows say."""
    images = {f"{i:04}": picture(i) for i in range(6)}
    tars = []
    for number, order in enumerate(([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [2, 4, 5, 0, 3, 1])):
        rows = [
            {"key": key, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for key, data in images.items()
        ]
        rows[3] |= {"size": None, "reason": "too_small"}
        for some in (order[:2], order[2:]):
            with Unfinished(f"{number}") as unfinished:
                for i in some:
                    unfinished.add(rows[i], None if i == 3 else images[f"{i:04}"])
                unfinished.pack(rows, "png")
        tars.append(unfinished.path.read_bytes())
        for i in (0, 1, 2, 4, 5):
            assert tars[0][rows[i]["offset"] :][: rows[i]["size"]] == images[f"{i:04}"]
        assert "offset" not in rows[3]
    assert tars[0] == tars[1] == tars[2]
    with tarfile.open(fileobj=io.BytesIO(tars[0])) as tar:
        assert tar.getnames() == [f"{i:04}.png" for i in (0, 1, 2, 4, 5)]


def test_two_at_once_have_places_of_their_own_and_what_is_old_goes(own_temporary_folder: Path) -> None:
    with Unfinished("a") as one, Unfinished("a") as other:
        assert one.path != other.path
    for each in (one, other):  # neither was removed, as if their workers had been killed
        old = each.path.with_name("rows")
        os.utime(old, (0, old.stat().st_mtime - KEEP_S - 60))
    with Unfinished("b") as third:
        assert not one.path.parent.exists()
        assert not other.path.parent.exists()
        assert third.path.parent.parent == one.path.parent.parent


def test_a_link_in_the_place_of_the_folder_deletes_nothing(own_temporary_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine/old").mkdir(parents=True)
    rows = tmp_path / "mine/old/rows"
    rows.write_text("of another program")
    os.utime(rows, (0, rows.stat().st_mtime - KEEP_S - 60))
    (own_temporary_folder / f"unclip-pairs-{os.getuid()}").symlink_to(tmp_path / "mine")
    with Unfinished("a"):
        assert rows.exists()


def test_a_folder_that_others_may_write_to_is_not_used(own_temporary_folder: Path) -> None:
    shared = own_temporary_folder / f"unclip-pairs-{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    with Unfinished("a") as unfinished:
        assert not unfinished.path.is_relative_to(shared)
        assert unfinished.path.parent.stat().st_mode & 0o077 == 0
