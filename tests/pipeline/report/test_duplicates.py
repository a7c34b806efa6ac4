"""Tests groups of images that are too alike against another library, and how the largest of them are shown."""

import re
from dataclasses import replace

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.curation.rejected import Rejected
from pipeline.graph.artifacts import Artifact, Shard, read_shards, write_shard_table
from pipeline.ledger import Ledger
from pipeline.report.data import data_section
from pipeline.report.duplicates import GROUPS_SHOWN, duplicates, group
from pipeline.report.images import Album
from pipeline.report.inputs import ReportInput
from pipeline.store import FolderStore
from tests.pipeline.report.made_up import SHARDS, alike, culled


@pytest.fixture(scope="module")
def found(store: FolderStore, made: dict[str, Artifact]) -> dict[str, Artifact]:
    """The chain without the rows whose images are alike."""
    return culled(store, made, alike(store, made))


def rows_shown(page: str) -> list[list[tuple[str, str]]]:
    """Returns of each group what became of its rows, and their captions."""
    groups = page.partition("<summary>Too alike")[2].partition("</details>")[0].split('<div class="thumbs">')[1:]
    return [re.findall(r"<figcaption>(\S+) <bdi>(.*?)</bdi>", found) for found in groups]


# Each row may be near to one before it in an order in which the keys are not: a held-out row may come later.
forests = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.permutations(range(n)), st.fixed_dictionaries({i: st.none() | st.integers(0, i - 1) for i in range(1, n)})
    )
)


@given(forests)
def test_groups_are_the_trees_of_what_is_near(forest: tuple[list[int], dict[int, int | None]]) -> None:
    keys, near = forest
    edges = [(f"{keys[i]:012d}", f"{keys[j]:012d}") for i, j in near.items() if j is not None]
    graph = networkx.DiGraph(edges)
    expected = {}
    for tree in networkx.weakly_connected_components(graph):
        [root] = [key for key in tree if graph.out_degree(key) == 0]
        expected[root] = sorted(tree - {root})
    assert group(Rejected(key, "near_duplicate", cause) for key, cause in edges) == expected
    circle = [Rejected("a", "near_duplicate", "b"), Rejected("b", "near_duplicate", "a"), Rejected("c", "low_score")]
    assert sum(map(len, group(circle).values())) == 2  # of a damaged table


def test_the_largest_groups_are_shown_with_the_row_that_stays_first(
    store: FolderStore, made: dict[str, Artifact], found: dict[str, Artifact]
) -> None:
    lost = alike(store, made)
    page = data_section(ReportInput(store, found))
    groups = rows_shown(page)
    sizes = sorted((len(keys) + 1 for keys in group(lost).values()), reverse=True)
    assert [len(rows) for rows in groups] == sizes[:GROUPS_SHOWN]
    for (first, caption), *others in groups:
        assert first == "<b>stays</b>"
        assert {name for name, _ in others} == {"near_duplicate"}
        assert {said for _, said in others} == {caption}  # equal images have equal captions here
    assert f"those that lost most to curation: {len(sizes)} groups." in page
    assert "cannot be shown" not in page


def test_a_large_group_is_cut_and_its_first_row_may_be_gone_itself(
    store: FolderStore, made: dict[str, Artifact]
) -> None:
    [zero, one, *_] = read_shards(store, made["curation"])
    first, *others = [f"{zero.number:08d}{place:04d}" for place in (0, 1, 2, 4, 5, 6, 7, 8)]
    held_out = f"{one.number:08d}0000"
    lost = [Rejected(key, "near_duplicate", first) for key in others] + [Rejected(first, "near_held_out", held_out)]
    page = duplicates(ReportInput(store, culled(store, made, lost)))
    assert f"Row {held_out} and 8 that are too near to it; 6 of them are shown." in page
    [rows] = rows_shown(page)
    assert [fate for fate, _ in rows] == ["<b>stays</b>", "near_held_out", *["near_duplicate"] * 4]


def test_images_without_a_licence_or_room_are_left_out(
    store: FolderStore, made: dict[str, Artifact], found: dict[str, Artifact]
) -> None:
    whole = Album(1 << 20, {"CC-BY-4.0"})
    page = duplicates(ReportInput(store, found, whole))
    assert page == duplicates(ReportInput(store, found))
    less = duplicates(ReportInput(store, found, Album((1 << 20) - whole.left - 1)))
    assert less.count("<img") == page.count("<img") - 1
    assert less.count("the report has reached its size limit") == 1
    none = duplicates(ReportInput(store, found, Album(1 << 20, {"CC0-1.0"})))
    assert "<img" not in none
    assert "<bdi>" not in none
    assert "None of the largest has two images that may be shown." in none
    assert duplicates(ReportInput(store, made)) == ""  # nothing is too alike


def test_of_many_shards_those_that_lost_most_are_opened(store: FolderStore, found: dict[str, Artifact]) -> None:
    many = {}
    for stage in ("pairs", "captions", "curation"):
        rows = read_shards(store, found[stage])
        # All but the first name blobs that are not there.
        shards = [
            Shard(i, f"{stage}{i}", Ledger(rows[i % SHARDS].kept, {"near_duplicate": 9 if i < SHARDS else 1}), blobs)
            for i in range(200)
            for blobs in [rows[i].blobs if i < SHARDS else {"index": "0" * 64, "rejected": "0" * 64}]
        ]
        table, ledger = write_shard_table(store, shards)
        many[stage] = replace(found[stage], shard_table=table, ledger=ledger)
    assert duplicates(ReportInput(store, many)) == duplicates(ReportInput(store, found))
