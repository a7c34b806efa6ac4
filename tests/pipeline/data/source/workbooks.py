"""A writer of spreadsheets."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

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
