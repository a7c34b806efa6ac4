"""Rows of a list that changes stay in the shards that they had, whatever else is taken out or put in."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.source import known_rows
from pipeline.data.source.journal import EMPTY, ListJournal, reference_mark
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.segments import SourceShard
from pipeline.data.source.stage import Scan, scan
from pipeline.graph.artifacts import read_table
from pipeline.graph.keys import flatten
from pipeline.graph.records import PlannedStage, RunRecord
from pipeline.store import Store, open_store
from pipeline.store.records import create_record
from tests.pipeline.data.bench import write_list

ROWS = 4  # a shard


class List:
    """A list in a folder of its own, as the runs of a project meet it."""

    def __init__(self, folder: Path):
        self.file, self.store, self.runs = folder / "list.csv", open_store(str(folder / "store")), 0

    def run(self, names: Sequence[str], journal: ListJournal = EMPTY, shard_rows: int = ROWS) -> Scan:
        """Plans the list with these rows, records the run, and stores it."""
        write_list(self.file, [(f"http://h/{name}.png", f"picture {name}") for name in names])
        recipe = SourceRecipe((str(self.file),), shard_rows=shard_rows)
        planned = scan(recipe, self.store, write=False, journal=journal, project="p")
        self.runs += 1
        source = PlannedStage(planned.keys["source"], 1, flatten(recipe), {})
        record = RunRecord("p", {"source": source}, 0, ("source",), tuple(planned.segments))
        create_record(self.store, f"runs/p/{self.runs:08d}-{self.runs:08x}.json", record)
        made = scan(recipe, self.store, write=True, journal=journal, project="p")
        assert made.keys == planned.keys == scan(recipe, self.store, write=False, journal=journal, project="p").keys
        return made


@contextmanager
def a_list() -> Iterator[List]:
    with tempfile.TemporaryDirectory() as folder:
        yield List(Path(folder))


def names_of(store: Store, shard: SourceShard) -> list[str]:
    urls = read_table(store, shard.refs)["url"].to_pylist()
    captions = read_table(store, shard.captions)["captions"].to_pylist()
    names = [url.removeprefix("http://h/").removesuffix(".png") for url in urls]
    assert captions == [[f"picture {name}"] if name else [] for name in names]
    return names


def shards_of(list: List, found: Scan) -> dict[int, list[str]]:
    return {shard.number: names_of(list.store, shard) for shard in found.shards}


@st.composite
def changes(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    """A list and what it becomes, change by change: at most half of it goes."""
    first = [str(i) for i in range(draw(st.integers(1, 40)))]
    rows, after, count = first, [], len(first)
    for _ in range(draw(st.integers(1, 3))):
        gone = draw(st.sets(st.sampled_from(rows), max_size=len(first) // 6)) if rows else set()
        rows = [row for row in rows if row not in gone]
        for _ in range(draw(st.integers(0, 6))):
            rows.insert(draw(st.one_of(st.integers(0, len(rows)), st.just(len(rows)))), str(count))
            count += 1
        if draw(st.integers(0, 3)) == 0:
            rows = draw(st.permutations(rows))
        rows = rows or ["last"]
        after.append(rows)
    return first, after


@given(changes())
@settings(max_examples=30, deadline=None)
def test_only_shards_that_lose_or_gain_rows_get_other_keys(found: tuple[list[str], list[list[str]]]) -> None:
    """Rows that stay keep their shard; others follow behind the last one that was there."""
    first, after = found
    with a_list() as one:
        before = one.run(first)
        assert list(shards_of(one, before).values()) == [first[i : i + ROWS] for i in range(0, len(first), ROWS)]
        for rows in after:
            then, was = shards_of(one, before), {shard.number: shard for shard in before.shards}
            made = one.run(rows)
            now = shards_of(one, made)
            assert sorted(name for names in now.values() for name in names) == sorted(rows)
            stay = {number: [name for name in names if name in rows] for number, names in then.items()}
            *_, last = [number for number, names in stay.items() if names] or [0]
            for number, names in stay.items():
                assert now.get(number, [])[: len(names)] == names
                assert number >= last or len(now.get(number, [])) == len(names)
            new = [name for name in rows if not any(name in names for names in then.values())]
            assert [name for number in sorted(now) for name in now[number][len(stay.get(number, [])) :]] == new
            for shard in made.shards:
                if now[shard.number] == then.get(shard.number):
                    assert shard == was[shard.number]
            before = made


@given(st.integers(4, 30), st.data())
@settings(max_examples=15, deadline=None)
def test_two_removals_end_as_one(count: int, data: st.DataObject) -> None:
    rows = [str(i) for i in range(count)]
    gone = data.draw(st.lists(st.sampled_from(rows), unique=True, max_size=count // 2))
    half = data.draw(st.integers(0, len(gone)))
    with a_list() as once, a_list() as twice:
        once.run(rows)
        twice.run(rows)
        twice.run([row for row in rows if row not in gone[:half]])
        left = [row for row in rows if row not in gone]
        assert once.run(left).keys == twice.run(left).keys


def test_a_list_of_which_most_is_gone_or_that_is_cut_otherwise_is_a_new_one() -> None:
    with a_list() as one:
        one.run([str(i) for i in range(12)])
        assert shards_of(one, one.run(["1", "5", "9", "10", "11"])) == {0: ["1", "5", "9", "10"], 1: ["11"]}
        one.run([str(i) for i in range(12)])
        other = shards_of(one, one.run([str(i) for i in range(1, 12)], shard_rows=5))
        assert [len(names) for names in other.values()] == [5, 5, 1]


def test_a_list_whose_rows_would_fill_the_memory_is_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where too many rows wait for others of their shards, or too many are to be compared."""
    rows = [str(i) for i in range(12)]
    mixed = [*rows[::4], *rows[1::4], *rows[2::4], *rows[3::4]]
    for name, most in (("MOST_WAITING", 8), ("MOST_ROWS", 11)):
        with a_list() as one, mock.patch.object(known_rows, name, most):
            before = one.run(rows)
            assert one.run(mixed).keys != before.keys
    with a_list() as one:
        assert one.run(rows).keys == one.run(mixed).keys


def test_rows_that_are_forgotten_keep_their_empty_places() -> None:
    rows = [str(i) for i in range(12)]
    journal = ListJournal(forgotten=frozenset(reference_mark(f"http://h/{name}.png") for name in ("5", "9")))
    with a_list() as one:
        before = one.run(rows)
        assert [shard == was for shard, was in zip(one.run(rows, journal).shards, before.shards, strict=True)] == [
            True, False, False,
        ]  # fmt: skip
        expected = {0: ["0", "1", "3"], 1: ["4", "", "6", "7"], 2: ["8", "", "10", "11"]}
        assert shards_of(one, one.run([row for row in rows if row != "2"], journal)) == expected


def test_what_was_collected_of_the_earlier_list_is_missed_in_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    rows = [str(i) for i in range(8)]
    with a_list() as one:
        before = one.run(rows)
        one.store.delete([f"blobs/{before.shards[0].refs[:2]}/{before.shards[0].refs}"])
        assert [len(names) for names in shards_of(one, one.run(rows[1:])).values()] == [4, 3]
        assert "the list is cut as a new one: of an earlier one, " in caplog.text
