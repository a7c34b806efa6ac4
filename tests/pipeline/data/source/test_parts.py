"""Lists of many files: each is read once and alone, and the shards are those of one list with all of the rows."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.source import duplicates, lists, passes, spool
from pipeline.data.source import stage as source
from pipeline.data.source.journal import ListJournal, reference_mark
from pipeline.data.source.lists import PartReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.segments import SourceShard
from pipeline.data.source.source import ListPart, ListRow
from pipeline.data.source.stage import Scan, scan
from pipeline.errors import UserError
from pipeline.graph.artifacts import read_table
from pipeline.store import Store, open_store
from pipeline.store.s3 import S3Store
from tests.pipeline.data.bench import write_list, write_tar
from tests.pipeline.data.source.lists import ROWS, URLS, lines, table
from tests.seaweed import BUCKET, Server


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that are read from now on, by the names of their files."""
    names: list[str] = []
    whole = PartReader.read
    monkeypatch.setattr(PartReader, "read", lambda self, part: names.append(Path(part.name).name) or whole(self, part))
    return names


def urls_of(store: Store, found: Scan) -> list[str]:
    return [url for shard in found.shards for url in read_table(store, shard.refs)["url"].to_pylist()]


# --- a folder on this machine -----------------------------------------------------------------------------------------


def test_of_a_folder_only_the_appended_file_is_read(tmp_path: Path, folder_store: Store, read: list[str]) -> None:
    """As from a list with all of the rows: shards are full but for the last, which takes further rows."""
    folder = table(table(tmp_path / "lists", "a.csv", *range(5)), "b.csv", 5, 6, 2)
    recipe = SourceRecipe((str(folder),), shard_rows=4)
    before = scan(recipe, folder_store, write=True)
    assert read == ["a.csv", "b.csv"]
    table(folder, "c.csv", 7, 1, 8)
    planned = scan(recipe, folder_store, write=False)
    grown = scan(recipe, folder_store, write=True)
    assert read == ["a.csv", "b.csv", "c.csv", "c.csv"]
    assert planned.keys == grown.keys == scan(recipe, folder_store, write=False).keys
    assert read[4:] == []
    assert [each.unstored for each in (before, planned, grown)] == [0, 3, 0]
    assert grown.shards[:2] == before.shards
    assert [shard.ledger.rows for shard in grown.shards] == [4, 4, 3]
    one = write_list(tmp_path / "one.csv", [(f"http://h/{i}.png", f"picture {i}") for i in (*range(7), 2, 7, 1, 8)])
    other = open_store(str(tmp_path / "other"))
    assert scan(replace(recipe, paths=(one,)), other, write=True).shards == grown.shards


def test_a_file_that_changes_is_read_again_with_those_behind_it(
    tmp_path: Path, folder_store: Store, read: list[str]
) -> None:
    folder = table(table(table(tmp_path / "lists", "a.csv", 0, 1), "b.csv", 2), "c.csv", 3)
    recipe = SourceRecipe((str(folder),), shard_rows=3)
    scan(recipe, folder_store, write=True)
    table(folder, "b.csv", 4, 5)
    found = scan(recipe, folder_store, write=True)
    assert read[3:] == ["a.csv", "b.csv", "c.csv"]
    assert urls_of(folder_store, found) == [f"http://h/{i}.png" for i in (0, 1, 4, 5, 3)]
    table(folder, "d.csv", 6)
    scan(recipe, folder_store, write=True)
    (folder / "d.csv").unlink()
    assert scan(recipe, folder_store, write=False).keys == found.keys
    assert read[6:] == ["d.csv"]


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, folder_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = table(table(tmp_path / "lists", "a.csv", 0), "b.csv", 1)
    whole = PartReader.read

    def changing(self: PartReader, part: ListPart) -> Iterator[ListRow]:
        yield from whole(self, part)
        table(folder, "b.csv", 1, 2)

    monkeypatch.setattr(PartReader, "read", changing)
    for path in (folder, folder / "b.csv"):
        table(folder, "b.csv", 1)
        with pytest.raises(UserError, match=r"b\.csv: changed while it was read; run again"):
            scan(SourceRecipe((str(path),)), folder_store, write=True)

    def deleting(self: PartReader, part: ListPart) -> Iterator[ListRow]:
        yield from whole(self, part)
        (folder / "a.csv").unlink(missing_ok=True)

    monkeypatch.setattr(PartReader, "read", deleting)
    with pytest.raises(UserError, match=r"a\.csv: changed while it was read; run again"):
        scan(SourceRecipe((str(folder),)), folder_store, write=True)
    assert list(folder_store.list("")) == []


def test_tars_are_read_one_by_one(tmp_path: Path, folder_store: Store, read: list[str]) -> None:
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", {f"{i}.jpg": b"1", f"{i}.txt": b"a cat"})
    recipe = SourceRecipe((str(tmp_path),))
    scan(recipe, folder_store, write=True)
    write_tar(tmp_path / "2.tar", {"2.jpg": b"1", "2.txt": b"a dog"})
    (shard,) = scan(recipe, folder_store, write=True).shards
    assert (shard.ledger.rows, read) == (3, ["0.tar", "1.tar", "2.tar"])


def test_a_folder_needs_one_caption(tmp_path: Path, folder_store: Store) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "b.csv").write_text("url,caption\nhttp://h/1,\n")
    with pytest.raises(UserError, match="no row has a caption"):
        scan(SourceRecipe((str(folder),)), folder_store, write=True)
    table(folder, "a.csv", 0)
    scan(SourceRecipe((str(folder),)), folder_store, write=True)
    (folder / "c.csv").write_text("url,caption\nhttp://h/2,\n")
    assert scan(SourceRecipe((str(folder),)), folder_store, write=True).rows == 3


def test_a_full_disk_for_temporary_files_is_one_sentence(
    tmp_path: Path, folder_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool.tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match=r"do not fit into .* \(No space left on device\); set TMPDIR"):
        scan(SourceRecipe((str(table(tmp_path / "lists", "a.csv", 0)),)), folder_store, write=True)


# --- any rows, in any files -------------------------------------------------------------------------------------------


def first_wins(rows: Sequence[ListRow], forgotten: set[str]) -> list[str | None]:
    """How rows end, by a set."""
    seen: set[str] = set()
    ends: list[str | None] = []
    for row in rows:
        again = row.url in seen
        seen |= {row.url} - forgotten if not row.reject else set()
        end = row.reject or ("no_reference" if not row.url else "duplicate_url" if again else None)
        ends.append("forgotten" if row.url in forgotten else end)
    return ends


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(ROWS, max_size=7), min_size=1, max_size=5),
    st.sets(st.sampled_from(URLS[1:]), max_size=2),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_files_at_once_or_one_by_one_are_cut_as_by_a_set(
    files: list[list[ListRow]], forgotten: set[str], task_bytes: int, at_once: int
) -> None:
    """Whatever is stored, in one task or in many, and however little is in memory; full shards stay as they are."""
    rows = list(chain.from_iterable(files))
    if not any(row.captions for row in rows):
        return
    there: list[int] = []

    def parts(path: str) -> list[ListPart]:
        return [
            ListPart(f"{i}", lambda i=i: i, lambda *_, i=i: iter(files[i]), size=len(files[i]))
            for i in range(there[-1])
        ]

    recipe = SourceRecipe(("list",), shard_rows=3)
    journal = ListJournal(forgotten=frozenset(map(reference_mark, forgotten)))
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(lists, "parts_of", parts),
        mock.patch.object(source, "parts_of", parts),
        mock.patch.object(source, "unread", return_value=""),
        mock.patch.object(lists, "unread", return_value=""),
        mock.patch.object(passes, "TASK_BYTES", task_bytes),
        mock.patch.object(duplicates, "AT_ONCE", at_once),
    ):
        there.append(len(files))
        once, one_by_one = open_store(f"{folder}/once"), open_store(f"{folder}/one")
        expected = scan(recipe, once, write=True, journal=journal)
        rejects = [end for shard in expected.shards for end in read_table(once, shard.refs)["reject"].to_pylist()]
        assert rejects == first_wins(rows, forgotten)
        before: list[SourceShard] = []
        for count in range(1, len(files) + 1):
            if not any(row.captions for row in chain.from_iterable(files[:count])):
                continue
            there.append(count)
            planned = scan(recipe, one_by_one, write=False, journal=journal)
            found = scan(recipe, one_by_one, write=True, journal=journal)
            assert planned.keys == found.keys
            full = [shard for shard in before if shard.ledger.rows == recipe.shard_rows]
            assert found.shards[: len(full)] == full
            before = found.shards
        assert before == expected.shards


# --- a folder on S3 ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tables of which a body is asked for from now on."""
    asked: list[str] = []
    chunks: Callable[..., Iterator[bytes]] = S3Store._chunks
    monkeypatch.setattr(S3Store, "_chunks", lambda self, path, *at: asked.append(path) or chunks(self, path, *at))
    return asked


def test_a_folder_on_s3_is_listed_and_its_tables_are_read_once(
    s3: Server, tmp_path: Path, folder_store: Store, fetched: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "unclip")
    there = open_store(f"s3://{BUCKET}/many")
    for i in range(12):
        there.create(f"day={i:02d}/part.jsonl", lines(f"http://h/{i}.png", f"images/{i}.png", "http://h/0.png"))
    for name in ("_temporary/part.jsonl", "day=00/.part.jsonl", "_SUCCESS"):
        there.create(name, b"nothing to read")
    there.create("notes.txt", b"about these lists")
    recipe = SourceRecipe((f"s3://{BUCKET}/many/",), shard_rows=10)
    found = scan(recipe, folder_store, write=True)
    tables = [f"day={i:02d}/part.jsonl" for i in range(12)]
    assert fetched == tables
    assert f"1 file in s3://{BUCKET}/many is not read: 1 .txt (such as notes.txt)" in caplog.text
    assert urls_of(folder_store, found)[:2] == ["http://h/0.png", f"s3://{BUCKET}/many/day=00/images/0.png"]
    assert sum(shard.ledger.rejected.get("duplicate_url", 0) for shard in found.shards) == 12
    fetched.clear()
    assert scan(recipe, folder_store, write=False) == found
    assert fetched == []
    there.create("day=12/part.jsonl", lines("http://h/12.png", "http://h/3.png"))
    grown = scan(recipe, folder_store, write=True)
    assert fetched == ["day=12/part.jsonl"]
    assert grown.shards[:3] == found.shards[:3]
    assert grown.shards[3].ledger.rejected["duplicate_url"] == found.shards[3].ledger.rejected["duplicate_url"] + 1
    assert scan(recipe, open_store(str(tmp_path / "other")), write=True).shards == grown.shards
    assert list(Path(tempfile.gettempdir()).glob("unclip-lists-*/part.jsonl")) == []


@pytest.mark.usefixtures("s3")
def test_a_table_on_s3_that_changes_before_it_is_read_is_refused(
    folder_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = open_store(f"s3://{BUCKET}/changing")
    for name in ("a.jsonl", "b.jsonl"):
        there.create(name, lines(f"http://h/{name}.png"))
    recipe, whole = SourceRecipe((f"s3://{BUCKET}/changing",)), PartReader.read
    for change, says in (
        (lambda version: there.swap("b.jsonl", version, lines("http://h/c.png")), "changed while the list was read"),
        (lambda _: there.delete(["b.jsonl"]), "deleted while the list was read"),
    ):

        def changing(self: PartReader, part: ListPart, change: Any = change) -> Iterator[ListRow]:
            yield from whole(self, part)
            if part.name.endswith("a.jsonl"):
                standing = there.stat("b.jsonl")
                change(standing and standing.version)

        monkeypatch.setattr(PartReader, "read", changing)
        with pytest.raises(UserError, match=rf"b\.jsonl: {says}; run again"):
            scan(recipe, folder_store, write=True)
    assert list(folder_store.list("")) == []


@pytest.mark.usefixtures("s3")
def test_mistakes_about_a_folder_on_s3_are_one_line(folder_store: Store) -> None:
    there = open_store(f"s3://{BUCKET}/mistakes")
    there.create("a.csv", b"link,caption\nhttp://h/0,x\n")
    there.create("tars/0.tar", b"")
    for name, says in {
        "mistakes": f"source s3://{BUCKET}/mistakes/a.csv: no column url; it has link, caption",
        "mistakes/tars/": "no .parquet, .csv, .tsv, .jsonl file (or .csv.gz and so on) in this folder on S3",
        "mistakes/tars/0.tar": "download images and tars",
    }.items():
        with pytest.raises(UserError) as error:
            scan(SourceRecipe((f"s3://{BUCKET}/{name}",)), folder_store, write=True)
        assert says in str(error.value)
        assert len(str(error.value).splitlines()) == 1
    assert list(folder_store.list("")) == []
