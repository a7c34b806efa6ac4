"""An image that is replaced under its name is fetched again, and nothing else is."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest

from pipeline.data.fetch.fetcher import Fetched, Fetcher
from pipeline.graph.plan import plan
from pipeline.ledger import Ledger
from tests.pipeline.data.bench import Bench, Page, picture, serving, write_list
from tests.seaweed import BUCKET, Server


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The references that are fetched from now on, by their last parts."""
    names: list[str] = []
    fetch = Fetcher.fetch

    def noted(self: Fetcher, references: Sequence[str]) -> Iterator[tuple[int, Fetched]]:
        names.extend(reference.rpartition("/")[2] for reference in references)
        return fetch(self, references)

    monkeypatch.setattr(Fetcher, "fetch", noted)
    return names


def run(folder: Path, source: str, **changes: Any) -> Bench:
    bench = Bench(folder, [source], source={"shard_rows": 3, **changes})
    bench.record()
    bench.make("source", "captions", "pairs")
    return bench


def stale(folder: Path, source: str, **changes: Any) -> list[str]:
    """The stages up to pairs that a plan finds stale."""
    bench = Bench(folder, [source], source={"shard_rows": 3, **changes})
    found = plan(bench.graph, bench.source_keys, "bench", bench.store, {})
    return [each.stage for each in found[:3] if each.state == "stale"]


def folder_of(place: Path, form: str) -> str:
    """Eight images in a folder, and the list of them in this form."""
    images = place / "images"
    images.mkdir()
    for i in range(8):
        (images / f"{i}.png").write_bytes(picture(i))
        if form == "folder":
            (images / f"{i}.txt").write_text(f"picture {i}")
    if form == "folder":
        return str(images)
    return write_list(images / "list.csv", [(f"{i}.png", f"picture {i}") for i in range(8)])


def changed(before: Bench, after: Bench, stage: str = "pairs") -> list[int]:
    """The shards that have other keys."""
    keys = zip(before.blobs(stage), after.blobs(stage), strict=True)
    return [number for number, ((then, _), (now, _)) in enumerate(keys) if then != now]


@pytest.mark.parametrize("form", ["folder", "table"])
def test_a_file_that_is_replaced_is_fetched_again_alone(tmp_path: Path, asked: list[str], form: str) -> None:
    source, store = folder_of(tmp_path, form), tmp_path / "store"
    first = run(store, source)
    assert sorted(asked) == [f"{i}.png" for i in range(8)]
    assert stale(store, source) == []
    asked.clear()
    image = tmp_path / "images/4.png"
    was = image.stat()
    image.write_bytes(picture(99, 90, 90))
    assert stale(store, source) == ["source", "pairs"]
    second = run(store, source)
    assert asked == ["4.png"]
    assert changed(first, second) == [1]
    assert [row["width"] for row in second.rows("pairs")] == [80] * 4 + [90] + [80] * 3
    assert stale(store, source) == []
    image.write_bytes(picture(98, 96, 96))
    third = run(store, source)
    assert asked == ["4.png", "4.png"]
    assert changed(second, third) == [1]
    image.write_bytes(picture(4))
    os.utime(image, ns=(was.st_atime_ns, was.st_mtime_ns))  # as a backup brings it back
    assert stale(store, source) == []
    assert run(store, source).blobs("pairs") == first.blobs("pairs")


@pytest.mark.parametrize("form", ["folder", "table"])
def test_a_file_is_replaced_while_others_come_and_go(tmp_path: Path, asked: list[str], form: str) -> None:
    source, store, images = folder_of(tmp_path, form), tmp_path / "store", tmp_path / "images"
    first = run(store, source)
    asked.clear()
    (images / "7.png").write_bytes(picture(99, 90, 90))
    (images / "11.png").write_bytes(picture(11))
    (images / "1.png").unlink()
    if form == "folder":
        (images / "1.txt").unlink()
        (images / "11.txt").write_text("picture 11")
    else:
        write_list(Path(source), [(f"{i}.png", f"picture {i}") for i in (0, 11, *range(2, 8))])
    second = run(store, source)
    assert sorted(asked) == ["11.png", "7.png"]
    assert changed(first, second) == [0, 2]
    names = [row["url"].rpartition("/")[2] for row in second.rows("pairs")]
    assert names == ["0.png", "2.png", "3.png", "4.png", "5.png", "6.png", "7.png", "11.png"]
    assert second.made["pairs"].ledger == Ledger(kept=8)
    assert stale(store, source) == []


def test_files_that_are_gone_do_not_count_as_replaced(tmp_path: Path, asked: list[str]) -> None:
    """Those of a table: a plan may be made on a machine that has none of them."""
    source, store = folder_of(tmp_path, "table"), tmp_path / "store"
    run(store, source)
    (tmp_path / "images/3.png").write_bytes(picture(99, 90, 90))
    second = run(store, source)
    for i in range(8):
        (tmp_path / f"images/{i}.png").unlink()
    assert stale(store, source) == []
    write_list(Path(source), [(f"{i}.png", f"picture {i}") for i in (0, 1, 3, 4, 5, 6, 7)])
    asked.clear()
    third = run(store, source)
    assert asked == []
    assert third.made["pairs"].ledger == Ledger(kept=7)
    assert changed(second, third) == [0]


def test_an_object_on_s3_is_replaced(
    tmp_path: Path, asked: list[str], s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    client, prefix = boto3.session.Session().client("s3"), f"{tmp_path.name}-{os.getpid()}"
    for i in range(8):
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{i}/a b.png", Body=picture(i))
    roots = {"roots": [f"s3://{BUCKET}/{prefix}"]}
    rows = [(f"s3://{BUCKET}/{prefix}/{i}/a b.png", f"picture {i}") for i in (3, 1, 2, 0, 4, 5, 6, 7)]
    source, store = write_list(tmp_path / "list.csv", rows), tmp_path / "store"
    first = run(store, source, **roots)
    assert stale(store, source, **roots) == []
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/0/a b.png", Body=picture(0))  # the same bytes
    assert stale(store, source, **roots) == []
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/0/a b.png", Body=picture(99, 90, 90))
    assert stale(store, source, **roots) == ["source", "pairs"]
    asked.clear()
    second = run(store, source, **roots)
    assert len(asked) == 1
    assert changed(first, second) == [1]
    assert second.rows("pairs")[3]["width"] == 90
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")  # as where a plan is made without rights to read images
    assert stale(store, source, **roots) == []


def test_an_image_on_a_web_server_is_fetched_once(tmp_path: Path) -> None:
    source = write_list(tmp_path / "list.csv", [("http://h/0.png", "a picture", "train")])
    pages = {"/0.png": Page(picture(0))}
    with serving(pages) as address:
        settings = {"pairs": {"workers": 0, "hosts": {"h": address}}}
        bench = Bench(tmp_path / "store", [source], run=settings)
        bench.record()
        bench.make("source", "captions", "pairs")
        pages["/0.png"] = Page(picture(1))
        assert Bench(tmp_path / "store", [source], run=settings).source_keys == bench.source_keys
