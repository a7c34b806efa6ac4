"""Lists as other tools write them: Hugging Face's imagefolder, img2dataset's output, JSON lines, parts of a table."""

import errno
import gzip
import json
import logging
import os
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.source.folders import SPLITS
from pipeline.data.source.lists import read_rows, unread
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import ListRow
from pipeline.data.source.stage import scan
from pipeline.data.source.tars import tar_place
from pipeline.errors import UserError
from pipeline.local import local_path, read_local
from pipeline.store import open_store
from tests.pipeline.data.bench import picture, write_tar


def rows_of(path: Path, **recipe: Any) -> list[ListRow]:
    return list(read_rows(str(path), SourceRecipe((str(path),), **recipe)))


def pairs_of(path: Path) -> dict[str, tuple[str, ...]]:
    """Captions by the path of the image below the folder."""
    return {str(Path(local_path(row.url) or "").relative_to(path)): row.captions for row in rows_of(path)}


def images(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(i))
    return folder


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_an_imagefolder_has_the_captions_of_its_metadata(tmp_path: Path) -> None:
    """Hugging Face's own reader finds the same pairs."""
    folder = images(tmp_path / "birds", "a.png", "inner/b.png")
    texts = {"a.png": "a red bird", "inner/b.png": "a blue one"}
    (folder / "metadata.jsonl").write_text(lines(*({"file_name": n, "text": t} for n, t in texts.items())))
    assert pairs_of(folder) == {name: (text,) for name, text in texts.items()}
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "hf"))
    assert sorted(theirs["text"]) == sorted(texts.values())


def test_folders_of_an_imagefolder_are_splits(tmp_path: Path) -> None:
    folder = images(tmp_path, "train/a.png", "test/b.png")
    for split, name in (("train", "a.png"), ("test", "b.png")):
        (folder / split / "metadata.jsonl").write_text(lines({"file_name": name, "text": name}))
    assert [(row.captions, row.split) for row in rows_of(folder)] == [(("b.png",), "test"), (("a.png",), "")]
    images(folder, "valid/c.png")
    (folder / "valid/metadata.jsonl").write_text(lines({"file_name": "c.png", "text": "c"}))
    assert [row.split for row in rows_of(folder)] == ["test", "train", "validation"]
    assert {word for words in datasets.data_files.SPLIT_KEYWORDS.values() for word in words} == SPLITS.keys()


def test_metadata_may_name_only_what_lies_below_them(tmp_path: Path) -> None:
    images(tmp_path, "secret.png", "own/a.png", "own/b.png", "plain/c.png", "plain/d.png")
    rows = [{"file_name": name, "text": "a cat"} for name in ("a.png", "../secret.png", "gone.png")]
    (tmp_path / "own/metadata.jsonl").write_text(lines(*rows))
    assert [row.reject for row in rows_of(tmp_path / "own")] == [None, "forbidden_reference", None]
    (tmp_path / "plain/c.txt").write_text("beside it")
    (tmp_path / "plain/d.json").write_text(json.dumps({"caption": ["one", "two"]}))
    found = pairs_of(tmp_path)
    assert (found["plain/c.png"], found["plain/d.png"]) == (("beside it",), ("one", "two"))
    assert unread(str(tmp_path / "own"), SourceRecipe((".",))) == (
        f"1 file in {tmp_path}/own is not read: 1 image that metadata.jsonl does not name (such as b.png)"
    )


def test_a_row_of_metadata_that_is_no_reference_costs_itself_alone(tmp_path: Path) -> None:
    folder = images(tmp_path / "own", "a.png")
    names = ["a.png", "b\0.png", "http://[x/a.jpg", "https://ex\u2100mple.org/a.jpg"]
    (folder / "metadata.jsonl").write_text(lines(*({"file_name": name, "text": "a cat"} for name in names)))
    assert [row.captions for row in rows_of(folder)] == [("a cat",)] * 4
    scan(SourceRecipe((str(folder),)), open_store(str(tmp_path / "store")), write=True)
    assert unread(str(folder), SourceRecipe((".",))) == ""


def test_a_column_of_jsonl_may_come_late(tmp_path: Path) -> None:
    file = tmp_path / "list.jsonl"
    rows = [{"url": f"http://h/{i}.jpg", "caption": "a cat"} for i in range(150)]
    late = {"split": "test", "license": "CC0"}
    file.write_text(lines(*rows, {"url": "http://h/late.jpg", "caption": "a cat", **late}))
    assert [(row.split, row.license) for row in rows_of(file)] == [("", "")] * 150 + [("test", "CC0")]


def test_jsonl_rows_are_read_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "list.jsonl"
    good = [{"url": f"http://h/{i}.jpg", "caption": ["a", "b"] if i else "one", "id": i} for i in range(2)]
    bad = ['{"url": "x', "[1]", '{"url": ["http://h/9"], "caption": "x"}']
    bad += ['{"url": "http://h/8", "caption": "\\ud800"}', '{"url": "http://h/7", "caption": {"en": "a cat"}}']
    file.write_text(lines(good[0]) + "\n".join(bad) + "\n\n" + lines(good[1]) + '{"url": null, "caption": 7}')
    found = rows_of(file)
    assert [row.captions for row in found if not row.reject] == [("one",), ("a", "b"), ("7",)]
    assert [row.reject for row in found if row.reject] == ["malformed_row"] * 3 + ["not_utf8", "malformed_row"]
    assert found[1].flaw == "line 2 is not JSON"


def test_gzipped_lists_are_read_and_cut_ones_refused(tmp_path: Path) -> None:
    text = "url,caption\n" + "".join(f"http://h/{i}.jpg,cat {i}\n" for i in range(500))
    file = tmp_path / "list.csv.gz"
    file.write_bytes(gzip.compress(text.encode()))
    assert [row.url for row in rows_of(file)] == [f"http://h/{i}.jpg" for i in range(500)]
    for data in (file.read_bytes()[:-20], b"url,caption\nhttp://h/a,b\n"):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"list\.csv\.gz: cannot be unpacked"):
            rows_of(file)


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        ("URL,TEXT", ("URL", "TEXT")),
        ("image_path,caption,similarity", ("image_path", "caption")),
        ("url,Caption,text", ("url", "Caption")),
        ("file_name,prompt", ("file_name", "prompt")),
        ("link,caption", None),
        ("image_url,file_name,text", None),
    ],
)
def test_columns_of_other_tools_are_known_where_only_one_can_be_meant(
    tmp_path: Path, header: str, taken: tuple[str, str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "unclip")
    file = tmp_path / "a.csv"
    file.write_text(f"{header}\nhttp://h/0,a cat,x\n" if header.count(",") == 2 else f"{header}\nhttp://h/0,a cat\n")
    if taken is None:
        with pytest.raises(UserError, match=r"no column url; .*(has link|image_url and file_name could be meant)"):
            rows_of(file)
        return
    (row,) = rows_of(file)
    assert (row.url, row.captions) == ("http://h/0", ("a cat",))
    others = {name: column for name, column in zip(taken, ("url", "caption"), strict=True) if name != column}
    assert caplog.messages == [f"{file.name}: {name} is used as the column {c}" for name, c in others.items()]


def test_a_folder_of_tables_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for part in (1, 0):
        table = {"URL": [f"http://h/{part}-{i}" for i in range(2)], "TEXT": ["a cat"] * 2, "LICENSE": ["?"] * 2}
        pq.write_table(pa.table(table), tmp_path / f"part-0000{part}.parquet")
    (tmp_path / "_SUCCESS").write_text("")
    assert [row.url[9:] for row in rows_of(tmp_path)] == ["0-0", "0-1", "1-0", "1-1"]
    assert unread(str(tmp_path), SourceRecipe((".",))).endswith("1 without a suffix (such as _SUCCESS)")


@pytest.mark.slow  # for what it imports; such tars and folders are written by hand below
def test_what_img2dataset_has_written_is_used_where_it_lies(tmp_path: Path) -> None:
    """By its own writers, as a folder of shards and as one of files; the second image could not be fetched."""
    from img2dataset.writer import FilesSampleWriter, WebDatasetSampleWriter

    schema = pa.schema([("caption", pa.string()), ("key", pa.string()), ("status", pa.string())])
    for writer, name in ((WebDatasetSampleWriter, "shards"), (FilesSampleWriter, "files")):
        (tmp_path / name).mkdir()
        for shard in range(2):
            out = writer(shard, str(tmp_path / name), True, 5, schema, "jpg")
            for i in range(3):
                status = "failed" if i == 1 else "success"
                meta = {"caption": f"{shard}-{i}", "key": f"{shard:05}{i:04}", "status": status}
                out.write(None if i == 1 else picture(i, kind="JPEG"), meta["key"], meta["caption"], meta)
            out.close()
        (tmp_path / name / "00000_stats.json").write_text("{}")
    for name in ("shards", "files"):
        assert [row.captions for row in rows_of(tmp_path / name)] == [("0-0",), ("0-2",), ("1-0",), ("1-2",)]
    assert unread(str(tmp_path / "shards"), SourceRecipe((".",))) == ""


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_paragraph_beside_an_image_is_a_caption_or_a_line_is(
    tmp_path: Path, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As a vision model describes images: over several lines. Names may be in capitals."""
    text = end.join(["", "A red bird sits", "on a branch.", " \t", "", "A bird.", ""])
    images(tmp_path / "folder", "A.PNG")
    (tmp_path / "folder/A.TXT").write_bytes(text.encode())
    hidden = {"./._A.PNG": b"\0\5\x16\7", "./._A.TXT": b"\0\5\x16\7"}  # as macOS writes them: one beside each file
    write_tar(tmp_path / "A.TAR", {**hidden, "./A.PNG": picture(0), "./A.TXT": text.encode()})
    caplog.set_level(logging.INFO, "unclip")
    for path in (tmp_path / "folder", tmp_path / "A.TAR"):
        (row,) = rows_of(path)
        assert row.captions == ("A red bird sits on a branch.", "A bird.")
        assert "source.caption_lines: true makes each line a caption" in caplog.text
        assert rows_of(path, caption_lines=True)[0].captions == ("A red bird sits", "on a branch.", "A bird.")


def test_folders_that_are_links_are_told(tmp_path: Path) -> None:
    images(tmp_path / "own", "a.png")
    (tmp_path / "own/a.txt").write_text("a bird")
    images(tmp_path / "other", "b.png")
    (tmp_path / "own/birds").symlink_to(tmp_path / "other")
    (tmp_path / "own/.cache").symlink_to(tmp_path / "other")
    assert len(rows_of(tmp_path / "own")) == 1
    said = unread(str(tmp_path / "own"), SourceRecipe((".",)))
    assert said.endswith("is not read: 1 link to a folder (such as birds)")


def test_links_to_images_count_where_the_list_may_name_what_they_lead_to(tmp_path: Path) -> None:
    """As in a cache of Hugging Face. Naming the place afterwards changes keys, so the rows are fetched then."""
    images(tmp_path / "blobs", "a.png", "b.png")
    for name in ("a.png", "b.png"):
        (tmp_path / "list/inner").mkdir(parents=True, exist_ok=True)
        (tmp_path / "list/inner" / name).symlink_to(tmp_path / "blobs" / name)
    (tmp_path / "list/inner/a.txt").write_text("a bird")
    (tmp_path / "list/b.jsonl").write_text(lines({"url": "inner/b.png", "caption": "a bird"}))
    keys = []
    for roots, refusal in (((), "forbidden_reference"), ((str(tmp_path / "blobs"),), None)):
        paths = (str(tmp_path / "list"), str(tmp_path / "list/b.jsonl"))
        keys.append(
            scan(SourceRecipe(paths, roots=roots), open_store(str(tmp_path / "store")), write=False).keys["source"]
        )
        assert {row.reject for row in rows_of(tmp_path / "list", roots=roots)} == {refusal}
        assert {row.reject for row in rows_of(tmp_path / "list/b.jsonl", roots=roots)} == {refusal}
    assert keys[0] != keys[1]


def test_a_folder_that_cannot_be_listed_is_told_or_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path, "2023/a.png", "2024/b.png")
    scan_folder = os.scandir
    code = errno.EACCES

    def scandir(path: str) -> Any:
        if str(path).endswith("2024"):
            raise OSError(code, os.strerror(code), path)
        return scan_folder(path)

    monkeypatch.setattr(os, "scandir", scandir)
    (tmp_path / "2023/a.txt").write_text("a bird")
    assert len(rows_of(tmp_path)) == 1
    assert unread(str(tmp_path), SourceRecipe((".",))).endswith("1 folder without permission (such as 2024)")
    code = errno.ESTALE
    with pytest.raises(UserError, match=r"2024: cannot be listed \(Stale file handle\); check its disk"):
        rows_of(tmp_path)


def test_a_tar_whose_path_is_not_utf8_is_used_where_it_lies(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    folder.mkdir()
    write_tar(folder / "a.tar", {"0.png": picture(0), "0.txt": b"a bird", "1.jpg": b"x", "1.txt": b"\xff"})
    row, flawed = rows_of(folder / "a.tar")
    assert (row.reject, row.captions, flawed.reject) == (None, ("a bird",), "not_utf8")
    assert "/\\udce9/a.tar" in flawed.flaw
    place = tar_place(row.url)
    assert place
    assert place["tar"] == str(folder / "a.tar")
    assert read_local(place["tar"], 1 << 20, None, place["offset"], place["size"]) == picture(0)


def test_a_time_that_python_has_not_is_read_as_a_number(tmp_path: Path) -> None:
    group = pa.array([1 << 30, 0], pa.int32()).cast(pa.date32())
    table = pa.table({"url": ["http://h/a.jpg", "http://h/b.jpg"], "caption": ["a", "b"], "group": group})
    pq.write_table(table, tmp_path / "list.parquet")
    found = rows_of(tmp_path / "list.parquet", group_column="group")
    assert [row.group for row in found] == [str(1 << 30), "1970-01-01"]


def test_captions_in_json_members_of_a_tar_count_where_there_is_no_text(tmp_path: Path) -> None:
    members = {"a.png": picture(0), "a.json": b'{"prompt": "a cat", "width": 3}', "b.json": b'{"caption": "json"}'}
    members |= {"b.png": picture(1), "b.txt": b"text", "c.json": b"{", "c.png": picture(2)}
    write_tar(tmp_path / "0.tar", members)
    found = rows_of(tmp_path / "0.tar")
    assert [row.captions for row in found] == [("a cat",), ("text",), ()]
    assert [row.reject for row in found] == [None, None, "malformed_row"]
    (tmp_path / "1.tar.gz").write_bytes(b"")
    (tmp_path / "0_stats.json").write_text("{}")  # as img2dataset writes beside each
    assert rows_of(tmp_path) == found
    assert unread(str(tmp_path), SourceRecipe((".",))).endswith("1 .gz (such as 1.tar.gz)")
    with tarfile.open(tmp_path / "2.tar", "w"):
        pass
    assert rows_of(tmp_path) == found
