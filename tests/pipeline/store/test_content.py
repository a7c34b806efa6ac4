"""A file that a recipe names, by its path or by its sha256."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.parse import ContentFile
from pipeline.store import open_store
from pipeline.store.content import put_content, read_content
from pipeline.store.records import put_blob, read_blob

WHERE = "stage.field"


def test_by_its_path_and_by_its_sha256_it_is_the_same(tmp_path: Path) -> None:
    store, file = open_store(str(tmp_path / "store")), tmp_path / "file"
    file.write_bytes(b"content")
    by_path = ContentFile.at(str(file), WHERE)
    assert read_content(store, by_path, WHERE, 7) == b"content"
    put_content(store, by_path, WHERE)
    assert read_blob(store, by_path) == b"content"
    by_name = ContentFile.at(str(by_path), WHERE)
    put_content(store, by_name, WHERE)
    assert read_content(store, by_name, WHERE, 7) == b"content"


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    store, file = open_store(str(tmp_path / "store")), tmp_path / "file"
    file.write_bytes(b"content")
    named = ContentFile.at(str(file), WHERE)
    with pytest.raises(UserError, match=r"^stage\.field: .*/file cannot be read \(more than 6 bytes\)$"):
        read_content(store, named, WHERE, 6)
    file.write_bytes(b"another")
    changed = r"^stage\.field: .*/file has changed since it was named; run the same command again$"
    with pytest.raises(UserError, match=changed):
        put_content(store, named, WHERE)
    with pytest.raises(UserError, match=changed):
        read_content(store, named, WHERE, 7)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        put_content(store, named, WHERE)
    with pytest.raises(UserError, match="cannot be read"):
        read_content(store, named, WHERE, 7)
    absent = ContentFile.at("0" * 64, WHERE)
    missing = r"^stage\.field: blobs/00/0+: is missing in .*; name a file, or a blob of this store$"
    with pytest.raises(UserError, match=missing):
        put_content(store, absent, WHERE)
    with pytest.raises(UserError, match=missing):
        read_content(store, absent, WHERE, 7)
    assert put_blob(store, b"another") != named
