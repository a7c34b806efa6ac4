"""CSV, TSV and Parquet: what cannot be read costs its own row with a reason, and nothing is mangled or swallowed."""

import csv
import io
import json
import string
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.source.columns import MAX_CAPTION, MAX_CAPTIONS, Flaw
from pipeline.data.source.lists import read_rows
from pipeline.data.source.parsers.cells import group_batches
from pipeline.data.source.parsers.child import Budget
from pipeline.data.source.parsers.text import text_rows
from pipeline.data.source.recipe import SourceRecipe
from pipeline.errors import UserError
from pipeline.ledger import REASONS
from tests.pipeline.data.source.hostile_lists import csv_text, hostile_lists

REFERENCES = [f"http://h/{i}.jpg" for i in range(30)]
LISTS = {each.name: each for each in hostile_lists(REFERENCES)}


def rows_of(path: Path, data: bytes | str | None = None, **recipe: Any) -> list[tuple[str, tuple[str, ...]]]:
    """References and captions of the rows that can be read."""
    if data is not None:
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return [(r.url, r.captions) for r in read_rows(str(path), SourceRecipe((str(path),), **recipe)) if not r.reject]


@pytest.mark.parametrize("name", LISTS)
def test_every_row_of_a_hostile_list_ends_with_its_reason(name: str, tmp_path: Path) -> None:
    listed = LISTS[name]
    path = tmp_path / name
    path.write_bytes(listed.data)
    rows = read_rows(str(path), SourceRecipe((str(path),)))
    if listed.refused:
        with pytest.raises(UserError, match=listed.refused) as error:
            list(rows)
        assert "\n" not in str(error.value)
        return
    found = [(row.reject or (None if row.url else "no_reference"), row.url) for row in rows]
    assert tuple(end for end, _ in found) == listed.ends
    assert {end for end in listed.ends if end} <= REASONS.keys()
    assert all(url == REFERENCES[i] for i, (end, url) in enumerate(found) if end is None)


def test_what_a_row_says_is_taken_as_it_is(tmp_path: Path) -> None:
    """No types are guessed, and a TSV file takes a quotation mark for itself unless both ends have one."""
    found = rows_of(tmp_path / "a.csv", b'\xef\xbb\xbf"caption",url\n007,http://h/0\n1e3,http://h/1\nTrue,http://h/2\n')
    assert [captions for _, captions in found] == [("007",), ("1e3",), ("True",)]
    cells = ['"Mona Lisa" by Leonardo', '"a ""cat"""', '5" disk', '"', '"a, b"', 'say "hi"']
    found = rows_of(tmp_path / "a.tsv", "url\tcaption\n" + "".join(f"http://h/{c}\t{c}\n" for c in cells))
    assert [c for _, (c,) in found] == ['"Mona Lisa" by Leonardo', 'a "cat"', '5" disk', '"', "a, b", 'say "hi"']


def test_a_flaw_names_its_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = ["url,caption", 'http://h/0,"two\nlines"', "http://h/1", 'http://h/2,"x', *["http://h/9,a"] * 40]
    path.write_bytes("\n".join(lines).encode() + b"\nhttp://h/4,caf\xe9\n")
    flaws = [row.flaw for row in read_rows(str(path), SourceRecipe((str(path),))) if row.reject]
    assert flaws == [
        "line 4 has 1 value, where line 1 names 2 columns",
        "line 5 has a stray quotation mark",
        "line 46, column caption holds byte 0xe9, which is not UTF-8",
    ]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1251", "shift_jis"])
def test_the_delimiter_and_the_encoding_of_a_table_are_told(tmp_path: Path, mark: str, codec: str) -> None:
    said = "ёлка, a|b;c" if codec == "cp1251" else "犬, a|b;c" if codec == "shift_jis" else "Größe, a|b;c"
    text = csv_text([("image_name", " comment"), ("http://h/0", said), ("http://h/1", "two\nlines")], delimiter=mark)
    encoding = codec if codec in ("cp1251", "shift_jis") else ""
    found = rows_of(tmp_path / "results.csv", text.encode(codec), encoding=encoding)
    assert found == [("http://h/0", (said,)), ("http://h/1", ("two lines",))]


def test_an_encoding_that_is_named_is_for_files_that_do_not_tell_theirs(tmp_path: Path) -> None:
    rows = "".join(f"http://h/{i},caf\xe9 {i}\n" if i == 7 else f"http://h/{i},{i}\n" for i in range(30))
    text = f"url,caption\n{rows}"
    for codec in ("utf-8", "cp1252"):
        assert rows_of(tmp_path / "a.csv", text.encode(codec), encoding="cp1252")[7] == ("http://h/7", ("café 7",))
    (flaw,) = [r.flaw for r in read_rows(str(tmp_path / "a.csv"), SourceRecipe(("a.csv",))) if r.reject]
    assert flaw == "line 9, column caption holds byte 0xe9, which is not UTF-8"
    assert len(rows_of(tmp_path / "a.csv", text.encode("utf-16-le")[:-1], encoding="utf-16-le")) == 29
    *_, cut = read_rows(str(tmp_path / "a.csv"), SourceRecipe(("a.csv",), encoding="utf-16-le"))
    assert (cut.reject, cut.flaw) == ("not_utf8", "line 31, column caption holds byte 0x0a, which is not utf-16-le")


TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=30)
QUOTING = st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])


def parsed(kind: str, text: str) -> list[list[str | None] | Flaw]:
    """References and captions as this process reads them."""
    return list(text_rows(io.BytesIO(text.encode()), Path(f"a.{kind}"), Budget(), ["url", "caption"], 2))


@given(captions=st.lists(TEXT, min_size=1, max_size=20), quoting=QUOTING, end=st.sampled_from(["\n", "\r\n"]))
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_what_csv_writes_is_read_as_it_was(kind: str, captions: list[str], quoting: int, end: str) -> None:
    table = [("caption", "url"), *((text, f"http://h/{i}") for i, text in enumerate(["a cat", *captions]))]
    delimiter = "," if kind == "csv" else "\t"
    text = csv_text(table, delimiter=delimiter, quoting=quoting, lineterminator=end)
    found = [(url, (caption or "").split()) for url, caption in parsed(kind, text)]
    assert found == [(url, caption.split()) for caption, url in table[1:]]


LINE = st.text(st.sampled_from("\",\t\\ab:/'; " + string.digits), max_size=30)


@given(data=st.data())
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_no_line_swallows_sound_rows(kind: str, data: st.DataObject) -> None:
    """Any lines among sound rows leave all of these as they are, and are rows themselves unless two belong together."""
    delimiter = "," if kind == "csv" else "\t"
    sound = [f"http://sound/{i}.jpg{delimiter}the {i}th cat" for i in range(12)]
    lines = [("sound", line) for line in sound]
    for _ in range(data.draw(st.integers(1, 6))):
        lines.insert(data.draw(st.integers(0, len(lines))), ("any", data.draw(LINE)))
    text = "\n".join([f"url{delimiter}caption", *(line for _, line in lines)])
    found = parsed(kind, text)
    kept = [row for row in found if not isinstance(row, Flaw) and (row[0] or "").startswith("http://sound/")]
    assert [row[1] for row in kept] == [f"the {i}th cat" for i in range(12)]
    others = [line for kind, line in lines if kind == "any" and line]
    assert len(found) - 12 <= len(others)
    if sum('"' in line for line in others) < 2:
        assert len(found) - 12 == len(others)


def test_relative_paths_count_from_a_folder_that_is_named(tmp_path: Path) -> None:
    """As in Flickr8k: captions.txt beside Images, whose rows name files in it."""
    (tmp_path / "lists").mkdir()
    (tmp_path / "Images").mkdir()
    path = tmp_path / "lists/captions.txt"
    (own, _), (gone, _) = rows_of(path, "image,caption\n1.jpg,a cat\nhttp://h/2.jpg,a dog\n")
    assert (own, gone) == (f"file://{tmp_path}/lists/1.jpg", "http://h/2.jpg")
    ((named, _), _) = rows_of(path, image_folder=str(tmp_path / "Images"))
    assert named == f"file://{tmp_path}/Images/1.jpg"
    assert rows_of(path, "image,caption\n../1.jpg,a cat\n", image_folder=str(tmp_path / "Images")) == []


# --- Parquet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0, 1, None], ["0", "1", ""]),
        ([False, True, None], ["False", "True", ""]),
        ([0.0, 1.5, float("nan")], ["0.0", "1.5", ""]),
        ([b"NA", b"1", None], ["NA", "1", ""]),
        (["0", "007", ""], ["0", "007", ""]),
    ],
)
def test_a_group_may_be_nought(tmp_path: Path, values: list, texts: list[str]) -> None:
    rows = [
        dict(zip(("url", "caption", "group"), row, strict=True))
        for row in zip(REFERENCES[:3], "abc", values, strict=True)
    ]
    paths = [tmp_path / "a.parquet"]
    pq.write_table(pa.Table.from_pylist(rows), paths[0])
    if not isinstance(values[0], bytes):
        paths.append(tmp_path / "a.jsonl")  # NaN as pandas and Python write it
        paths[1].write_text("\n".join(map(json.dumps, rows)))
    for path in paths:
        assert [row.group for row in read_rows(str(path), SourceRecipe((str(path),)))] == texts


def test_text_in_binary_columns_is_read_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"url": [b"http://h/0", b"http://h/1"], "caption": ["un café".encode(), b""]}), path)
    assert rows_of(path) == [("http://h/0", ("un café",)), ("http://h/1", ())]
    pq.write_table(pa.table({"url": ["http://h/0", "http://h/1"], "caption": [[b"a", None], [b"b", b"c"]]}), path)
    assert rows_of(path) == [("http://h/0", ("a",)), ("http://h/1", ("b", "c"))]
    pq.write_table(pa.table({"url": ["http://h/0", "http://h/1"], "caption": [float("nan"), 1.0]}), path)
    assert rows_of(path) == [("http://h/0", ()), ("http://h/1", ("1.0",))]


def test_columns_that_are_not_used_are_not_read(tmp_path: Path) -> None:
    """The bytes of the other column are damaged, and nothing notices."""
    path = tmp_path / "a.parquet"
    images = [bytes([i]) * 1000 for i in range(30)]
    columns = {"image": images, "url": REFERENCES, "caption": ["a cat"] * 30}
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False)
    place = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    data[place.data_page_offset : place.data_page_offset + place.total_compressed_size] = (
        b"\xff" * place.total_compressed_size
    )
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"."):
        pq.read_table(path)
    assert [url for url, _ in rows_of(path)] == REFERENCES


def test_large_values_are_read_few_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    captions = [chr(97 + i % 26) * 100_000 for i in range(40)]
    table = pa.table({"url": [f"http://h/{i}" for i in range(40)], "caption": captions, "unused": captions})
    pq.write_table(table, path, row_group_size=20, use_dictionary=False)
    with pq.ParquetFile(path) as file:
        batches = group_batches(file, 1, ["url", "caption"], 4096, 1 << 20)
        assert [batch.num_rows for batch in batches] == [10] * 2
    assert [captions for _, captions in rows_of(path)] == [(text[:4096],) for text in captions]  # is cut there


# --- a row a caption --------------------------------------------------------------------------------------------------


def test_what_is_merged_and_what_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "url,caption,split,group\n"
        "http://h/0,a,train,\nhttp://h/0,a,train,\nhttp://h/0,b,train,\n"  # the same caption counts once
        "http://h/0,c,test,\n"  # a held-out caption never joins a training row
        "http://h/1,d,,\nhttp://h/2,e,,\nhttp://h/1,f,,\n"  # not one behind the other
        ",g,,\n,h,,\n"  # no image
    )
    found = list(read_rows(str(path), SourceRecipe((str(path),))))
    assert [(row.url, row.captions) for row in found] == [
        ("http://h/0", ("a", "b")),
        ("http://h/0", ("c",)),
        ("http://h/1", ("d",)),
        ("http://h/2", ("e",)),
        ("http://h/1", ("f",)),
        ("", ("g",)),
        ("", ("h",)),
    ]
    many = tmp_path / "b.csv"
    many.write_text("url,caption\n" + "".join(f"http://h/0,{i:01000}\n" for i in range(1_000)))
    (row,) = read_rows(str(many), SourceRecipe((str(many),)))
    assert len(row.captions) == MAX_CAPTIONS // 1000


def test_long_captions_are_cut_and_long_references_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"url": "http://h/0", "caption": "a " * MAX_CAPTION},
        {"url": "http://h/1", "caption": ["b" * MAX_CAPTION] * (MAX_CAPTIONS // MAX_CAPTION) + ["c"]},
        {"url": "http://h/" + "d" * (8 << 10), "caption": "e"},
        {"url": "http://h/3", "caption": "f", "group": "g" * (8 << 10) + "h"},
        {"url": "http://h/4", "caption": ["i", None, "j"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = list(read_rows(str(path), SourceRecipe((str(path),))))
    whole = (("a " * MAX_CAPTION)[:MAX_CAPTION].strip(),), ("b" * MAX_CAPTION,) * (MAX_CAPTIONS // MAX_CAPTION)
    assert [row.captions for row in found] == [*whole, (), (), ("i", "j")]
    assert [row.reject for row in found] == [None, None, "unsupported_reference", "malformed_row", None]
