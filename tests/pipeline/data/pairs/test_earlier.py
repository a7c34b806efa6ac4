"""A shard that changed in part asks nobody for what an earlier run has."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.pairs.row_index import read_opt_outs
from pipeline.graph.artifacts import read_shards
from pipeline.ledger import Ledger
from pipeline.store.records import blob_path
from tests.pipeline.data.bench import Bench, Page, Pages, picture, serving, write_list, write_tar

GOOD = {f"/{i}.png": Page(picture(i)) for i in range(9)}
OPTED_OUT = {"/2.png": Page(picture(2), headers={"X-Robots-Tag": "noai"})}


def _run(folder: Path, paths: list[str], pages: Mapping[str, Page], **pairs: Any) -> Bench:
    with serving(pages) as address:
        settings = {"workers": 0, "hosts": {"h": address}, "retries": 0}
        bench = Bench(folder, paths, source={"shard_rows": 4}, run={"pairs": settings}, pairs=pairs)
        bench.record()
        bench.make("source", "captions", "pairs")
    return bench


def _list(folder: Path, *names: int | str) -> list[str]:
    return [write_list(folder / "a.csv", [(f"http://h/{name}.png", f"picture {name}", "train") for name in names])]


def test_rows_that_were_added_are_the_only_ones_asked_for(tmp_path: Path) -> None:
    first = _run(tmp_path / "a", _list(tmp_path, 0, 1, 2, 3, 4, "missing"), GOOD | OPTED_OUT)
    assert first.made["pairs"].ledger == Ledger(kept=4, rejected={"http_4xx": 1, "opted_out": 1})
    paths = _list(tmp_path, 0, 1, 2, 3, 4, "missing", 5)
    grown = _run(tmp_path / "a", paths, {"/5.png": GOOD["/5.png"]})
    fresh = _run(tmp_path / "b", paths, GOOD | OPTED_OUT)
    assert grown.rows("pairs") == fresh.rows("pairs")
    assert grown.blobs("pairs") == fresh.blobs("pairs")


def test_rows_that_moved_within_their_shard_are_not_asked_for(tmp_path: Path) -> None:
    first = _run(tmp_path / "a", _list(tmp_path, 0, 1, 2, 3), GOOD | OPTED_OUT)
    assert _run(tmp_path / "a", _list(tmp_path, 1, 0, 2, 3), {}).rows("pairs") == first.rows("pairs")
    shorter = _run(tmp_path / "a", _list(tmp_path, 1, 2, 3), {})
    assert [(row["url"], row["reason"]) for row in shorter.rows("pairs")] == [
        ("http://h/1.png", None), ("http://h/2.png", "opted_out"), ("http://h/3.png", None),
    ]  # fmt: skip
    (evidence,) = read_opt_outs(shorter.store, read_shards(shorter.store, shorter.made["pairs"]))
    assert (evidence["key"], evidence["evidence"]) == ("000000000001", "X-Robots-Tag: noai at http://h/2.png")


def test_a_row_that_has_another_hash_is_asked_for(tmp_path: Path) -> None:
    _run(tmp_path / "a", _list(tmp_path, 0, 1, 2, 3), GOOD | OPTED_OUT)
    rows = [(f"http://h/{i}.png", f"picture {i}", "train", "0" * 64 if i == 3 else "") for i in range(4)]
    hashed = _run(tmp_path / "a", [write_list(tmp_path / "a.csv", rows)], {"/3.png": GOOD["/3.png"]})
    assert [row["reason"] for row in hashed.rows("pairs")] == [None, None, "opted_out", "hash_mismatch"]


def test_what_is_allowed_later_is_asked_for_in_its_place(tmp_path: Path) -> None:
    with serving({"/8.png": GOOD["/8.png"]}) as private:
        urls = ("http://h/0.png", "http://h/1.png", f"http://{private}/8.png")
        paths = [write_list(tmp_path / "a.csv", [(url, "a picture", "train") for url in urls])]
        first = _run(tmp_path / "a", paths, GOOD)
        assert first.made["pairs"].ledger == Ledger(kept=2, rejected={"forbidden_address": 1})
        allowed = _run(tmp_path / "a", paths, {}, allow=["127.0.0.0/8"])  # nobody else is asked again
    assert allowed.made["pairs"].ledger == Ledger(kept=3)
    assert allowed.made["pairs"].key != first.made["pairs"].key


def test_a_denied_member_of_a_tar_keeps_its_evidence(tmp_path: Path) -> None:
    (tmp_path / "deny").write_text(hashlib.sha256(picture(2)).hexdigest())
    for numbers in ((1, 2), (1, 2, 3)):
        members = {f"{i}.{kind}": data for i in numbers for kind, data in (("png", picture(i)), ("txt", b"a picture"))}
        tar = write_tar(tmp_path / "a.tar", members)
        made = _run(tmp_path / "a", [str(tar)], {}, deny_sha256=str(tmp_path / "deny"))
        (evidence,) = read_opt_outs(made.store, read_shards(made.store, made.made["pairs"]))
        assert evidence["evidence"].startswith("deny_sha256: ")
    assert [row["reason"] for row in made.rows("pairs")] == [None, "denied", None]


@pytest.mark.parametrize("change", ["recipe", "damage", "no table"])
def test_nothing_is_taken_over_from_another_recipe_or_a_damaged_shard(change: str, tmp_path: Path) -> None:
    first = _run(tmp_path / "a", _list(tmp_path, 0, 1, 2), GOOD)
    if change == "damage":
        (shard,) = read_shards(first.store, first.made["pairs"])
        first.store.delete([blob_path(shard.blobs["images"])])
    if change == "no table":  # as gc leaves what a release was made of, once a row of it is forgotten
        first.store.delete([blob_path(first.made[stage].shard_table) for stage in ("source", "pairs")])
    pages = Pages(GOOD)
    changed = {"encode_quality": 90} if change == "recipe" else {}
    second = _run(tmp_path / "a", _list(tmp_path, 0, 1, 2, 3), pages, **changed)
    assert second.made["pairs"].ledger == Ledger(kept=4)
    assert {f"/{i}.png" for i in range(4)} <= {*pages.asked}
