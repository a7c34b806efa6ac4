"""Lists of prompts of every kind: the right column, every row accounted for, a bad one alone lost."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.sampling.prompts import find_column, read_prompts

ROWS = 100
PROMPTS = ["a red fox", 'a "nice" dog, asleep', "une fenêtre", "寺", "two\nlines"]


def read(path: Path, **options: Any) -> list[tuple[str, int, str | None]]:
    """Prompt, seed and reason of every row; keys count them."""
    parts = list(read_prompts(path, 0, 3, **options))
    assert [key for part in parts for key in part["key"]] == [
        f"{i:010d}" for i in range(sum(len(p["key"]) for p in parts))
    ]
    columns = [[value for part in parts for value in part[name]] for name in ("prompt", "seed", "reject")]
    return list(zip(*columns, strict=True))


def write(path: Path, name: str, prompts: list[str]) -> Path:
    rows = [{"url": f"http://a/{i}", name: prompt} for i, prompt in enumerate(prompts)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            writer.writerows([["url", name], *(row.values() for row in rows)])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".TSV"])
@pytest.mark.parametrize("column", ["prompt", "caption", "TEXT", "words"])
def test_a_table_is_read_by_its_column(tmp_path: Path, suffix: str, column: str) -> None:
    """Commas, quotes, other scripts and line breaks in a value; the header is not a prompt."""
    path = write(tmp_path / f"list{suffix}", column, PROMPTS)
    asked = column if column == "words" else None
    assert find_column(path, asked) == column
    assert read(path, column=asked) == [(prompt, i, None) for i, prompt in enumerate(PROMPTS)]


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("\ufeffa fox\n\n  url,caption \n寺".encode())
    assert read(tmp_path / "list.txt") == [("a fox", 0, None), ("url,caption", 1, None), ("寺", 2, None)]


def test_seeds_of_a_table_are_its_own(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a", "b", "c"], "seed": [7.0, None, 2.0]}), tmp_path / "list.parquet")
    assert read(tmp_path / "list.parquet") == [("a", 7, None), ("b", 1, None), ("c", 2, None)]


def test_of_several_captions_the_first_is_drawn(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": [["a", "b"], [], None]}), tmp_path / "list.parquet")
    assert read(tmp_path / "list.parquet") == [("a", 0, None), ("", 1, "no_caption"), ("", 2, "no_caption")]


MALFORMED = [b'"open', b'"open" shut', b"one,value,more", b"a,-1", b"a,x", b"a,1.5", b"a," + b"9" * 20, b'"a""b,']


@pytest.mark.parametrize(("bad", "reason"), [*((bad, "malformed_row") for bad in MALFORMED), (b"caf\xe9,", "not_utf8")])
def test_a_bad_row_of_a_csv_costs_itself(tmp_path: Path, bad: bytes, reason: str) -> None:
    rows = [f"prompt {i}," for i in range(2 * ROWS)]
    lines = [b"caption,seed", *(row.encode() for row in rows[:ROWS]), bad, *(row.encode() for row in rows[ROWS:])]
    (tmp_path / "list.csv").write_bytes(b"\r\n".join(lines))
    found = read(tmp_path / "list.csv")
    assert found.pop(ROWS) == ("", ROWS, reason)
    assert [prompt for prompt, *_ in found] == [row[:-1] for row in rows]
    assert {reason for *_, reason in found} == {None}


@pytest.mark.parametrize(
    "bad", [b"{", b"[1]", b"", b'{"caption": 5}', b'{"caption": "\\ud800"}', b'{"caption": "\xe9"}']
)
def test_a_bad_row_of_a_jsonl_costs_itself(tmp_path: Path, bad: bytes) -> None:
    good = [b'{"caption": "a"}', b'{"caption": "b"}']
    (tmp_path / "list.jsonl").write_bytes(b"\n".join([good[0], bad, good[1]]))
    lost = [("", 1, "not_utf8" if b"\xe9" in bad or b"ud8" in bad else "malformed_row")] if bad else []
    assert read(tmp_path / "list.jsonl") == [("a", 0, None), *lost, ("b", 1 + len(lost), None)]


def test_a_value_of_a_parquet_that_is_not_text_costs_its_row(tmp_path: Path) -> None:
    values = pa.array([b"a", b"caf\xe9", b"c"], pa.binary())
    text = values.view(pa.string())
    kinds = {"binary": values, "text": text, "large": text.cast(pa.large_binary()).view(pa.large_string())}
    for name, column in kinds.items():
        pq.write_table(pa.table({"caption": column}), tmp_path / f"{name}.parquet")
        assert read(tmp_path / f"{name}.parquet") == [("a", 0, None), ("", 1, "not_utf8"), ("c", 2, None)]


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("none.txt", None, None, "cannot be read"),
        ("none.csv", None, None, "cannot be read"),
        ("empty.txt", b"\n \n", None, "no prompts in it"),
        ("empty.csv", b"", None, "no column prompt, caption or text; it has none"),
        ("head.csv", b"caption\n", None, "no prompts in it"),
        ("list.json", b"[]", None, "not a list of prompts; give a .txt with a prompt a line"),
        ("list.csv.gz", b"", None, "not a list of prompts"),
        ("list", b"a fox", None, "not a list of prompts"),
        ("list.txt", b"a fox", "caption", "a text file has no column caption"),
        ("bad.parquet", b"PAR1", None, "cannot be read"),
        (
            "other.parquet",
            {"words": ["a"]},
            None,
            "no column prompt, caption or text; it has words; name one with --column",
        ),
        ("other.parquet", {"caption": ["a"]}, "words", "no column words; it has caption"),
    ],
)
def test_lists_that_cannot_be_read_are_named(
    tmp_path: Path, name: str, content: Any, column: str | None, message: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        pq.write_table(pa.table(content), path)
    with pytest.raises(UserError, match=f"{name}: .*{message}"):
        list(read_prompts(path, 0, 2, column))
