"""Lists as strangers write them, each with what becomes of its rows, or with a part of the line that refuses it."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

OVER = (1 << 20) + 10  # one character more than a row may have, and some
SOUND = 30  # rows of most lists, so that one that is not UTF-8 does not refuse them


@dataclass(frozen=True)
class List:
    """A file. ``ends``: for every row the reason for which the source rejects it, or None; ``refused``: a part of the
    message if the whole list is."""

    name: str
    data: bytes
    ends: tuple[str | None, ...] = ()
    refused: str = ""


def hostile_lists(references: Sequence[str]) -> list[List]:
    """The corpus, the same for the same references. At least 30 of these, distinct ones, which hold no comma."""
    assert len(set(references)) >= SOUND
    assert "," not in "".join(references)
    found = [
        *(one for kind in ("csv", "tsv") for one in text_lists(kind, references[:SOUND])),
        *encodings(references[:SOUND]),
        *headers(references[:SOUND]),
        *parquets(references[:SOUND]),
    ]
    assert len({each.name for each in found}) == len(found)
    return found


def text_lists(kind: str, references: Sequence[str]) -> Iterator[List]:
    """Quotation marks, ragged lines, NULs, ends of lines and giants, in a CSV or TSV file."""
    delimiter = "," if kind == "csv" else "\t"
    lines = [f"{url}{delimiter}a cat {i}" for i, url in enumerate(references)]
    head = f"url{delimiter}caption"
    bad = "malformed_row"
    literal = bad if kind == "csv" else None  # a TSV file takes them for themselves

    def listed(
        name: str, changes: dict[int, str], ends: dict[int, str | None], end: str = "\n", last: str = ""
    ) -> List:
        rows = [changes.get(i, line) for i, line in enumerate(lines)]
        data = end.join([head, *rows]) + (last or end)
        return List(
            f"{name}.{kind}", data.encode("utf-8", "surrogatepass"), tuple(ends.get(i) for i in range(len(rows)))
        )

    def row(i: int, caption: str) -> str:
        return f"{references[i]}{delimiter}{caption}"

    yield listed("sound", {}, {})
    yield listed("crlf", {}, {}, end="\r\n")
    yield listed("cr", {}, {}, end="\r")
    yield listed("blank-lines", {3: lines[3] + "\n\n", 9: lines[9] + "\r\n"}, {})
    yield listed("no-last-end", {}, {}, last=" ")
    yield listed("stray-first", {0: row(0, '"a cat')}, {0: literal})
    yield listed("stray-last", {29: row(29, '"a cat')}, {29: literal})
    yield listed("stray-then-inner", {5: row(5, '"a cat'), 20: row(20, 'they said "end" here')}, {5: literal})
    yield listed("stray-then-closing", {5: row(5, '"a cat'), 20: row(20, 'a screen of 5"')}, {5: literal})
    yield listed("stray-then-quoted", {5: row(5, '"a cat'), 20: row(20, '"a dog"')}, {5: literal})
    yield listed("two-strays", {5: row(5, '"a cat'), 6: row(6, '"a dog')}, {5: literal, 6: literal})
    yield listed("all-strays", {i: row(i, f'"cat {i}') for i in range(1, 30)}, dict.fromkeys(range(1, 30), literal))
    yield listed("title", {5: row(5, '"Mona Lisa" by Leonardo')}, {5: literal})
    yield listed("one-quote", {5: row(5, '"')}, {5: literal})
    yield listed("three-quotes", {5: row(5, '"""')}, {5: literal})
    yield listed("inches", {5: row(5, 'a 5" disk'), 6: row(6, 'a 3"')}, {})
    yield listed("quoted", {i: row(i, f'"a ""cat"" {i}"') for i in range(30)}, {})
    yield listed("lines-in-a-value", {5: row(5, '"a cat\nand a dog\r\n\non a mat"')}, {})
    yield listed("few", {5: references[5]}, {5: bad})
    yield listed("many", {5: row(5, f"a{delimiter}b")}, {5: bad})
    yield listed("white", {5: "  "}, {5: bad})
    yield listed("nul", {5: row(5, "a\0cat")}, {})
    yield listed("no-reference", {5: f"{delimiter}a cat"}, {5: "no_reference"})
    yield listed("null", {5: f"NULL{delimiter}a cat"}, {5: "no_reference"})
    yield listed("giant", {5: row(5, "x" * OVER)}, {5: bad})
    yield listed("giant-quoted", {5: row(5, '"' + "x" * OVER + '"')}, {5: bad})
    yield listed("giant-reference", {5: f'"{"x" * OVER}",a'}, {5: bad})
    surrogate = {5: row(5, "\ud800")}
    yield listed("surrogate", surrogate, {5: "not_utf8"})
    open_ended = [head, lines[0], f'{references[1]}{delimiter}"', *["x" * 999] * 1100]
    ends = (None, literal, *[bad] * 1100)
    yield List(f"stray-before-a-mebibyte.{kind}", "\n".join(open_ended).encode(), ends)


def encodings(references: Sequence[str]) -> Iterator[List]:
    """Files that are not UTF-8, in part or throughout, and marks of byte order."""
    texts = [f"{url},café {i}" for i, url in enumerate(references)]
    text = "\n".join(["url,caption", *texts])
    yield List("bom.csv", text.encode("utf-8-sig"), (None,) * 30)
    for name, codec, refused in (
        ("latin-1", "latin-1", "byte .* of line 2 is 0xe9"), ("windows-1252", "cp1252", "café' in cp1252"),
        ("mac", "mac-roman", "café' in mac_roman"), ("utf-16-be", "utf-16-be", "a NUL"),
        ("utf-16-le", "utf-16-le", "a NUL"),
    ):  # fmt: skip
        yield List(f"{name}.csv", text.encode(codec), refused=refused)
    for codec in ("utf-16", "utf-32"):  # with a mark
        yield List(f"{codec}.csv", text.encode(codec), (None,) * 30)
    for name, value in (
        ("latin", b"caf\xe9"),
        ("overlong", b"\xc0\xaf"),
        ("cut", b"\xe2\x82"),
        ("high", b"\xf5\x80\x80\x80"),
    ):
        rows = [line.encode() for line in texts]
        rows[5] = references[5].encode() + b"," + value
        rows[7] = b"http://h/" + value + b",a cat"
        ends = ("not_utf8" if i in (5, 7) else None for i in range(30))
        yield List(f"one-{name}.csv", b"\n".join([b"url,caption", *rows]), tuple(ends))
    rows = [line.encode() + b",seen" for line in texts]
    rows[5] = rows[5][:-4] + b"\xe9t\xe9"
    yield List("unused-column.csv", b"\n".join([b"url,caption,note", *rows]), (None,) * 30)
    yield List("binary.csv", bytes(range(256)) * 9, refused="a NUL|not UTF-8")


def headers(references: Sequence[str]) -> Iterator[List]:
    """First lines that are hard to read."""
    rows = "".join(f"{url},00{i}\n" for i, url in enumerate(references)).encode()
    yield List("quoted-header.csv", b'"url","caption"\n' + rows, (None,) * 30)
    yield List("quoted-bom.csv", b'\xef\xbb\xbf"url","caption"\n' + rows, (None,) * 30)
    twin = b"".join(line + b",x\n" for line in rows.splitlines())
    yield List("twice.csv", b"url,caption,caption\n" + twin, refused="2 columns are called caption")
    yield List("delimiter-in-header.csv", b'url,caption,"a,b"\n' + twin, (None,) * 30)
    yield List("other-columns.csv", b"link,TEXT\n" + rows, refused="no column url; it has link, TEXT")
    yield List("semicolons.csv", (b"url,caption\n" + rows).replace(b",", b";"), (None,) * 30)
    yield List("no-header.csv", rows, refused="line 1 must name the columns, but is a row")
    yield List("open-header.csv", b'url,"caption\n' + rows, refused="line 1.*stray quotation mark")
    yield List("empty.csv", b"", refused="the file is empty")
    yield List(
        "no-captions.csv", b"url,caption\n" + b"".join(f"{u},\n".encode() for u in references), refused="caption"
    )
    ragged = b"url,caption,x\n" + rows
    yield List("all-ragged.csv", ragged, refused="line 2 has 2 values, where line 1 names 3 columns")


def parquets(references: Sequence[str]) -> Iterator[List]:
    """Columns of all types."""
    texts = [f"a cat {i}" for i in range(30)]
    urls = list(references)
    invalid = pa.array([b"caf\xe9" if i == 5 else t.encode() for i, t in enumerate(texts)])
    broken = pa.StringArray.from_buffers(30, invalid.buffers()[1], invalid.buffers()[2])
    one_bad = tuple("not_utf8" if i == 5 else None for i in range(30))
    lists = pa.ListArray.from_arrays(pa.array(range(31), pa.int32()), broken)
    for name, captions in (
        ("binary", pa.array([t.encode() for t in texts])), ("dictionary", pa.array(texts).dictionary_encode()),
        ("large", pa.array(texts, pa.large_string())), ("lists", pa.array([[t, None, ""] for t in texts])),
        ("numbers", pa.array(range(30))), ("some-nan", pa.array([float("nan"), *range(29)], pa.float64())),
    ):  # fmt: skip
        yield List(f"{name}.parquet", _parquet(url=urls, caption=captions), (None,) * 30)
    yield List("broken-binary.parquet", _parquet(url=urls, caption=invalid), one_bad)
    yield List("broken-text.parquet", _parquet(url=urls, caption=broken), one_bad)
    yield List("broken-lists.parquet", _parquet(url=urls, caption=lists), one_bad)
    giant = ["x" * OVER if i == 5 else t for i, t in enumerate(texts)]
    ends = tuple("malformed_row" if i == 5 else None for i in range(30))
    yield List("giant.parquet", _parquet(url=urls, caption=giant), ends)
    for name, captions in (
        ("struct", pa.array([{"en": t} for t in texts])), ("list-of-numbers", pa.array([[1]] * 30)),
        ("map", pa.array([[("en", t)] for t in texts], pa.map_(pa.string(), pa.string()))),
        ("list-of-lists", pa.array([[["a"]]] * 30)), ("digest", pa.array([b"12"] * 30, pa.binary(2))),
    ):  # fmt: skip
        yield List(f"{name}.parquet", _parquet(url=urls, caption=captions), refused="column caption holds")
    yield List("struct-url.parquet", _parquet(url=[{"path": "a.png"}] * 30, caption=texts), refused="column url holds")
    yield List("group-lists.parquet", _parquet(url=urls, caption=texts, group=[[1]] * 30), refused="column group holds")
    nan = pa.array([float("nan")] * 30)
    yield List("all-nan.parquet", _parquet(url=urls, caption=nan), refused="column caption is empty")
    whole = _parquet(url=urls, caption=texts)
    for name, data in (
        ("cut", whole[:-50]), ("middle", whole[:4] + bytes(200) + whole[204:]), ("text", b"url,caption\n"),
        ("nothing", b""),
    ):  # fmt: skip
        yield List(f"{name}.parquet", data, refused="cannot be read")
    names = pa.table([pa.array(urls), pa.array(texts), pa.array(texts)], names=["url", "caption", "caption"])
    yield List("twice.parquet", _written(names), refused="2 columns are called caption")


def _parquet(**columns: object) -> bytes:
    return _written(pa.table(columns))


def _written(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def csv_text(rows: Sequence[Sequence[str]], **dialect: object) -> str:
    """Rows as csv.writer writes them."""
    out = io.StringIO(newline="")
    csv.writer(out, **dialect).writerows(rows)
    return out.getvalue()
