"""A list that is read in passes is the list that one task reads: keys, shards and bytes, whatever is killed."""

import gzip
import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pipeline.data.source import cutter, known_rows, lists, passes
from pipeline.data.source import stage as source
from pipeline.data.source.duplicates import BUCKETS, HASH, Hashes, cut_ranges, ranges
from pipeline.data.source.journal import ListJournal, reference_mark
from pipeline.data.source.passes import ListedPart, ListWorkers, divide
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.segments import Segment, SourceShard, segment_of, segment_path
from pipeline.data.source.source import ListPart, ListRow
from pipeline.data.source.spool import RowSpool
from pipeline.data.source.stage import Scan, scan
from pipeline.data.source.versions import ImageVersions
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.ray import start_ray
from pipeline.settings import RaySettings, ShardSettings
from pipeline.store import Store, open_store
from pipeline.store.records import blob_path, put_blob, read_blob, read_record
from tests.pipeline.data.source.lists import ROWS, URLS, lines, table
from tests.pipeline.data.vectors import CountedStore
from tests.seaweed import Server

AT_ONCE = 1 << 40  # bytes, more than there are: all files are one task


def stored(store: Store, found: Scan) -> dict[str, bytes]:
    """The bytes of all tables of a list, by name."""
    return {blob: read_blob(store, blob) for shard in found.shards for blob in (shard.refs, shard.captions)}


def hashes(store: Store, found: Scan) -> list[bytes]:
    """The hashes of each list, in the order of the hashes."""
    segments = [read_record(store, segment_path(name), Segment) for name in found.segments]
    runs = [b"".join(read_blob(store, blob) for blob in run) for segment in segments if segment for run in segment.runs]
    return sorted(b"".join(runs)[i : i + 8] for i in range(0, sum(map(len, runs)), 8))


# --- any rows, in any files -------------------------------------------------------------------------------------------


@contextmanager
def listed(
    files: dict[str, list[list[ListRow]]], task_bytes: int = 1, at_once: int = 1 << 20, most_stored: int = 1 << 20
) -> Iterator[None]:
    """Files of rows in place of lists, each as large as it has rows, read and compared few at once."""

    def parts(path: str) -> list[ListPart]:
        return [
            ListPart(f"{path} {i}", lambda rows=rows: repr(rows), lambda *_, rows=rows: iter(rows), size=len(rows))
            for i, rows in enumerate(files[path])
        ]

    with ExitStack() as stack:
        for module in (lists, source):
            stack.enter_context(mock.patch.object(module, "parts_of", parts))
        stack.enter_context(mock.patch.object(source, "unread", return_value=""))
        stack.enter_context(mock.patch.object(lists, "unread", return_value=""))
        stack.enter_context(mock.patch.object(source, "MOST_STORED", most_stored))
        stack.enter_context(mock.patch.object(passes, "TASK_BYTES", task_bytes))
        stack.enter_context(mock.patch.object(passes, "RANGE_HASHES", at_once))
        stack.enter_context(mock.patch.object(cutter, "HASHES_A_BLOB", at_once))
        yield


MANY = st.builds(  # captions of one image, which join
    lambda url, captions: [ListRow(url, (caption,)) for caption in captions],
    st.sampled_from(URLS[1:]),
    st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), min_size=12, max_size=16),
)
FILES = st.lists(st.one_of(st.lists(ROWS, max_size=7), st.just([]), MANY), min_size=1, max_size=5)


@settings(max_examples=15, phases=[Phase.generate])  # to shrink one takes minutes
@given(
    FILES,
    FILES,
    st.sets(st.sampled_from(URLS[1:]), max_size=2),
    st.integers(1, 20),
    st.integers(1, 9),
    st.sampled_from([-1, 4, 99]),
    st.data(),
)
def test_a_list_read_in_passes_is_the_list_read_at_once(
    one: list[list[ListRow]],
    two: list[list[ListRow]],
    forgotten: set[str],
    task_bytes: int,
    at_once: int,
    most_stored: int,
    data: st.DataObject,
) -> None:
    """Two lists, whole and file by file, in one task, in many and in either, behind few rows and many: also where few
    hashes are compared."""
    journal = ListJournal(forgotten=frozenset(map(reference_mark, forgotten)))
    recipe = SourceRecipe(("one", "two"), shard_rows=3)
    files = {"one": one, "two": two}
    if not all(any(row.captions for row in chain.from_iterable(rows)) for rows in files.values()):
        return
    with tempfile.TemporaryDirectory() as folder:
        here, there, mixed = (open_store(f"{folder}/{name}") for name in ("here", "there", "mixed"))
        with listed(files, AT_ONCE):
            expected = scan(recipe, here, write=True, journal=journal)
        with listed(files, task_bytes, at_once, most_stored):
            found = scan(recipe, there, write=False, journal=journal)
            assert (found.keys, found.segments) == (expected.keys, expected.segments)
            many = any(len(divided(rows, task_bytes)) > 1 for rows in files.values())
            if not many and most_stored >= 0:  # and nothing is stored
                return
            assert found.shards == expected.shards
            assert stored(there, found) == stored(here, expected)
            assert hashes(there, found) == hashes(here, expected)
            assert scan(recipe, there, write=False, journal=journal) == found  # and nothing is read again
        for count in range(1, len(two) + 1):
            grown = {"one": one, "two": two[:count]}
            if any(row.captions for row in chain.from_iterable(grown["two"])):
                with listed(grown, data.draw(st.sampled_from([AT_ONCE, task_bytes])), at_once, most_stored):
                    whole = scan(recipe, mixed, write=True, journal=journal)
        assert whole.shards == expected.shards
        assert hashes(mixed, whole) == hashes(here, expected)


@contextmanager
def last_run(found: Scan, most_rows: int = known_rows.MOST_ROWS) -> Iterator[None]:
    """A list as the one that the last run had, of whose rows so many are looked for."""

    def shards(store: Store, project: str, index: int, shard_rows: int) -> list[SourceShard]:
        return [shard for shard in found.shards if segment_of(shard.number) == index]

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(source, "shards_of_last_run", shards))
        for module in (known_rows, source):
            stack.enter_context(mock.patch.object(module, "MOST_ROWS", most_rows))
        yield


@contextmanager
def replaced(urls: set[str]) -> Iterator[None]:
    """Images of which some are other ones now."""

    def versions(_: ImageVersions, references: Sequence[str]) -> Hashes:
        return np.array([bool(url) + (url in urls) for url in references], HASH)

    with mock.patch.object(ImageVersions, "of", versions):
        yield


@st.composite
def changes(draw: st.DrawFn) -> tuple[list[list[ListRow]], list[list[ListRow]]]:
    """Files, and what becomes of them: rows are taken out and put in, and files change places."""
    images = iter(range(99))
    before = [[next(images) for _ in range(n)] for n in draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))]
    after = [[image for image in images if draw(st.integers(0, 5))] for images in before]
    for images_of_file in after:
        images_of_file += draw(st.lists(st.integers(0, 60), max_size=2))
    if draw(st.booleans()):
        after = draw(st.permutations(after))
    first, second = (
        [[ListRow(f"http://h/{i}", (f"picture {i}",)) for i in of] for of in files] for files in (before, after)
    )
    return first, second


@settings(max_examples=25, phases=[Phase.generate])
@given(
    changes(),
    st.lists(st.sets(st.integers(0, 60).map("http://h/{}".format), max_size=4), min_size=2, max_size=2),
    st.sampled_from([15, 99]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([-1, 99]),
)
def test_rows_of_the_last_run_are_found_in_passes_as_at_once(
    files: tuple[list[list[ListRow]], list[list[ListRow]]],
    changed: list[set[str]],
    most_rows: int,
    task_bytes: int,
    at_once: int,
    most_stored: int,
) -> None:
    """Also where some are forgotten, images are replaced, or there are too many to look for them."""
    before, after = files
    if not any(before) or not any(after):
        return
    forgotten, others = changed
    journal = ListJournal(forgotten=frozenset(map(reference_mark, forgotten)))
    recipe = SourceRecipe(("one",), shard_rows=3)
    with tempfile.TemporaryDirectory() as folder:
        here, there = (open_store(f"{folder}/{name}") for name in ("here", "there"))
        with listed({"one": before}, AT_ONCE), replaced(set()):
            earlier, _ = (scan(recipe, store, write=True) for store in (here, there))
        few = sum(map(len, after)) <= most_rows  # replaced images are found among few rows alone
        with last_run(earlier, most_rows), replaced(others if few else set()):
            with listed({"one": after}, AT_ONCE):
                expected = scan(recipe, here, write=True, journal=journal)
            with listed({"one": after}, task_bytes, at_once, most_stored):
                found = scan(recipe, there, write=False, journal=journal)
        assert (found.keys, found.segments) == (expected.keys, expected.segments)
        if not found.unstored:  # else all of it is one task
            assert found.shards == expected.shards
            assert stored(there, found) == stored(here, expected)
            assert hashes(there, found) == hashes(here, expected)


def divided(files: Sequence[Sequence[ListRow]], task_bytes: int) -> list[list[ListedPart]]:
    parts = [ListedPart(ListPart("", list, iter, size=len(rows)), None, "") for rows in files]
    with mock.patch.object(passes, "TASK_BYTES", task_bytes):
        return divide(parts)


def test_small_files_share_a_task_and_a_large_one_has_its_own() -> None:
    rows = [ListRow("", ())]
    found = divided([rows * n for n in (1, 1, 1, 9, 1, 2, 0, 3)], 3)
    assert [[each.part.size for each in task] for task in found] == [[1, 1, 1], [9], [1, 2], [0, 3]]
    assert divided([], 3) == []


@given(st.integers(1, BUCKETS), st.lists(st.integers(1, (1 << 64) - 1), max_size=40))
def test_ranges_hold_every_hash_once(ways: int, values: list[int]) -> None:
    found = sorted(values)
    cut = [part.tolist() for part in cut_ranges(np.array(found, HASH), ways)]
    assert list(chain.from_iterable(cut)) == found
    for (low, high), part in zip(ranges(ways), cut, strict=True):
        assert all(low <= value * BUCKETS >> 64 < high for value in part)


# --- a spool as a blob ------------------------------------------------------------------------------------------------


def test_a_spool_is_what_it_was_when_it_was_stored(folder_store: Store) -> None:
    rows = [ListRow(f"http://h/{i % 7}", (f"picture {i}", "é"), "g", "test", flaw="x" * (i % 3)) for i in range(2500)]
    with RowSpool() as spool:
        for part in (rows[:1200], [], rows[1200:]):
            spool.add(part, lambda row: row.url)
        seen = spool.hashes().tolist()
        blob = put_blob(folder_store, spool.save())
    with RowSpool.load(folder_store, blob) as spool:
        assert (spool.count, spool.hashes().tolist()) == (2500, seen)
        assert [row for row, _ in spool.judged(spool.hashes() == 0)] == rows
    Path(folder_store.url, blob_path(blob)).write_bytes(b"rot")
    with pytest.raises(CorruptObject):
        RowSpool.load(folder_store, blob)


# --- files ------------------------------------------------------------------------------------------------------------


def folder_of_files(folder: Path) -> Path:
    """Tables of several kinds, with duplicates across them, bad rows, and one without a row."""
    table(folder, "a.csv", *range(40), 3, 5)
    (folder / "b.jsonl").write_bytes(lines(*(f"http://h/{i}.png" for i in range(30, 60))) + b"{broken\n\xff\n")
    (folder / "c.csv").write_text("url,caption\n")
    (folder / "d.csv.gz").write_bytes(
        gzip.compress(b"url,caption\n" + b'http://h/7.png,"torn\nhttp://h/90.png,x\n' * 9)
    )
    table(folder, "e.csv", *range(50, 80), 0)
    return folder


def test_files_in_passes_give_the_same_bytes_and_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, (here, there) = folder_of_files(tmp_path / "lists"), (open_store(str(tmp_path / n)) for n in "ab")
    recipe = SourceRecipe((str(folder),), shard_rows=8)
    expected = scan(recipe, here, write=True)
    said = caplog.messages[:]
    assert any("cannot be read and will be left out" in line for line in said)
    caplog.clear()
    monkeypatch.setattr(passes, "TASK_BYTES", 1)
    counted = CountedStore(there)
    found = scan(recipe, counted, write=True)
    assert found == expected
    assert stored(there, found) == stored(here, expected)
    assert [line for line in caplog.messages if line in said] == said
    counted.created.clear()
    table(folder, "f.csv", 1, 100)
    table(folder, "g.csv", 100, 101)
    grown = scan(recipe, counted, write=True)
    assert grown == scan(recipe, here, write=True)
    assert sum(path.startswith("shards/source/") for path in counted.created) == 2 + 1 + 2 + 1  # and the segment


@pytest.mark.parametrize("change", ["changed", "no column", "no caption", "empty"])
def test_mistakes_are_those_of_one_task(tmp_path: Path, folder_store: Store, change: str) -> None:
    folder = table(table(tmp_path / "lists", "a.csv", *range(5)), "b.csv", 7)
    if change == "no column":
        (folder / "b.csv").write_text("link,text,title\n1,2,3\n")
    elif change != "changed":
        for name in "ab":
            (folder / f"{name}.csv").write_text("url,caption\n" + "http://h/1,\n" * (change == "no caption"))
    recipe, whole = SourceRecipe((str(folder),)), lists.PartReader.read

    def changing(self: lists.PartReader, part: ListPart) -> Iterator[ListRow]:
        yield from whole(self, part)
        if change == "changed":
            table(folder, "b.csv", *range(int(part.name.endswith("b.csv")) + 9))

    said = []
    with mock.patch.object(lists.PartReader, "read", changing):
        for task_bytes in (AT_ONCE, 1):
            table(folder, "b.csv", 7) if change == "changed" else None
            with mock.patch.object(passes, "TASK_BYTES", task_bytes), pytest.raises(UserError) as error:
                scan(recipe, folder_store, write=True)
            said.append(str(error.value))
    assert said[0] == said[1]
    assert list(folder_store.list("shards/source/segment-")) == []


@pytest.mark.parametrize("task_bytes", [AT_ONCE, 1])
def test_more_rows_than_a_segment_may_have_are_refused_before_they_are_compared(
    tmp_path: Path, folder_store: Store, monkeypatch: pytest.MonkeyPatch, task_bytes: int
) -> None:
    folder = table(table(tmp_path / "lists", "a.csv", *range(3)), "b.csv", 3, 4)
    recipe = SourceRecipe((str(folder),), shard_rows=4)
    monkeypatch.setattr(passes, "TASK_BYTES", task_bytes)
    for module in (cutter, passes, source):
        monkeypatch.setattr(module, "SEGMENT_SHARDS", 2)
    assert len(scan(recipe, folder_store, write=True).shards) == 2
    table(table(folder, "c.csv", 5), "d.csv", 6, 7, 0)
    with (
        mock.patch.object(passes.CompareReferences, "__call__", side_effect=AssertionError),
        mock.patch.object(cutter.ShardCutter, "shard", side_effect=AssertionError),
        pytest.raises(UserError, match="over 2 shards in one segment"),
    ):
        scan(recipe, folder_store, write=True)
    table(folder, "d.csv", 6, 7)
    assert len(scan(recipe, folder_store, write=True).shards) == 2


@pytest.mark.parametrize("most_rows", [22, 21])
def test_a_list_that_replaces_a_short_one_is_read_in_passes(
    tmp_path: Path,
    folder_store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    most_rows: int,
) -> None:
    """Rows of the short one stay in their shards if there are few."""
    folder = table(table(tmp_path / "lists", "a.csv", *range(8)), "b.csv", 8, 9)
    recipe = SourceRecipe((str(folder),), shard_rows=4)
    before = scan(recipe, folder_store, write=True)
    table(table(folder, "a.csv", *range(1, 8)), "c.csv", 10, 11, *range(1, 8), *range(1, 5))
    new = scan(recipe, open_store(str(tmp_path / "other")), write=True)
    said = caplog.messages[:]
    assert any("11 rows repeat the image of an earlier row" in line for line in said)
    caplog.clear()
    monkeypatch.setattr(passes, "TASK_BYTES", 1)
    with last_run(before, most_rows), mock.patch.object(source, "_read_at_once", side_effect=AssertionError):
        found = scan(recipe, folder_store, write=False)
    assert caplog.messages == said
    if most_rows == 22:
        assert [shard.ledger.rows for shard in found.shards] == [3, 4, 4, 4, 4, 3]
        assert found.shards[1] == before.shards[1]
    else:
        assert found == new


def test_few_rows_behind_many_are_read_in_passes(
    tmp_path: Path, folder_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So this process copies no hashes of the many: of a list of one file, of a file that is appended or changed."""
    folder = table(table(table(tmp_path, "own.csv", 3, 8) / "lists", "a.csv", *range(5)), "b.csv", *range(4, 8))
    recipe = SourceRecipe((str(folder), str(tmp_path / "own.csv")), shard_rows=4)
    other, at_once = open_store(str(tmp_path / "other")), source._read_at_once

    def scanned() -> Scan:
        monkeypatch.setattr(source, "MOST_STORED", 99)
        monkeypatch.setattr(source, "_read_at_once", at_once)
        expected = scan(recipe, other, write=True)
        monkeypatch.setattr(source, "MOST_STORED", 11)
        monkeypatch.setattr(source, "_read_at_once", mock.Mock(side_effect=AssertionError))
        found = scan(recipe, folder_store, write=False)
        assert found == expected
        assert hashes(folder_store, found) == hashes(other, expected)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(passes, "TASK_BYTES", 1)
        first = scanned()
    assert first.shards[-1].ledger.rejected == {"duplicate_url": 1}
    table(tmp_path, "own.csv", 8, 3, 9)
    with last_run(first):
        scanned()
    table(folder, "c.csv", 8, 0)
    assert scanned().rows == 10


def test_what_is_behind_many_rows_that_are_not_stored_is_not_read_in_passes(
    tmp_path: Path, folder_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = table(table(tmp_path / "lists", "a.csv", *range(5)), "b.csv", 4, 5)
    recipe = SourceRecipe((str(folder / "a.csv"), str(folder / "b.csv")), shard_rows=4)
    monkeypatch.setattr(source, "MOST_STORED", 4)
    planned = scan(recipe, folder_store, write=False)
    assert list(folder_store.list("")) == []
    assert planned.keys == scan(recipe, folder_store, write=True).keys
    assert planned.shards[-1].ledger.rejected == {"duplicate_url": 1}


def test_what_was_read_is_not_read_again_after_an_interruption(
    tmp_path: Path, folder_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of_files(tmp_path / "lists")
    recipe = SourceRecipe((str(folder),), shard_rows=8)
    monkeypatch.setattr(passes, "TASK_BYTES", 1)
    read: list[str] = []
    whole = lists.PartReader.read

    def stops(self: lists.PartReader, part: ListPart) -> Iterator[ListRow]:
        read.append(Path(part.name).name)
        if read.count("d.csv.gz") == 1 and part.name.endswith(".gz"):
            raise UserError("the disk is gone")
        return whole(self, part)

    monkeypatch.setattr(lists.PartReader, "read", stops)
    with pytest.raises(UserError, match="the disk is gone"):
        scan(recipe, folder_store, write=True)
    found = scan(recipe, folder_store, write=True)
    assert read == ["a.csv", "b.jsonl", "c.csv", "d.csv.gz", "d.csv.gz", "e.csv"]
    assert found == scan(recipe, open_store(str(tmp_path / "other")), write=True)


def test_a_folder_of_a_cluster_is_read_where_it_lies(
    tmp_path: Path, folder_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers on other machines would not find it; a folder on S3 they do (see below)."""
    folder = table(table(tmp_path / "lists", "a.csv", 0), "b.csv", 1)
    monkeypatch.setattr(passes, "TASK_BYTES", 1)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:1")
    workers = ListWorkers(ShardSettings(workers=2))
    assert scan(SourceRecipe((str(folder),)), folder_store, write=True, workers=workers).rows == 2


# --- on Ray -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.integration
def test_a_worker_that_is_killed_in_each_pass_leaves_the_same_bytes(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 Parquet files on S3. Every task of each of the three passes loses its worker once, before its record."""
    there = open_store(f"{s3.url}/killed-files")
    rng = np.random.default_rng(0)
    for number in range(200):
        images = rng.integers(0, 30_000, 200)  # so that most files share some with others
        urls, captions = ([form.format(image) for image in images] for form in ("http://h/{}.png", "picture {}"))
        buffer = io.BytesIO()
        pq.write_table(pa.table({"url": urls, "caption": captions}), buffer)
        there.create(f"{number:03d}.parquet", buffer.getvalue())
    recipe = SourceRecipe((f"{s3.url}/killed-files/",), shard_rows=700)
    here, killed = open_store(str(tmp_path / "here")), open_store(f"{s3.url}/killed-store")
    expected = scan(recipe, here, write=True)
    assert expected.shards[0].ledger.rejected["duplicate_url"] > 0
    monkeypatch.setattr(passes, "TASK_BYTES", 40 * max(entry.size for entry in there.list("")))
    monkeypatch.setattr(passes, "RANGE_HASHES", 15_000)
    kills = tmp_path / "kills"
    kills.mkdir()
    monkeypatch.setenv("UNCLIP_CRASH", f"shard.before_record@{kills}")
    workers = ListWorkers(ShardSettings(workers=2), RaySettings(cpus=2))
    start_ray(workers.ray)
    monkeypatch.delenv("UNCLIP_CRASH")  # the driver's
    found = scan(recipe, killed, write=False, workers=workers)
    tasks = len(divide([ListedPart(part, None, "") for part in lists.parts_of(recipe.paths[0])]))
    assert tasks > 4
    assert len(list(kills.iterdir())) == tasks + 3 + tasks
    assert found == expected
    assert stored(killed, found) == stored(here, expected)
    assert hashes(killed, found) == hashes(here, expected)
