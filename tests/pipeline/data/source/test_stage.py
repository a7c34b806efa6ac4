import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.fetch.opener import Refused, normal_url
from pipeline.data.pairs.preview import preview
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.stage import scan
from pipeline.data.source.tars import tar_place
from pipeline.errors import UserError
from pipeline.graph.artifacts import read_table
from pipeline.store import Store
from tests.pipeline.data.bench import write_tar
from tests.secrets import leaks, objects


def _csv(path: Path, rows: list[tuple[str, str]], header: str = "url,caption") -> str:
    path.write_text(header + "\n" + "".join(f"{a},{b}\n" for a, b in rows))
    return str(path)


def _rows(n: int, start: int = 0) -> list[tuple[str, str]]:
    return [(f"http://h/{i}.png", f"picture {i}") for i in range(start, start + n)]


def test_csv_tsv_and_parquet_of_the_same_rows_have_the_same_keys(tmp_path: Path, folder_store: Store) -> None:
    rows = _rows(7)
    lists = [_csv(tmp_path / "a.csv", rows)]
    (tmp_path / "a.tsv").write_text("url\tcaption\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    pq.write_table(pa.table({"caption": [b for _, b in rows], "url": [a for a, _ in rows]}), tmp_path / "a.parquet")
    lists += [str(tmp_path / "a.tsv"), str(tmp_path / "a.parquet")]
    keys = [scan(SourceRecipe((path,), shard_rows=3), folder_store, write=False).keys for path in lists]
    assert keys[0] == keys[1] == keys[2]
    assert list(folder_store.list("")) == []


def test_appending_leaves_full_shards_alone(tmp_path: Path, folder_store: Store) -> None:
    recipe = SourceRecipe((_csv(tmp_path / "a.csv", _rows(10)),), shard_rows=4)
    before = scan(recipe, folder_store, write=True).shards
    _csv(tmp_path / "a.csv", _rows(13))
    grown = scan(recipe, folder_store, write=True).shards
    assert [s.image_key for s in grown[:2]] == [s.image_key for s in before[:2]]
    assert grown[2].image_key != before[2].image_key
    assert sum(s.ledger.rows for s in grown) == 13
    more = replace(recipe, paths=(*recipe.paths, _csv(tmp_path / "b.csv", _rows(5, start=100))))
    appended = scan(more, folder_store, write=True).shards
    assert appended[: len(grown)] == grown
    assert [s.number for s in appended] == [0, 1, 2, 3, 100_000, 100_001]


def test_split_column_then_group_then_reference(tmp_path: Path, folder_store: Store) -> None:
    urls, groups = [f"http://h/{i}" for i in range(300)], [f"g{i // 10}" for i in range(300)]
    table = {"url": urls, "caption": ["c"] * 300, "group": groups, "split": ["test"] * 5 + [None] * 295}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    recipe = SourceRecipe((str(tmp_path / "a.parquet"),), validation=0.2, test=0.2)
    refs = read_table(folder_store, scan(recipe, folder_store, write=True).shards[0].refs).to_pylist()
    assert {r["split"] for r in refs[:5]} == {"test"}
    for start in range(10, 300, 10):
        assert len({r["split"] for r in refs[start : start + 10]}) == 1
    assert {r["split"] for r in refs} == {"train", "validation", "test"}


def test_split_shares() -> None:
    splits = [SourceRecipe(("a.csv",), validation=0.1, test=0.2).split_of(str(i)) for i in range(20_000)]
    assert abs(splits.count("test") / 20_000 - 0.2) < 0.01
    assert abs(splits.count("validation") / 20_000 - 0.1) < 0.01


def test_a_folder_of_pictures_and_texts(tmp_path: Path, folder_store: Store) -> None:
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    for name in ("a b.jpg", "sub/c.PNG", "d.webp"):
        (pictures / name).write_bytes(b"x")
    (pictures / "a b.txt").write_text("first caption\n\nsecond caption\n")
    shard = scan(SourceRecipe((str(pictures),)), folder_store, write=True).shards[0]
    refs = read_table(folder_store, shard.refs).to_pylist()
    captions = read_table(folder_store, shard.captions).to_pylist()
    assert [r["url"].rpartition("/")[2] for r in refs] == ["a%20b.jpg", "d.webp", "c.PNG"]
    assert [c["captions"] for c in captions] == [["first caption", "second caption"], [], []]
    assert (shard.captioned, shard.ledger.rows) == (1, 3)  # by which CLIP knows where to look for rows to leave out


def test_hard_links_in_a_tar_are_files_and_others_cost_their_row(tmp_path: Path, folder_store: Store) -> None:
    path = tmp_path / "00000.tar"
    links = {"y/1.jpg": (tarfile.LNKTYPE, "x/1.jpg"), "y/1.txt": (tarfile.LNKTYPE, "x/1.txt")}
    links |= {"y/2.jpg": (tarfile.SYMTYPE, "../x/1.jpg"), "y/3.jpg": (tarfile.LNKTYPE, "x/none.jpg")}
    write_tar(path, {"x/1.jpg": b"one", "x/1.txt": b"caption one"})
    with tarfile.open(path, "a") as tar:
        for name, (kind, target) in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    shard = scan(SourceRecipe((str(path),)), folder_store, write=True).shards[0]
    refs = read_table(folder_store, shard.refs).to_pylist()
    assert [ref["reject"] for ref in refs] == [None, None, "no_reference", "no_reference"]
    captions = read_table(folder_store, shard.captions)["captions"].to_pylist()
    assert captions[:2] == [["caption one"]] * 2
    for ref in refs[:2]:
        place = tar_place(ref["url"])
        assert place
        assert path.read_bytes()[place["offset"] :][: place["size"]] == b"one"


def test_headers_that_lead_tarfile_astray_are_no_readable_tar(tmp_path: Path, folder_store: Store) -> None:
    path = tmp_path / "00000.tar"
    endless, sparse, slow = tarfile.TarInfo("././@LongLink"), tarfile.TarInfo("a.jpg"), tarfile.TarInfo("a")
    endless.type, sparse.type, slow.type = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE
    slow.size = 1 << 20
    extended = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    extended[482] = 1
    extended[148:156] = b"%06o\0 " % (sum(extended[:148]) + 8 * 32 + sum(extended[156:]))
    for damaged in (
        endless.tobuf(tarfile.GNU_FORMAT) * 2000,
        bytes(extended),
        slow.tobuf(tarfile.PAX_FORMAT) + b"1" * slow.size,  # whose digits are counted from each of them
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a readable tar"):
            scan(SourceRecipe((str(path),)), folder_store, write=False)


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_refused(tmp_path: Path, folder_store: Store, packed: str) -> None:
    path = write_tar(tmp_path / "00000.tar", {"1.jpg": b"1", "1.txt": b"1"}, f"w:{packed}")
    for name, said in (("00000.tar", r"compressed with .*unpack it first"), (f"00000.tar.{packed}", "unpack it first")):
        path = path.rename(tmp_path / name)
        with pytest.raises(UserError, match=said):
            scan(SourceRecipe((str(path),)), folder_store, write=True)


def test_a_tar_is_read_to_its_end_or_refused(tmp_path: Path, folder_store: Store) -> None:
    path = write_tar(tmp_path / "00000.tar", {f"{i}.{kind}": b"1" for i in range(3) for kind in ("jpg", "txt")})
    whole = path.read_bytes()
    recipe = SourceRecipe((str(path),))
    assert scan(recipe, folder_store, write=False).shards[0].ledger.rows == 3
    header = 4 * tarfile.BLOCKSIZE
    for damaged in (whole[:header] + b"\xff" + whole[header + 1 :], whole + whole):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged at byte .*, or another tar follows there"):
            scan(recipe, folder_store, write=False)


@pytest.mark.parametrize(
    ("size", "kept"),
    [(12 * 512, 3), (11 * 512 + 1, 3), (11 * 512, 2), (10 * 512, 2), (8 * 512 + 100, 2), (7 * 512, 1), (5 * 512, 1)],
)
def test_a_tar_that_ends_early_is_told_of_and_what_is_whole_of_it_is_kept(
    size: int, kept: int, tmp_path: Path, folder_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """After the last member, its one byte, its header, an image without its text, or within a header or an image."""
    path = write_tar(tmp_path / "00000.tar", {f"{i}.{kind}": b"1" for i in range(3) for kind in ("jpg", "txt")})
    path.write_bytes(path.read_bytes()[:size])
    recipe = SourceRecipe((str(path),))
    (shard,) = scan(recipe, folder_store, write=True).shards
    assert (shard.ledger.kept, shard.ledger.rejected) == (kept, {"truncated": 1})
    assert read_table(folder_store, shard.refs)["url"].to_pylist()[-1] == f"file://{path}"
    said = f"{path} ends early, after {size:,} bytes; the samples behind that are missing, so fetch or write it again"
    assert said in caplog.text
    assert preview(recipe).unread == (said,)
    assert preview(recipe).flaws == ()


def test_captions_that_are_not_utf_8_cost_their_row(tmp_path: Path, folder_store: Store) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    texts = {"a": "café".encode("utf-8-sig"), "b": "café".encode("latin-1"), "c": "a cat".encode("utf-16")[:-1]}
    texts["d"] = b"x" * ((1 << 20) + 1)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, text in texts.items():
            (pictures / f"{name}.jpg").write_bytes(b"image")
            (pictures / f"{name}.txt").write_bytes(text)
            tar.add(pictures / f"{name}.jpg", f"{name}.jpg")
            tar.add(pictures / f"{name}.txt", f"{name}.txt")
    for path in (pictures, tmp_path / "a.tar"):
        shard = scan(SourceRecipe((str(path),)), folder_store, write=True).shards[0]
        assert shard.ledger.rejected == {"not_utf8": 2, "malformed_row": 1}
        rejects = read_table(folder_store, shard.refs)["reject"].to_pylist()
        assert rejects == [None, "not_utf8", "not_utf8", "malformed_row"]
        assert read_table(folder_store, shard.captions)["captions"].to_pylist() == [["café"], [], [], []]


def test_rows_that_cannot_be_read_are_said_once_and_no_duplicates(
    tmp_path: Path, folder_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "".join(f"http://h/{i}.jpg,a cat {i}\n" for i in range(20))
    path = tmp_path / "a.csv"
    path.write_text(f'url,caption\nhttp://h/1.jpg,"a stray\nhttp://h/2.jpg,"another\n{rows}')
    (shard,) = scan(SourceRecipe((str(path),)), folder_store, write=True).shards
    assert shard.ledger.as_json() == {"rows": 22, "kept": 20, "rejected": {"malformed_row": 2}, "deferred": {}}
    said = [record.message for record in caplog.records if record.name == "unclip"]
    assert len(said) == 1
    assert "2 rows cannot be read and will be left out; the first: line 2 has a stray quotation mark" in said[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tar", "not a tar", "not a readable tar"),
        ("a.csv", "url,caption,split\nhttp://h/1,x,dev\n", "split 'dev' is not train, validation or test"),
        ("a.csv", "url,caption\n", "no rows"),
    ],
)
def test_a_list_that_is_refused_leaves_nothing_in_the_store(
    tmp_path: Path, folder_store: Store, name: str, content: str, message: str
) -> None:
    """See hostile_lists.py and tests/jobs/test_table_of_mistakes.py for others."""
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        scan(SourceRecipe((str(tmp_path / name),)), folder_store, write=True)
    assert list(folder_store.list("")) == []


@pytest.mark.parametrize(("images", "warned"), [(220, False), (219, True)])
def test_captions_of_rows_that_name_an_image_of_an_earlier_list_are_missed(
    images: int, warned: bool, tmp_path: Path, folder_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    earlier, path = _csv(tmp_path / "earlier.csv", _rows(11)), _csv(tmp_path / "list.csv", _rows(images))
    scan(SourceRecipe((earlier, path)), folder_store, write=True)
    said = f"source {path}: 11 rows repeat the image of an earlier row, so their captions are left out"
    assert (said in caplog.text) == warned


def test_a_relative_path_counts_from_the_folder_of_its_list(tmp_path: Path, folder_store: Store) -> None:
    cells = ["pictures/a b.png", "../c.JPG", "/d.png", "http://h/e.png", "data:image/png", "no picture"]
    path = _csv(tmp_path / "list.csv", [(cell, "text") for cell in cells])
    (shard,) = scan(SourceRecipe((path,)), folder_store, write=True).shards
    urls = read_table(folder_store, shard.refs)["url"].to_pylist()
    assert urls == [f"file://{tmp_path}/pictures/a%20b.png", f"file://{tmp_path}/../c.JPG", *cells[2:]]


def test_a_password_in_a_reference_is_not_stored_and_its_row_not_fetched(tmp_path: Path, folder_store: Store) -> None:
    listed = ["https://ana:s3cret@h/a.png", "s3://ana:s3cret@b/a.png", "http://a@s3cret@h", "https://h/@a?x=b@c"]
    listed += [f"https://ana:p{mark}s3cret@h/{i}.png" for i, mark in enumerate("#/?")]  # which should have been escaped
    listed += ["https://h:80/@a", "https://[::1]:80/@a", "https://h:/@a"]
    path = _csv(tmp_path / "list.csv", [(url, "text") for url in listed])
    # The column of references may be that of groups, too.
    (shard,) = scan(SourceRecipe((path,), group_column="url"), folder_store, write=True).shards
    table = read_table(folder_store, shard.refs)
    urls = table["url"].to_pylist()
    assert table["group"].to_pylist() == urls
    assert urls[:4] == ["https://***@h/a.png", "s3://***@b/a.png", "http://***@h", "https://h/@a?x=b@c"]
    assert urls[4:] == [*(f"https://***@h/{i}.png" for i in range(3)), *listed[7:]]
    assert leaks(objects(folder_store), {"password": "s3cret"}) == []
    for url in (urls[0], urls[2]):
        with pytest.raises(Refused, match="unsupported_reference"):
            normal_url(url)
