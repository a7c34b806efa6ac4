"""Readers of lists under generated and damaged files: they end with rows or one line, in time that the size allows."""

import gzip
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.source.imported import _open
from pipeline.data.source.parsers.child import Budget
from pipeline.data.source.parsers.text import text_rows
from pipeline.data.source.reader import ListReader
from pipeline.errors import UserError

SIZE = 30_000  # bytes of a repeated text, for which a reader of quadratic time takes seconds
WANTED = ["url", "caption", "split", "group"]
fuzzed = settings(
    derandomize=True,
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Readers:
    """One child for many files, and another where that has ended."""

    def __init__(self, folder: Path):
        self.folder, self.reader = folder, ListReader()

    def check(self, name: str, data: bytes, kind: str, *arguments: Any, crash: bool = False) -> None:
        """Reads a file. The child's own limit of processor time, 2 s and 2 s a MB, must not be met."""
        path = self.folder / name
        path.write_bytes(data)
        if self.reader.spent:
            self.reader.close()
        if self.reader._process is None:
            self.reader = ListReader()
        said = ""
        try:
            for _ in self.reader.rows(kind, path, len(arguments[0]) if arguments else 4, *arguments):
                pass
        except UserError as e:
            said = str(e)
        assert len(said.splitlines()) <= 1
        assert "processor time" not in said
        assert "Error:" not in said  # of Python, which is a bug in a reader
        assert crash or "reader" not in self.reader.spent


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Readers]:
    found = Readers(tmp_path_factory.mktemp("fuzz"))
    yield found
    found.reader.close()


# What readers look for, which random bytes seldom have.
TOKENS = ['"', '""', ",", "\t", "\n", "\r\n", "a", "http://h/1.jpg", "{", "}", "[", "]", ":", '"url"', "1e9", "\\ud800"]
odd = st.sampled_from(["\0", "é", "\ufeff", "\x1c", "\u2028", "caption", "null", "-"])
pieces = st.lists(st.sampled_from(TOKENS) | odd, min_size=1, max_size=6).map("".join)
texts = st.tuples(pieces, pieces, pieces).map(lambda found: found[0] + found[1] * (SIZE // len(found[1])) + found[2])


def headed(kind: str, text: str) -> bytes:
    return {"csv": "url,caption\n", "tsv": "url\tcaption\n", "jsonl": '{"url": "a", "caption": "b"}\n'}[
        kind
    ].encode() + text.encode()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@fuzzed
@given(text=texts, times=st.integers(0, 2), damage=st.data())
def test_texts(readers: Readers, kind: str, text: str, times: int, damage: st.DataObject) -> None:
    """Plain ones, and ones that are compressed."""
    data = headed(kind, text)
    name, data = (f"a.{kind}.gz", gzip.compress(data * times, 1)) if times else (f"a.{kind}", data)
    readers.check(name, damaged(damage, data), "text", WANTED, 2)


def patterns() -> set[str]:
    """All texts of up to four marks, of which a repeated one can leave a quoted value open; one of each rotation."""
    drawn = ("".join(marks) for n in range(2, 5) for marks in product('",\na', repeat=n))
    return {min(text[i:] + text[:i] for i in range(len(text))) for text in drawn if '"' in text and "\n" in text}


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_no_pattern_of_quotation_marks_takes_quadratic_time(kind: str) -> None:
    """Four times as long a text takes four times as many calls, and sixteen times if reading is quadratic."""
    growth = {}
    for pattern in sorted(patterns()):
        short, long = (
            calls(kind, (pattern * (size // len(pattern))).replace(",", "," if kind == "csv" else "\t"))
            for size in (600, 2_400)
        )
        growth[pattern] = long / short
    assert {pattern: times for pattern, times in growth.items() if times > 6} == {}


def calls(kind: str, text: str) -> int:
    """Counts the calls, of Python's and of C's functions, that reading a text takes."""
    count, data = 0, headed(kind, text)

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(note)
    try:
        assert len(list(text_rows(io.BytesIO(data), Path(f"a.{kind}"), Budget(), WANTED, 2))) <= len(data)
    finally:
        sys.setprofile(None)
    return count


def damaged(draw: st.DataObject, data: bytes, most: int = 3) -> bytes:
    """Returns bytes with some of them changed, or cut; some stay as they are."""
    found = bytearray(data)
    for _ in range(draw.draw(st.integers(0, most))):
        found[draw.draw(st.integers(0, len(found) - 1))] = draw.draw(st.integers(0, 255))
    return bytes(found[: draw.draw(st.just(len(found)) | st.integers(1, len(found)))])


values = st.none() | pieces | st.just("x" * 100_000)
tables = st.fixed_dictionaries(
    {
        "url": st.lists(values, min_size=3, max_size=3),
        "caption": st.lists(values, min_size=3, max_size=3)
        | st.lists(st.none() | st.lists(values, max_size=3), min_size=3, max_size=3),
        "group": st.lists(st.none() | st.integers(-(2**40), 2**40), min_size=3, max_size=3)
        | st.lists(values, min_size=3, max_size=3),
    }
)


def parquet(columns: dict[str, list[Any]], times: int, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({name: pa.array(value * times) for name, value in columns.items()}), out, **options)
    return out.getvalue()


@fuzzed
@given(columns=tables, times=st.sampled_from([1, 50, 3000]), damage=st.data())
def test_parquet(readers: Readers, columns: dict[str, list[Any]], times: int, damage: st.DataObject) -> None:
    kind = damage.draw(st.sampled_from(["zstd", "snappy", "gzip", "none"]))
    whole = parquet(columns, times if "x" * 100_000 not in str(columns) else 1, compression=kind)
    # Arrow's C++ may die of damaged bytes, which is what the child is for.
    readers.check("a.parquet", damaged(damage, whole), "parquet", WANTED, 2, crash=True)


NAMES = ["images", "annotations", "licenses", "license", "id", "image_id", "image", "url", "caption", "file_name"]
NAMES += ["conversations", "from", "value", "tags", "coco_url"]
numbers = st.booleans() | st.integers(-9, 9) | st.just(float("nan"))
leaves = st.none() | numbers | pieces | st.sampled_from(["gpt", "a.jpg"])
objects = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=20,
)


@fuzzed
@given(found=objects, damage=st.data())
def test_annotations(readers: Readers, found: Any, damage: st.DataObject) -> None:
    readers.check("a.json", damaged(damage, json.dumps(found).encode()), "annotations", WANTED + ["license"] * 4)


@fuzzed
@given(
    members=st.lists(
        st.tuples(st.sampled_from(["a.jpg", "a.txt", "b.json", ".c", "d/e.png"]) | pieces, pieces), max_size=6
    ),
    times=st.sampled_from([1, 30]),
    layout=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    damage=st.data(),
)
def test_tars(readers: Readers, members: list[tuple[str, str]], times: int, layout: int, damage: st.DataObject) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=layout) as tar:
        for name, text in members * times:
            member = tarfile.TarInfo(name.replace("\0", "")[:90] or "a")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    readers.check("a.tar", damaged(damage, out.getvalue(), 10), "tar")


@fuzzed
@given(shape=st.lists(st.integers(0, 5), max_size=3), kind=st.sampled_from("efdiOS"), damage=st.data())
def test_matrices(readers: Readers, shape: list[int], kind: str, damage: st.DataObject) -> None:
    out = io.BytesIO()
    np.save(out, np.zeros(shape, kind), allow_pickle=True)
    path = readers.folder / "a.npy"
    path.write_bytes(damaged(damage, out.getvalue()))
    with suppress(ValueError):
        found = _open(path, None, readers.reader)
        assert found.dtype in (np.float16, np.float32)
        assert found.sum() is not None
