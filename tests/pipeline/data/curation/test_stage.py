from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.graph.artifacts import Artifact
from pipeline.training.feed.tables import Tables
from tests.pipeline.data.bench import Bench, picture, save_clip, write_list
from tests.pipeline.data.vectors import rejected

ROWS: list[tuple[int, int, list[str], str, str | None, int | None]] = [
    # width, height, captions, split, how curation ends it, and the row of which it is a copy
    (80, 72, ["a picture"], "train", None, None),
    (80, 72, ["another picture"], "test", None, None),
    (63, 200, ["narrow and high"], "train", "too_small", None),
    (301, 100, ["wide"], "train", "bad_aspect", None),
    (300, 100, ["just not too wide"], "validation", None, None),
    (64, 64, ["small enough"], "train", None, None),
    (80, 72, [], "test", "no_caption", None),
    (80, 72, ["ab", "a longer caption"], "train", "caption_too_short", None),
    (80, 72, ["abc", "x", "y" * 101], "train", None, None),  # of several captions the first is judged
    (80, 72, ["x" * 101], "train", "caption_too_long", None),
    (80, 72, ["x" * 100], "validation", None, None),
    (80, 72, ["a copy of a held-out one"], "train", "near_held_out", 1),
    (80, 72, ["a copy"], "train", "near_duplicate", 0),
    (80, 72, ["another copy"], "train", "near_duplicate", 0),
    (80, 72, ["the last"], "train", None, None),
]
NEAR = {"near_duplicate": 0.99999, "near_held_out": 0.99999}  # random weights find all pictures alike
RECIPE = {"min_caption": 3, "max_caption": 100, **NEAR}


def key(row: int) -> str:
    return f"{row // 10:08d}{row % 10:04d}"


def made(
    folder: Path | str, paths: list[str], weights: str, curation: dict[str, Any] = RECIPE, **pinned: Artifact
) -> Bench:
    bench = Bench(Path(folder), paths, clip={"weights": weights}, curation=curation)
    bench.made |= pinned
    stages = ("source", "captions", "pairs", "clip", "embeddings", "curation")
    bench.make(*(stage for stage in stages if stage not in pinned))
    return bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("curation")
    for i, (width, height, *_, copied) in enumerate(ROWS):
        (folder / f"{i}.png").write_bytes(picture(i if copied is None else copied, width, height))
    columns = {
        "url": [*(f"file://{folder}/{i}.png" for i in range(len(ROWS))), f"file://{folder}/absent.png"],
        "caption": pa.array([*(row[2] for row in ROWS), ["lost"]], pa.list_(pa.string())),
        "split": [*(row[3] for row in ROWS), "train"],
    }
    pq.write_table(pa.table(columns), folder / "list.parquet")
    return made(folder / "store", [str(folder / "list.parquet")], save_clip(folder / "clip"))


def test_every_reason(bench: Bench) -> None:
    """Of copies the first stays, and a copy that teaches what is held out goes."""
    left = [row["key"] for row in bench.rows("curation")]
    assert left == [key(i) for i, row in enumerate(ROWS) if row[4] is None]
    ledger = bench.made["curation"].ledger
    reasons = Counter(row[4] for row in ROWS)
    assert ledger.kept == reasons.pop(None)
    assert ledger.rejected == reasons
    assert ledger.rows == bench.made["pairs"].ledger.kept
    said = {row.key: (row.reason, row.near) for row in rejected(bench.store, bench.made["curation"])}
    nears = [None if row[5] is None else key(row[5]) for row in ROWS]
    assert said == {key(i): (row[4], nears[i]) for i, row in enumerate(ROWS) if row[4]}


def test_rows_are_removed_and_nothing_about_the_others_moves(bench: Bench) -> None:
    before = {row["key"]: row for row in bench.rows("pairs")}
    after = bench.rows("curation")
    assert after == [before[row["key"]] for row in after]


def test_appended_rows_leave_the_shards_before_alone(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "new.png").write_bytes(picture(99))
    more = write_list(tmp_path / "more.csv", [(f"file://{tmp_path}/new.png", "a new picture", "train")])
    grown = made(
        bench.store.url, [*bench.config.source.paths, more], bench.config.clip.weights, clip=bench.made["clip"]
    )
    for stage in ("pairs", "embeddings", "curation"):
        assert grown.blobs(stage)[:-1] == bench.blobs(stage)
        assert grown.made[stage].times["shards_made"] == 1


def test_another_threshold_embeds_nothing_again(bench: Bench) -> None:
    other = made(bench.store.url, list(bench.config.source.paths), bench.config.clip.weights, {"min_side": 72})
    assert other.blobs("embeddings") == bench.blobs("embeddings")
    assert other.made["curation"].ledger.rejected["too_small"] == 2


def test_a_clip_that_is_trained_here_learns_from_no_row_that_is_rejected_without_one(bench: Bench) -> None:
    """In the order of the list; rows that only CLIP's embeddings rule out are known later."""
    trained = Bench(Path(bench.store.url), bench.config.source.paths, curation=RECIPE)
    assert trained.graph["clip"].inputs == ("pairs", "captions", "filter")
    assert "filter" not in bench.graph  # its CLIP exists
    trained.made = {name: bench.made[name] for name in ("source", "captions", "pairs")}
    made = trained.make("filter")
    needs_clip = {None, "near_duplicate", "near_held_out"}
    before = {row["key"]: row for row in trained.rows("pairs")}
    assert trained.rows("filter") == [before[key(i)] for i, row in enumerate(ROWS) if row[4] in needs_clip]
    assert made.ledger.rejected == Counter(row[4] for row in ROWS if row[4] not in needs_clip)
    tables = Tables(trained.store, trained.made, ("tokens",), "train", 0)
    assert [row.key for row in tables.first(100)] == [
        row["key"] for row in trained.rows("filter") if row["split"] == "train"
    ]


def test_the_flawed_rows_of_the_quick_start_end_by_as_many_reasons(bench: Bench, tmp_path: Path) -> None:
    bench = made(tmp_path, ["drawings:flawed", "drawings:flawed"], bench.config.clip.weights, {})
    fetched = ("http_4xx", "not_an_image", "truncated", "zero_bytes")
    ledgers = {stage: bench.made[stage].ledger.rejected for stage in ("source", "pairs", "curation")}
    assert ledgers["source"] == {"duplicate_url": 9}
    assert ledgers["pairs"] == {"duplicate_url": 9, **dict.fromkeys(fetched, 1)}
    assert ledgers["curation"] == dict.fromkeys(("too_small", "bad_aspect", "no_caption", "caption_too_long"), 1)
    assert bench.made["curation"].ledger.kept == 1  # the row that every other subset has too
