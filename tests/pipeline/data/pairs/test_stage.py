import hashlib
import io
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import webdataset

from pipeline.data.pairs.row_index import Place, index_counts, read_images
from pipeline.errors import CorruptObject
from pipeline.graph.artifacts import read_shards
from pipeline.ledger import REASONS
from pipeline.store.records import read_blob
from tests.pipeline.data.bench import Bench, Page, picture, serving, write_list, write_listed, write_tar
from tests.pipeline.data.odd import png

HOST = "http://pictures.test"
MAX_BYTES = 100_000


def _garbled() -> bytes:
    """A PNG of the right length whose pixels are no zlib stream."""
    data = picture(50)
    start = data.index(b"IDAT") + 4
    return data[:start] + bytes(200) + data[start + 200 :]


PAGES = {
    **{f"/{i}.png": Page(picture(i)) for i in range(4)},
    "/wide.jpg": Page(picture(10, 200, 70, "JPEG")),
    "/large.webp": Page(picture(11, 150, 140, "WEBP")),
    "/500": Page(status=500),
    "/page.png": Page(b"<html><body>not here any more</body></html>", headers={"Content-Type": "image/png"}),
    "/cut.png": Page(picture(20)[:-400]),
    "/cut.jpg": Page(picture(21, kind="JPEG")[:-400]),
    "/empty": Page(),
    "/bomb.png": Page(png(60_000, 60_000, rows=bytes(1000))),
    "/garbled.png": Page(_garbled()),
    "/slow.png": Page(picture(22), drip_s=0.2),
    "/robots.png": Page(picture(23), headers={"X-Robots-Tag": "noai"}),
    "/big.png": Page(bytes(MAX_BYTES + 1)),
    "/hashed.png": Page(picture(24)),
}
ROWS = [  # url, caption, split, sha256, and how pairs must end the row
    *((f"{HOST}/{i}.png", f"picture {i}", "train", "", None) for i in range(3)),
    (f"{HOST}/absent.png", "gone", "", "", "http_4xx"),
    (f"{HOST}/500", "broken server", "", "", "http_5xx"),
    (f"{HOST}/page.png", "a page", "", "", "not_an_image"),
    (f"{HOST}/cut.png", "half a picture", "", "", "truncated"),
    (f"{HOST}/cut.jpg", "half a photograph", "", "", "truncated"),
    (f"{HOST}/empty", "nothing", "", "", "zero_bytes"),
    (f"{HOST}/bomb.png", "a bomb", "", "", "too_many_pixels"),
    (f"{HOST}/garbled.png", "noise", "", "", "decode_error"),
    (f"{HOST}/slow.png", "drip", "", "", "timeout"),
    (f"{HOST}/loop", "round the corner", "", "", "forbidden_address"),
    (f"{HOST}/robots.png", "no thanks", "", "", "opted_out"),
    (f"{HOST}/0.png", "the first again", "", "", "duplicate_url"),
    ("", "a caption without a picture", "", "", "no_reference"),
    (f"{HOST}/3.png", "", "test", "", None),
    (f"{HOST}/wide.jpg", "x" * 10_000, "train", "", None),
    ("http://closed.test/a.png", "nobody is there", "", "", "unreachable"),
    ("http://127.0.0.1:9/a.png", "ourselves", "", "", "forbidden_address"),
    ("file:///nowhere/a.png", "a lost file", "", "", "missing_file"),
    ("file:///etc/passwd", "a file of the machine", "", "", "forbidden_reference"),
    ("s3://anybodys/a.png", "a bucket that nobody has named", "", "", "forbidden_reference"),
    ("tar:///etc/a.tar?offset=0&size=9", "a tar of the machine", "", "", "forbidden_reference"),
    ("embedding:///etc?part=0&row=0", "numbers of the machine", "", "", "forbidden_reference"),
    ("ftp://pictures.test/a.png", "an old protocol", "", "", "unsupported_reference"),
    ("tar:///nowhere/a.tar", "not a member of a tar", "", "", "unsupported_reference"),
    (f"tar:///nowhere/a.tar?offset=0&size={10**12}", "larger than any budget", "", "", "too_large"),
    ("tar://[/a.tar?offset=0&size=9", "no address", "", "", "unsupported_reference"),
    (f"tar:///nowhere/a.tar?offset={10**30}&size=9", "far away", "", "", "missing_file"),
    ("tar:///nowhere/a.tar?offset=-1&size=9", "before the start", "", "", "unsupported_reference"),
    (f"{HOST}/big.png", "too many bytes", "", "", "too_large"),
    (f"{HOST}/hashed.png", "as the list says", "validation", hashlib.sha256(picture(24)).hexdigest(), None),
    (f"{HOST}/large.webp", "not as the list says", "", "0" * 64, "hash_mismatch"),
    ("http://www.denied.test/a.png", "not for us", "", "", "denied"),
]  # fmt: skip


@dataclass(frozen=True)
class Made:
    """The same list made twice in process, and once by a Ray worker."""

    first: Bench
    again: Bench
    worker: Bench


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    import ray

    folder = tmp_path_factory.mktemp("pairs")
    pages = dict(PAGES)
    (folder / "denied.txt").write_text("denied.test\n")
    with serving(pages) as address:
        pages["/loop"] = Page(status=302, headers={"Location": f"http://{address}/1.png"})
        source = write_list(folder / "list.csv", [row[:4] for row in ROWS])
        hosts = {"pictures.test": address, "closed.test": "127.0.0.1:1"}
        benches = []
        for name, workers in (("first", 0), ("again", 0), ("worker", 1)):
            settings = {"timeout_s": 1.5, "retries": 0, "threads": 8, "hosts": hosts, "workers": workers}
            recipe = {"max_bytes": MAX_BYTES, "image_size": 1024, "deny_hosts": str(folder / "denied.txt")}
            roots = {"roots": ["/nowhere"]}
            benches.append(Bench(folder / name, [source], source=roots, pairs=recipe, run={"pairs": settings}))
            benches[-1].make("source", "pairs")
    ray.shutdown()
    return Made(*benches)


def test_every_row_is_in_the_index_once_with_its_reason(made: Made) -> None:
    rows = made.first.rows("pairs")
    assert [row["key"] for row in rows] == [f"{i // 10:08d}{i % 10:04d}" for i in range(len(ROWS))]
    assert [row["reason"] for row in rows] == [row[4] for row in ROWS]
    assert {row["status"] for row in rows if row["reason"] is None} == {"kept"}
    assert {row["status"] for row in rows if row["reason"] == "http_5xx"} == {"deferred"}
    assert {row["status"] for row in rows if row["reason"] == "http_4xx"} == {"rejected"}
    assert [row["url"] for row in rows] == [row[0] for row in ROWS]


def test_the_counts_balance(made: Made) -> None:
    ledger = made.first.made["pairs"].ledger
    reasons = Counter(row[4] for row in ROWS)
    assert ledger.kept == reasons.pop(None)
    deferred = {reason: reasons.pop(reason, 0) for reason in ("http_5xx", "timeout", "unreachable", "rate_limited")}
    assert ledger.deferred == {reason: count for reason, count in deferred.items() if count}
    assert ledger.rejected == reasons
    assert ledger.rows == len(ROWS)
    assert reasons.keys() | deferred.keys() <= REASONS.keys()
    shards = read_shards(made.first.store, made.first.made["pairs"])
    rows = made.first.rows("pairs")
    for shard in shards:
        own = [row for row in rows if row["key"].startswith(f"{shard.number:08d}")]
        assert shard.counts == index_counts(own)
        assert shard.kept == sum(row["status"] == "kept" for row in own)


def test_again_and_with_a_ray_worker_every_byte_is_the_same(made: Made) -> None:
    assert made.first.blobs("pairs") == made.again.blobs("pairs") == made.worker.blobs("pairs")
    assert made.first.made["pairs"].shard_table == made.worker.made["pairs"].shard_table


def test_the_index_finds_every_picture_and_so_do_tar_readers(made: Made, tmp_path: Path) -> None:
    store, rows = made.first.store, made.first.rows("pairs")
    for shard in read_shards(store, made.first.made["pairs"]):
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
