import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import webdataset

from pipeline.data.pairs.row_index import Place, index_counts, read_images
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import read_shards
from pipeline.store.records import read_blob
from tests.pipeline.data.bench import Bench, Page, picture, serving, write_list, write_listed, write_tar

HOST = "http://pictures.test"
PAGES = {
    **{f"/{i}.png": Page(picture(i)) for i in range(11)},
    "/wide.jpg": Page(picture(20, 200, 70, "JPEG")),
    "/large.webp": Page(picture(21, 150, 140, "WEBP")),
    "/page.png": Page(b"<html><body>not here any more</body></html>"),
}
# All other ends of rows: tests/pipeline/data/test_hostile.py
ENDS = {**dict.fromkeys(PAGES), "/page.png": "not_an_image", "/absent.png": "http_4xx"}


@dataclass(frozen=True)
class Site:
    """A list, the address of its server, and the pairs that were made of it in this process."""

    source: str
    address: str
    bench: Bench

    def again(self, folder: Path, workers: int = 0) -> Bench:
        return _made(folder, self.source, self.address, workers)


def _made(folder: Path, source: str, address: str, workers: int = 0) -> Bench:
    settings = {"retries": 0, "threads": 8, "hosts": {"pictures.test": address}, "workers": workers}
    bench = Bench(folder, [source], run={"pairs": settings})
    bench.make("source", "pairs")
    return bench


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("pairs")
    with serving(PAGES) as address:
        source = write_list(folder / "list.csv", [(f"{HOST}{path}", f"a picture at {path}") for path in ENDS])
        yield Site(source, address, _made(folder / "store", source, address))


def test_every_row_is_in_the_index_once_and_counted_in_its_shard(site: Site) -> None:
    rows = site.bench.rows("pairs")
    assert [row["key"] for row in rows] == [f"{i // 10:08d}{i % 10:04d}" for i in range(len(ENDS))]
    assert [(row["url"], row["reason"]) for row in rows] == [(f"{HOST}{path}", end) for path, end in ENDS.items()]
    for shard in read_shards(site.bench.store, site.bench.made["pairs"]):
        own = [row for row in rows if row["key"].startswith(f"{shard.number:08d}")]
        assert shard.counts == index_counts(own)
        assert shard.kept == sum(row["status"] == "kept" for row in own)


def test_again_every_byte_is_the_same(site: Site, tmp_path: Path) -> None:
    again = site.again(tmp_path)
    assert again.blobs("pairs") == site.bench.blobs("pairs")


@pytest.mark.slow  # after a kill: tests/jobs/test_crashes.py
def test_with_a_ray_worker_every_byte_is_the_same(site: Site, tmp_path: Path) -> None:
    import ray

    try:
        worker = site.again(tmp_path, workers=1)
    finally:
        ray.shutdown()
    assert worker.blobs("pairs") == site.bench.blobs("pairs")
    assert worker.made["pairs"].shard_table == site.bench.made["pairs"].shard_table


def test_the_index_finds_every_picture_and_so_do_tar_readers(site: Site, tmp_path: Path) -> None:
    store, rows = site.bench.store, site.bench.rows("pairs")
    for shard in read_shards(store, site.bench.made["pairs"]):
        kept = [r for r in rows if r["status"] == "kept" and r["key"].startswith(f"{shard.number:08d}")]
        data = read_blob(store, shard.blobs["images"])
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = tar.getmembers()
        assert [m.name for m in members] == [f"{row['key']}.jpg" for row in kept]
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} <= {(0, 0, 0, "bigdata")}
        for member, row in zip(members, kept, strict=True):
            stored = data[row["offset"] : row["offset"] + row["size"]]
            assert (member.offset_data, member.size) == (row["offset"], row["size"])
            assert hashlib.sha256(stored).hexdigest() == row["sha256"]
        assert read_images(store, [Place.of(row, shard.blobs["images"]) for row in kept]) == [
            data[row["offset"] : row["offset"] + row["size"]] for row in kept
        ]
        (tmp_path / "shard.tar").write_bytes(data)
        if kept:
            samples = list(webdataset.WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False))
            assert [sample["__key__"] for sample in samples] == [row["key"] for row in kept]
            assert [hashlib.sha256(sample["jpg"]).hexdigest() for sample in samples] == [r["sha256"] for r in kept]


def test_a_smaller_image_size_shrinks_the_short_side(tmp_path: Path) -> None:
    source = write_listed(tmp_path, [picture(1, 300, 200), picture(2, 90, 70)])
    models = {"models": ["diffusion_prior", "decoder"], "sampling": {"size": 64}}
    bench = Bench(tmp_path / "store", [source], pairs={"image_size": 80, "encode_format": "png",
                  "encode_quality": 3}, bundle=models)  # fmt: skip
    bench.make("source", "pairs")
    assert [(row["width"], row["height"]) for row in bench.rows("pairs")] == [(120, 80), (90, 70)]


def _tar(path: Path) -> Path:
    return write_tar(path, {"0.png": picture(1), "0.txt": b"one", "1.jpg": picture(2, kind="JPEG")[:-300]})


def test_a_tar_is_used_where_it_lies(tmp_path: Path) -> None:
    path = _tar(tmp_path / "my shard.tar")
    bench = Bench(tmp_path / "store", [str(path)])
    bench.make("source", "pairs")
    rows = bench.rows("pairs")
    assert [row["reason"] for row in rows] == [None, "truncated"]
    [shard] = read_shards(bench.store, bench.made["pairs"])
    assert "images" not in shard.blobs
    assert rows[0]["tar"] == str(path)
    assert rows[0]["sha256"] == hashlib.sha256(picture(1)).hexdigest()
    assert read_images(bench.store, [Place.of(rows[0], None)]) == [picture(1)]


def test_an_image_below_the_least_side_is_rejected_wherever_it_lies(tmp_path: Path) -> None:
    source = write_listed(tmp_path, [picture(1, 300, 200)])
    bench = Bench(tmp_path / "store", [source, str(_tar(tmp_path / "a.tar"))], pairs={"min_image_size": 73})
    bench.make("source", "pairs")
    assert [row["reason"] for row in bench.rows("pairs")] == [None, "too_small", "truncated"]


def test_a_tar_that_changed_or_went_is_named(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar")
    bench = Bench(tmp_path / "store", [str(path)])
    bench.make("source", "pairs")
    rows = bench.rows("pairs")[:1]
    data = bytearray(path.read_bytes())
    data[rows[0]["offset"] + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptObject, match=r"a\.tar.*has another image of row 000000000000"):
        read_images(bench.store, [Place.of(row, None) for row in rows])
    path.unlink()
    with pytest.raises(CorruptObject, match=r"a\.tar: cannot be read"):
        read_images(bench.store, [Place.of(row, None) for row in rows])
