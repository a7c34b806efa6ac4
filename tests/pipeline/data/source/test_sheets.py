"""Spreadsheets as Excel saves them: texts by their number in a table of their own, several sheets, numbers."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from pipeline.data.source.lists import read_rows
from pipeline.data.source.parsers import sheets
from pipeline.data.source.parsers.child import Budget
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import ListRow
from pipeline.errors import UserError

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
Rows = Sequence[Sequence[object]]


def write(path: Path, books: Mapping[str, Rows], hidden: str = "") -> Path:
    """Writes a workbook of sheets by name."""
    texts: dict[str, int] = {}

    def cell(row: int, column: int, value: object) -> str:
        place = f'r="{chr(65 + column)}{row}"'
        if isinstance(value, str):
            return f'<c {place} t="s"><v>{texts.setdefault(value, len(texts))}</v></c>' if value else ""
        return f'<c {place} t="b"><v>{value:d}</v></c>' if isinstance(value, bool) else f"<c {place}><v>{value}</v></c>"

    found = {}
    for number, rows in enumerate(books.values(), 1):
        lines = ("".join(cell(r, c, value) for c, value in enumerate(row)) for r, row in enumerate(rows, 1))
        data = "".join(f'<row r="{r}">{line}</row>' for r, line in enumerate(lines, 1))
        found[f"xl/worksheets/sheet{number}.xml"] = (
            f'<worksheet xmlns="{MAIN}"><sheetData>{data}</sheetData></worksheet>'
        )
    listed, linked = "", f'<Relationship Id="rId0" Type="{OFFICE}/sharedStrings" Target="sharedStrings.xml"/>'
    for number, name in enumerate(books, 1):
        state = ' state="hidden"' if name == hidden else ""
        listed += f'<sheet name="{name}" sheetId="{number}"{state} r:id="rId{number}"/>'
        linked += f'<Relationship Id="rId{number}" Type="{OFFICE}/worksheet" Target="worksheets/sheet{number}.xml"/>'
    relations = f'<Relationships xmlns="{PACKAGE}/relationships">{{}}</Relationships>'
    office = f'<Relationship Id="rId1" Type="{OFFICE}/officeDocument" Target="xl/workbook.xml"/>'
    found |= {
        "_rels/.rels": relations.format(office),
        "xl/_rels/workbook.xml.rels": relations.format(linked),
        "xl/workbook.xml": f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}"><sheets>{listed}</sheets></workbook>',
        "xl/sharedStrings.xml": f'<sst xmlns="{MAIN}">'
        + "".join(f'<si><t xml:space="preserve">{escape(text)}</t></si>' for text in texts)
        + "</sst>",
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="xml" '
        'ContentType="application/xml"/></Types>',
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, text in found.items():
            out.writestr(name, f'<?xml version="1.0" encoding="UTF-8"?>{text}')
    return path


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
