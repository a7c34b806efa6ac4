"""Duplicate references: the verdicts of a plain set, in bounded memory, and without reading lists again."""

import csv
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.fetch.references import comparable
from pipeline.data.source import duplicates
from pipeline.data.source import stage as source
from pipeline.data.source.duplicates import SeenReferences, hashes_of
from pipeline.data.source.journal import ListJournal, reference_mark
from pipeline.data.source.lists import PartReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import ListPart, ListRow
from pipeline.data.source.stage import Scan, scan
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import read_table
from pipeline.store import Store, open_store
from pipeline.store.records import blob_path
from pipeline.upkeep.check import repair_store
from tests.pipeline.data.bench import write_list

LISTS = st.lists(st.lists(st.sampled_from(["", *(f"http://h/{i}" for i in range(12))]), max_size=20), max_size=5)


def plainly(lists: list[list[str]]) -> list[list[bool]]:
    """Whether an earlier row has a row's reference, by a set."""
    seen: set[str] = set()
    verdicts: list[Any] = []
    for references in lists:
        verdicts.append([])
        for reference in references:
            verdicts[-1].append(reference in seen)
            seen |= {reference} - {""}
    return verdicts


@given(LISTS, st.integers(1, 8), st.integers(1, 8))
def test_verdicts_are_those_of_a_set(lists: list[list[str]], at_once: int, looked_at: int) -> None:
    """However few hashes are compared at once."""
    found, fresh = [], []
    with (
        mock.patch.object(duplicates, "AT_ONCE", at_once),
        mock.patch.object(duplicates, "LOOKED_AT", looked_at),
        SeenReferences() as seen,
    ):
        for references in lists:
            judged = seen.judge(hashes_of(references))
            assert sorted(judged.fresh) == list(judged.fresh)
            found.append(judged.duplicate.tolist())
            fresh += judged.fresh.tolist()
    assert found == plainly(lists)
    distinct = {reference for references in lists for reference in references} - {""}
    assert sorted(fresh) == sorted(hashes_of(distinct))


# --- in a list --------------------------------------------------------------------------------------------------------


def _write(folder: Path, lists: list[list[str]]) -> list[str]:
    return [
        write_list(folder / f"{i}.csv", [(url, f"row {j}") for j, url in enumerate(urls)])
        for i, urls in enumerate(lists)
    ]


def _rejects(store: Store, found: Scan) -> list[str | None]:
    return [reject for shard in found.shards for reject in read_table(store, shard.refs)["reject"].to_pylist()]


def _by_a_set(lists: list[list[str]], forgotten: set[str]) -> list[str | None]:
    return [
        "forgotten" if url in forgotten else "no_reference" if not url else "duplicate_url" if again else None
        for urls, verdicts in zip(lists, plainly(lists), strict=True)
        for url, again in zip(urls, verdicts, strict=True)
    ]


def _apart(urls: list[str]) -> list[str]:
    """Leaves out what an equal row stands before: such rows are merged."""
    return [url for i, url in enumerate(urls) if not i or not url or url != urls[i - 1]]


def _plain_rows(_: PartReader, part: ListPart) -> Iterator[ListRow]:
    """The rows of such a list, read here: a child process for each would take most of the time."""
    with open(part.name, newline="") as file:
        yield from (ListRow(row["url"], (row["caption"],)) for row in csv.DictReader(file))


@mock.patch.object(PartReader, "read", _plain_rows)
@settings(max_examples=15)
@given(
    LISTS.map(lambda lists: [_apart(urls) for urls in lists if urls]).filter(bool),
    st.sets(st.integers(0, 11), max_size=2),
)
def test_lists_at_once_or_one_by_one_are_cut_as_by_a_set(lists: list[list[str]], forgotten: set[int]) -> None:
    urls = {f"http://h/{i}" for i in forgotten}
    journal = ListJournal(forgotten=frozenset(map(reference_mark, urls)))
    with tempfile.TemporaryDirectory() as folder:
        paths = _write(Path(folder), lists)
        recipe = SourceRecipe(tuple(paths), shard_rows=3)
        once, one_by_one = open_store(f"{folder}/once"), open_store(f"{folder}/one")
        expected = scan(recipe, once, write=True, journal=journal)
        rejects = _rejects(once, expected)
        assert rejects == _by_a_set(lists, urls)
        counted = sum((Counter(shard.ledger.rejected) for shard in expected.shards), Counter[str]())
        assert counted == Counter(reject for reject in rejects if reject)
        before: list[source.SourceShard] = []
        for i in range(len(paths)):
            grown = replace(recipe, paths=tuple(paths[: i + 1]))
            planned = scan(grown, one_by_one, write=False, journal=journal)
            found = scan(grown, one_by_one, write=True, journal=journal)
            assert planned.keys == found.keys
            assert found.shards[: len(before)] == before
            before = found.shards
        assert before == expected.shards


@pytest.fixture
def appended(tmp_path: Path) -> tuple[Store, SourceRecipe, SourceRecipe]:
    """A store with two lists, their recipe, and one with a third."""
    lists = [[f"http://h/{i}" for i in range(start, start + 9)] for start in (0, 5, 10)]
    *stored, new = _write(tmp_path, lists)
    recipe = SourceRecipe(tuple(stored), shard_rows=4)
    store = open_store(str(tmp_path / "store"))
    scan(recipe, store, write=True)
    return store, recipe, replace(recipe, paths=(*stored, new))


def _spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read from now on: lists by path, blobs by name."""
    read: list[str] = []
    blob, rows = source.read_blob, PartReader.read
    monkeypatch.setattr(PartReader, "read", lambda self, part: read.append(part.name) or rows(self, part))
    monkeypatch.setattr(source, "read_blob", lambda store, name: read.append(name) or blob(store, name))
    return read


def _hashes(store: Store) -> set[str]:
    records = [source.read_record(store, entry.path, source.Segment) for entry in store.list("shards/source/segment-")]
    return {name for record in records if record for name in record.hashes}


def test_without_news_neither_lists_nor_hashes_are_read(
    appended: tuple[Store, SourceRecipe, SourceRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, recipe, longer = appended
    stored = _hashes(store)
    read = _spied(monkeypatch)
    scan(recipe, store, write=False)
    assert read == []
    found = scan(longer, store, write=False)
    assert set(read) == stored | {longer.paths[2]}
    assert found.shards[-3].ledger.rejected == {"duplicate_url": 4}


def test_hashes_that_are_set_aside_are_made_again(
    appended: tuple[Store, SourceRecipe, SourceRecipe], tmp_path: Path
) -> None:
    store, _, longer = appended
    expected = scan(longer, open_store(str(tmp_path / "other")), write=True).keys
    stored = sorted(_hashes(store))
    Path(store.url, blob_path(stored[0])).write_bytes(b"other bytes")
    Path(store.url, blob_path(stored[1])).unlink()
    for _ in range(2):
        with pytest.raises(CorruptObject) as damage:
            scan(longer, store, write=True)
        assert damage.value.path in map(blob_path, stored[:2])
        repair_store(store, "p", 0, [damage.value.path])
    assert scan(longer, store, write=True).keys == expected
    assert _hashes(store) > set(stored)
    assert scan(longer, store, write=False).keys == expected


def test_what_is_forgotten_leaves_no_hash(appended: tuple[Store, SourceRecipe, SourceRecipe]) -> None:
    store, recipe, _ = appended
    before = {entry.path for entry in store.list("")}
    journal = ListJournal(forgotten=frozenset({reference_mark("http://h/7")}))
    scan(recipe, store, write=True, journal=journal)
    for url, there in (("http://h/7", False), ("http://h/8", True)):
        new = [store.read(entry.path) for entry in store.list("blobs/") if entry.path not in before]
        assert any(hashes_of([comparable(url)]).tobytes() in data for data in new) == there


def test_another_spelling_of_a_url_is_a_duplicate(tmp_path: Path) -> None:
    urls = ["http://h.test/a.png", "https://H.test:443/x/../a.png#2", "http://h.test/A.png", "http://h.test/a%2epng"]
    found = scan(SourceRecipe(tuple(_write(tmp_path, [urls]))), open_store(str(tmp_path / "store")), write=True)
    store = open_store(str(tmp_path / "store"))
    assert _rejects(store, found) == [None, "duplicate_url", None, "duplicate_url"]


def test_captions_of_a_shuffled_list_join_the_first_row_of_their_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As COCO's annotations stand: five captions an image, in any order. References are cut as before."""
    rows = [(f"http://h/{i}.jpg", f"caption {j} of {i}") for j in range(5) for i in range(20)]
    path = write_list(tmp_path / "a.csv", [*rows, ("https://h/7.jpg", "of another spelling")])
    store = open_store(str(tmp_path / "store"))
    (shard,) = scan(SourceRecipe((path,)), store, write=True).shards
    assert (shard.ledger.kept, shard.ledger.rejected) == (20, {"duplicate_url": 81})
    captions = read_table(store, shard.captions)["captions"].to_pylist()
    assert captions[3] == [f"caption {j} of 3" for j in range(5)]
    assert captions[7] == [*(f"caption {j} of 7" for j in range(5)), "of another spelling"]
    assert captions[27] == ["caption 1 of 7"]  # as the list has it; the row is rejected
    assert "left out" not in caplog.text
    monkeypatch.setattr(duplicates, "MOST_LATER", 500)
    other = open_store(str(tmp_path / "other"))
    (shard,) = scan(SourceRecipe((path,)), other, write=True).shards
    assert len(read_table(other, shard.captions)["captions"].to_pylist()[19]) == 2
    assert "rows repeat the image of an earlier row, so their captions are left out" in caplog.text


def test_captions_of_few_duplicates_stay_out_so_that_appending_changes_no_shard(tmp_path: Path) -> None:
    rows = [(f"http://h/{i}.jpg", f"picture {i}") for i in range(300)]
    keys = []
    for more in ((), (("http://h/3.jpg", "another"),)):
        path = write_list(tmp_path / "a.csv", [*rows, *more])
        shards = scan(SourceRecipe((path,), shard_rows=100), open_store(str(tmp_path / "store")), write=False).shards
        keys.append([shard.caption_key for shard in shards[:3]])
    assert keys[0] == keys[1]
