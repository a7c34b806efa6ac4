"""A file that a recipe names, by its path or by its sha256."""

from pathlib import Path

import pytest

from pipeline.data.content import put_content, read_content
from pipeline.errors import UserError
from pipeline.parse import ContentFile
from pipeline.store import Store, open_store
from pipeline.store.records import read_blob

WHERE = "stage.field"


def put_and_read(store: Store, file: ContentFile) -> bytes:
    put_content(store, file, WHERE)
    return read_content(store, file, WHERE, 7)


def test_by_its_path_and_by_its_sha256_it_is_the_same(tmp_path: Path) -> None:
    store, file = open_store(str(tmp_path / "store")), tmp_path / "file"
    file.write_bytes(b"content")
    by_path = ContentFile.at(str(file), WHERE)
    assert put_and_read(store, by_path) == b"content"
    assert put_and_read(store, ContentFile.at(str(by_path), WHERE)) == b"content"
    assert read_blob(store, by_path) == b"content"


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    store, file = open_store(str(tmp_path / "store")), tmp_path / "file"
    file.write_bytes(b"content")
    named, absent = ContentFile.at(str(file), WHERE), ContentFile.at("0" * 64, WHERE)
    with pytest.raises(UserError, match=r"^stage\.field: .*/file cannot be read \(more than 6 bytes\)$"):
        read_content(store, named, WHERE, 6)
    for change, wrong, said in (
        (lambda: file.write_bytes(b"another"), named, "/file changed during this command; run it again"),
        (file.unlink, named, "/file cannot be read "),
        (lambda: None, absent, r"blobs/00/0+: is missing in .*; name a file, or a blob of this store$"),
    ):
        change()
        for act in (lambda: put_content(store, wrong, WHERE), lambda: read_content(store, wrong, WHERE, 7)):  # noqa: B023
            with pytest.raises(UserError, match=rf"^stage\.field: .*{said}"):
                act()
