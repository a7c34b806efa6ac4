from collections import Counter
from pathlib import Path

import pytest

from tests.pipeline.data.bench import Bench, picture, save_clip, write_list, write_listed
from tests.pipeline.data.vectors import rejected

ROWS = [  # width, height, caption, split, and how curation ends it
    (80, 72, "a picture", "train", None),
    (80, 72, "another picture", "test", None),
    (63, 200, "narrow and high", "train", "too_small"),
    (301, 100, "wide", "train", "bad_aspect"),
    (300, 100, "just not too wide", "validation", None),
    (64, 64, "small enough", "train", None),
    (80, 72, "", "test", "no_caption"),
    (80, 72, "ab", "train", "caption_too_short"),
    (80, 72, "abc", "train", None),
    (80, 72, "x" * 101, "train", "caption_too_long"),
    (80, 72, "x" * 100, "validation", None),
    (80, 72, "the last", "train", None),
]
RECIPE = {"min_caption": 3, "max_caption": 100}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("curation")
    for i, (width, height, *_) in enumerate(ROWS):
        (folder / f"{i}.png").write_bytes(picture(i, width, height))
    rows = [(f"file://{folder}/{i}.png", row[2], row[3]) for i, row in enumerate(ROWS)]
    rows.append((f"file://{folder}/absent.png", "lost", "train"))
    path = write_list(folder / "list.csv", rows)
    bench = Bench(folder / "store", [path], clip={"weights": save_clip(folder / "clip")}, curation=RECIPE)
    bench.make("source", "captions", "pairs", "clip", "embeddings", "curation")
    return bench


def test_every_reason(bench: Bench) -> None:
    left = [row["url"].rpartition("/")[2] for row in bench.rows("curation")]
    assert left == [f"{i}.png" for i, row in enumerate(ROWS) if row[4] is None]
    ledger = bench.made["curation"].ledger
    reasons = Counter(row[4] for row in ROWS)
    assert ledger.kept == reasons.pop(None)
    assert ledger.rejected == reasons
    assert ledger.rows == bench.made["pairs"].ledger.kept
    said = rejected(bench.store, bench.made["curation"])
    names = {row["key"]: int(row["url"].rpartition("/")[2][:-4]) for row in bench.rows("pairs") if row["width"]}
    assert {names[row.key]: row.reason for row in said} == {i: row[4] for i, row in enumerate(ROWS) if row[4]}
    assert {row.near for row in said} == {None}


def test_rows_are_removed_and_nothing_about_the_others_moves(bench: Bench) -> None:
    before = {row["key"]: row for row in bench.rows("pairs")}
    after = bench.rows("curation")
    assert after == [before[row["key"]] for row in after]
    assert [row["key"] for row in after] == sorted(row["key"] for row in after)


def test_appended_rows_leave_the_shards_before_alone(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "new.png").write_bytes(picture(99))
    more = write_list(tmp_path / "more.csv", [(f"file://{tmp_path}/new.png", "a new picture", "train")])
    weights = bench.config.clip.weights
    paths = [*bench.config.source.paths, more]
    grown = Bench(Path(bench.store.url), paths, clip={"weights": weights}, curation=RECIPE)
    grown.made["clip"] = bench.made["clip"]  # as its pin has it
    grown.make("source", "captions", "pairs", "embeddings", "curation")
    for stage in ("pairs", "embeddings", "curation"):
        assert grown.blobs(stage)[:-1] == bench.blobs(stage)
        assert grown.made[stage].times["shards_made"] == 1


def test_of_several_captions_the_first_is_judged(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, captions in {"0": "ab\n\na longer caption", "1": f"abc\n\nx\n\n{'y' * 101}"}.items():
        (images / f"{name}.png").write_bytes(picture(int(name)))
        (images / f"{name}.txt").write_text(captions)
    bench = Bench(tmp_path / "store", [str(images)], clip={"weights": save_clip(tmp_path / "clip")}, curation=RECIPE)
    curated = bench.make("source", "captions", "pairs", "clip", "embeddings", "curation")
    assert (curated.ledger.kept, curated.ledger.rejected) == (1, {"caption_too_short": 1})


def test_another_threshold_embeds_nothing_again(bench: Bench) -> None:
    weights = bench.config.clip.weights
    other = Bench(
        Path(bench.store.url), bench.config.source.paths, clip={"weights": weights}, curation={"min_side": 72}
    )
    other.make("source", "captions", "pairs", "clip", "embeddings", "curation")
    assert other.blobs("embeddings") == bench.blobs("embeddings")
    assert other.made["curation"].ledger.rejected["too_small"] == 2


def test_the_flawed_rows_of_the_quick_start_end_by_as_many_reasons(tmp_path: Path) -> None:
    bench = Bench(
        tmp_path / "store", ["drawings:flawed", "drawings:flawed"], clip={"weights": save_clip(tmp_path / "clip")}
    )
    bench.make("source", "captions", "pairs", "clip", "embeddings", "curation")
    fetched = ("http_4xx", "not_an_image", "truncated", "zero_bytes")
    ledgers = {stage: bench.made[stage].ledger.rejected for stage in ("source", "pairs", "curation")}
    assert ledgers["source"] == {"duplicate_url": 9}
    assert ledgers["pairs"] == {"duplicate_url": 9, **dict.fromkeys(fetched, 1)}
    assert ledgers["curation"] == dict.fromkeys(("too_small", "bad_aspect", "no_caption", "caption_too_long"), 1)
    assert bench.made["curation"].ledger.kept == 1  # the row that every other subset has too


def test_copies_of_a_picture_are_found_in_the_list_that_has_them(tmp_path: Path) -> None:
    """The first of them stays, and a copy that teaches what is held out goes."""
    pictures = [picture(i) for i in range(12)]
    copies = {12: 3, 13: 5, 14: 3}  # place in the list: what it is a copy of
    images = [pictures[copies.get(i, i)] for i in range(15)]
    bench = Bench(
        tmp_path / "store",
        [write_listed(tmp_path, images, ["train"] * 13 + ["test"])],
        clip={"weights": save_clip(tmp_path / "clip")},
        curation={"near_duplicate": 0.99999, "near_held_out": 0.99999},  # random weights find all pictures alike
    )
    bench.make("source", "captions", "pairs", "clip", "embeddings", "curation")
    found = [(row.key, row.reason, row.near) for row in rejected(bench.store, bench.made["curation"])]
    assert found == [
        ("000000000005", "near_held_out", "000000010003"),
        ("000000010002", "near_duplicate", "000000000003"),
        ("000000010004", "near_duplicate", "000000000003"),
    ]
