"""Rows tried again and rows forgotten: what moves in the source's keys, and what does not."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.source.duplicates import HASH
from pipeline.data.source.forget import Request, find
from pipeline.data.source.journal import (
    EMPTY,
    ListJournal,
    change_journal,
    journal_path,
    read_journal,
    reference_mark,
    with_forgotten,
)
from pipeline.data.source.lists import path_policy
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.retry import gather
from pipeline.data.source.rows import counted_of
from pipeline.data.source.segments import SourceShard
from pipeline.data.source.stage import scan
from pipeline.errors import UserError
from pipeline.graph.artifacts import read_table
from pipeline.ledger import Ledger
from pipeline.store import Store
from pipeline.store.records import put_blob
from tests.pipeline.data.bench import Bench, Page, Pages, picture, serving, write_list


def _recipe(tmp_path: Path, *names: str, rows: int = 10) -> SourceRecipe:
    lists = [
        write_list(tmp_path / f"{name}.csv", [(f"http://h/{name}{i}.png", f"{name} {i}") for i in range(rows)])
        for name in names
    ]
    return SourceRecipe(tuple(lists), shard_rows=4)


def test_what_is_forgotten_leaves_an_empty_place_and_moves_one_shard(tmp_path: Path, folder_store: Store) -> None:
    recipe = _recipe(tmp_path, "a", "b")
    before = scan(recipe, folder_store, write=True).shards
    journal = ListJournal(forgotten=frozenset({reference_mark(" http://h/a5.png")}))
    after = scan(recipe, folder_store, write=True, journal=journal).shards
    changed = [a.number for a, b in zip(after, before, strict=True) if a != b]
    assert changed == [1]
    assert after[1].image_key != before[1].image_key
    assert after[1].caption_key != before[1].caption_key
    assert after[1].ledger == Ledger(kept=3, rejected={"forgotten": 1})
    refs = read_table(folder_store, after[1].refs).to_pylist()
    assert [row["url"] for row in refs] == ["http://h/a4.png", "", "http://h/a6.png", "http://h/a7.png"]
    assert read_table(folder_store, after[1].captions)["captions"].to_pylist()[1] == []


def test_what_is_forgotten_goes_by_any_spelling_of_its_url(tmp_path: Path, folder_store: Store) -> None:
    listed = ["http://EXAMPLE.test/A.jpg", "http://example.test/B%c3%a9.jpg#x", "https://example.test/C.jpg"]
    recipe = SourceRecipe((write_list(tmp_path / "a.csv", [(url, "a picture") for url in listed]),))
    named = ["https://example.test:443/A.jpg", "http://example.test/Bé.jpg"]  # as a browser shows them
    found = find(folder_store, scan(recipe, folder_store, write=True).shards, None, Request.read(named))
    assert (found.rows, found.unseen) == (2, [])
    journal = ListJournal(forgotten=frozenset(found.marks))
    (shard,) = scan(recipe, folder_store, write=True, journal=journal).shards
    assert [row["url"] for row in read_table(folder_store, shard.refs).to_pylist()] == ["", "", listed[2]]


def test_rows_tried_again_move_the_references_of_their_shards_alone(tmp_path: Path, folder_store: Store) -> None:
    """Each time once more; the list has no more rows, and other lists that name the same images count it, too."""
    recipe = _recipe(tmp_path, "a", "b")
    plain = scan(recipe, folder_store, write=True)
    marks = sorted(int(reference_mark(f"http://h/a{i}.png")[:16], 16) for i in (5, 6))
    blob = put_blob(folder_store, np.array(marks, HASH).tobytes())
    keys = {shard.image_key for shard in plain.shards}
    for times in (1, 2):
        again = scan(recipe, folder_store, write=True, journal=ListJournal(retries=(blob,) * times))
        assert again.shards[0] == plain.shards[0]
        assert again.shards[2:] == plain.shards[2:]
        assert again.shards[1].image_key not in keys
        assert again.shards[1].caption_key == plain.shards[1].caption_key
        assert again.shards[1].ledger == plain.shards[1].ledger
        said = counted_of(read_table(folder_store, again.shards[1].refs))
        assert said == ["", *[f"try {times + 1}"] * 2, ""]
        keys.add(again.shards[1].image_key)
    assert scan(recipe, folder_store, write=True) == plain


def test_what_is_forgotten_stays_so_wherever_it_was_cut_before(tmp_path: Path, folder_store: Store) -> None:
    """While its list is out of the configuration, and for a project that has forgotten nothing. Other lists stay."""
    journal = ListJournal(forgotten=frozenset({reference_mark("http://h/b2.png")}))
    first, grown = _recipe(tmp_path, "a"), _recipe(tmp_path, "a", "b")
    before = scan(grown, folder_store, write=True)
    assert scan(first, folder_store, write=True, journal=journal).shards == scan(first, folder_store, write=True).shards
    again = scan(grown, folder_store, write=True, journal=journal)
    assert again != before
    assert sum(shard.ledger.rejected.get("forgotten", 0) for shard in again.shards) == 1
    assert scan(grown, folder_store, write=True) == before


@given(st.lists(st.sampled_from("abc"), max_size=6), st.randoms())
def test_the_order_of_forgetting_does_not_matter(marks: list[str], random: Random) -> None:
    once = with_forgotten(EMPTY, marks)
    one_by_one = EMPTY
    for mark in random.sample(marks, len(marks)):
        one_by_one = with_forgotten(one_by_one, [mark])
    assert once.forgotten == one_by_one.forgotten == set(marks)
    assert once.forgettings == bool(marks) <= one_by_one.forgettings
    assert with_forgotten(once, marks) == once


def test_entries_of_many_writers_are_all_kept(folder_store: Store) -> None:
    def write(i: int) -> None:
        change_journal(folder_store, "p", lambda j: replace(j, retries=(*j.retries, f"{i:064x}")))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(8)))
    assert sorted(read_journal(folder_store, "p").retries) == [f"{i:064x}" for i in range(8)]
    assert read_journal(folder_store, "another") == EMPTY


def _fetch(folder: Path, paths: list[str], pages: Mapping[str, Page]) -> Bench:
    with serving(pages) as address:
        pairs = {"workers": 0, "hosts": {"h": address}, "retries": 0}
        bench = Bench(folder, paths, source={"shard_rows": 4}, run={"pairs": pairs})
        bench.record()
        bench.make("source", "captions", "pairs")
    return bench


def _listed(bench: Bench) -> list[SourceShard]:
    journal = read_journal(bench.store, bench.config.project)
    return scan(bench.config.source, bench.store, write=False, journal=journal, project="bench").shards


def _try_again(bench: Bench, reason: str) -> int:
    reaches = [path_policy(bench.config.source, path) for path in bench.config.source.paths]
    blob, rows = gather(bench.store, _listed(bench), bench.made["pairs"], frozenset({reason}), reaches)
    if blob is not None:
        change_journal(bench.store, bench.config.project, lambda j: replace(j, retries=(*j.retries, blob)))
    return rows


def test_failed_rows_are_fetched_again_in_their_places(tmp_path: Path) -> None:
    """Nothing else is fetched, and nothing is counted twice."""
    paths = [write_list(tmp_path / "a.csv", [(f"http://h/{i}.png", f"picture {i}", "train") for i in range(10)])]
    good = {f"/{i}.png": Page(picture(i)) for i in range(10)}
    busy = {f"/{i}.png": Page(status=503) for i in (1, 6, 7)}
    first = _fetch(tmp_path / "store", paths, good | busy | {"/2.png": Page(status=404)})
    assert first.made["pairs"].ledger == Ledger(kept=6, rejected={"http_4xx": 1}, deferred={"http_5xx": 3})
    assert _try_again(first, "timeout") == 0
    assert _try_again(first, "http_5xx") == 3

    pages = Pages({"/1.png": good["/1.png"], "/6.png": busy["/6.png"]})
    second = _fetch(tmp_path / "store", paths, pages)
    assert {path for path in pages.asked if path != "/robots.txt"} == {"/1.png", "/6.png", "/7.png"}
    assert second.made["pairs"].ledger == Ledger(kept=7, rejected={"http_4xx": 2}, deferred={"http_5xx": 1})
    assert second.made["captions"].key == first.made["captions"].key
    assert second.blobs("pairs")[2] == first.blobs("pairs")[2]
    ends = {row["url"][-5]: row["reason"] for row in second.rows("pairs") if row["reason"]}
    assert ends == {"2": "http_4xx", "6": "http_5xx", "7": "http_4xx"}

    assert _try_again(second, "http_5xx") == 1
    pages = Pages(good)
    third = _fetch(tmp_path / "store", paths, pages)
    assert {path for path in pages.asked if path != "/robots.txt"} == {"/6.png"}
    assert third.made["pairs"].ledger == Ledger(kept=8, rejected={"http_4xx": 2})
    assert _try_again(third, "http_5xx") == 0
    assert [row["key"] for row in third.rows("pairs")] == [row["key"] for row in first.rows("pairs")]


def test_a_row_that_is_tried_again_keeps_its_split_and_group(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = (f"http://h/{i}.png,c,g{i % 8},{'train' if i % 8 > 3 else ''}\n" for i in range(16))
    path.write_text("url,caption,group,split\n" + "".join(rows))
    bench = _fetch(tmp_path / "store", [str(path)], {})
    columns = ["url", "group", "split"]
    before = [read_table(bench.store, shard.refs, columns) for shard in _listed(bench)]
    assert _try_again(bench, "http_4xx") == 16
    again = scan(bench.config.source, bench.store, write=True, journal=read_journal(bench.store, "bench"))
    assert [read_table(bench.store, shard.refs, columns) for shard in again.shards] == before


def test_rows_are_found_by_key_by_reference_and_by_hash(tmp_path: Path) -> None:
    rows = [(f"http://h/{i}.png", f"picture {i}") for i in range(10)]
    paths = [write_list(tmp_path / "a.csv", rows), write_list(tmp_path / "b.csv", [("http://h/x.png", "the same")])]
    pages = {f"/{i}.png": Page(picture(i)) for i in range(10)} | {"/x.png": Page(picture(3))}
    bench = _fetch(tmp_path / "store", paths, pages)
    sha256 = next(row["sha256"] for row in bench.rows("pairs") if row["url"].endswith("/3.png"))

    def found(*words: str) -> tuple[set[str], int]:
        found = find(bench.store, _listed(bench), bench.made["pairs"], Request.read(words))
        return found.marks, found.rows

    def marks(*names: str) -> set[str]:
        return {reference_mark(f"http://h/{name}.png") for name in names}

    assert found("000000010001") == (marks("5"), 1)
    assert found("http://h/5.png", "", "# a comment") == (marks("5"), 1)
    assert found(sha256.upper()) == (marks("3", "x"), 2)
    assert found("http://h/9.png", "http://h/none.png") == (marks("9", "none"), 1)
    told = find(bench.store, _listed(bench), None, Request.read(["000000010001", "http://h/none.png"]))
    assert (told.named, told.unseen) == ([("000000010001", "http://h/5.png")], ["http://h/none.png"])
    with pytest.raises(UserError, match="000000010009: no row"):
        found("000000010009")
    with pytest.raises(UserError, match="no stored image"):
        found("0" * 64)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"forgotten_at": 0.0}', b'{"forgotten": [["mark", [0]]]}'])
def test_a_journal_of_another_version_is_one_line(folder_store: Store, text: bytes) -> None:
    assert folder_store.swap(journal_path("p"), None, text)
    with pytest.raises(UserError, match="name another store"):
        read_journal(folder_store, "p")
