"""Spreadsheets as Excel saves them: texts by their number in a table of their own, several sheets, numbers."""

from pathlib import Path

import pytest

from pipeline.data.source.lists import read_rows
from pipeline.data.source.parsers import sheets
from pipeline.data.source.parsers.child import Budget
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import ListRow
from pipeline.errors import UserError
from tests.pipeline.data.source.workbooks import Rows, write


def rows_of(path: Path) -> list[ListRow]:
    return list(read_rows(str(path), SourceRecipe((str(path),))))


def test_the_first_sheet_with_values_is_a_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "unclip")
    rows: Rows = [
        ["Nr", "image", " caption ", "split", "group"],
        [1, "http://h/0.jpg", "ein Mädchen & ein Hund, das läuft", "test", 7],
        [],
        [2, "1.jpg", 12, "", 7.5],
        [3, "http://h/2.jpg", "two\nlines", "", True],
        [4, "", "none", "", ""],
        [5, "http://h/3.jpg", "x" * (1 << 15), "", ""],
    ]
    books = {"Notizen": [["x", "y"]], "Leer": [], "Bilder": rows, "Mehr": rows[:1]}
    found = rows_of(write(tmp_path / "a.xlsx", books, hidden="Notizen"))
    assert [(row.url, row.captions[0][:40], row.split, row.group) for row in found] == [
        ("http://h/0.jpg", "ein Mädchen & ein Hund, das läuft", "test", "7"),
        (f"file://{tmp_path}/1.jpg", "12", "", "7.5"),
        ("http://h/2.jpg", "two lines", "", "True"),
        ("", "none", "", ""),
        ("http://h/3.jpg", "x" * 40, "", ""),
    ]
    assert "a.xlsx: of 3 sheets 'Bilder' is read" in caplog.text


@pytest.mark.parametrize(
    ("books", "said"),
    [
        ({"A": []}, "all sheets are empty"),
        ({"A": [["1.jpg", "a cat"]]}, r"line 1 must name the columns.*such as url \| caption"),
        ({"A": [["link", "text"], ["a", "b"]]}, "no column url; it has link, text"),
    ],
)
def test_a_sheet_that_is_no_list_is_refused(tmp_path: Path, books: dict[str, Rows], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        rows_of(write(tmp_path / "a.xlsx", books))
    assert "\n" not in str(error.value)


def test_what_is_no_spreadsheet_is_refused_in_a_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.xlsx", {"A": [["url", "caption"], ["http://h/0.jpg", "a cat"]]}).read_bytes()
    for data in (b"", b"PK\3\4", b"url,caption\n", whole[:-40], whole[:200] + b"\xff" * 40 + whole[240:]):
        (tmp_path / "a.xlsx").write_bytes(data)
        with pytest.raises(UserError, match=r"a\.xlsx: not a spreadsheet that can be read \(.*\)") as error:
            rows_of(tmp_path / "a.xlsx")
        assert "\n" not in str(error.value)


def test_without_its_package_the_line_to_install_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheets, "calamine", None)
    path = write(tmp_path / "a.xlsx", {"A": [["url", "caption"]]})
    with path.open("rb") as file, pytest.raises(UserError, match=r"pip install 'python-calamine>=0\.7,<1'; or save"):
        list(sheets.sheet_rows(file, path, Budget(), ["url", "caption"], 2))
