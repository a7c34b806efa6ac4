"""The search for secrets finds them."""

import base64
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipeline.graph.artifacts import write_table
from tests.chain import open_at
from tests.secrets import leaks, objects

SECRET = "pw/8+Zq~tiger-of-the-north"
SECRETS = {"password": SECRET, "other": "not-in-any-of-these"}


def _tar(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("a.json.gz")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _zip(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.txt", data)
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        f"password: {SECRET}".encode(),
        b"s3://key:pw%2F8%2BZq~tiger-of-the-north@bucket",
        *(base64.b64encode(before + SECRET.encode() + b" and more") for before in (b"", b"a", b"ab", b"abc")),
        gzip.compress(json.dumps([SECRET]).encode(), mtime=0),
        _zip(SECRET.encode()),
        _tar(gzip.compress(SECRET.encode(), mtime=0)),
        write_table({"key": ["a", "b"], "url": ["x", f"https://u:{SECRET}@host/"]}),
        write_table({"bytes": [SECRET.encode()]}),
        write_table({"lists": [["a", SECRET]]}),
    ],
)
def test_a_secret_is_found_however_it_is_packed(data: bytes) -> None:
    assert leaks([("place", data)], SECRETS) == ["place: password"]


def test_files_in_folders_and_objects_of_a_store(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/log").write_text(f"said {SECRET}")
    (tmp_path / "a/link").symlink_to(tmp_path / "a/b/log")
    assert leaks([tmp_path], SECRETS) == [f"{tmp_path}/a/b/log: password"]
    store = open_at(tmp_path / "store")
    store.create("blobs/x", b"fine")
    assert leaks(objects(store), SECRETS) == []
    store.create("runs/not-in-any-of-these.json", SECRET.encode())
    assert leaks(objects(store), SECRETS) == ["names: other", "runs/not-in-any-of-these.json: password"]
