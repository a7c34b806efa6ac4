"""The one way to open a file of this machine, and what a list may name."""

import os
import socket
from pathlib import Path

import pytest

from pipeline.local import Outside, PathPolicy, TooLarge, local_path, open_local, read_local, reason_of
from tests.links import exchanging


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A list's folder with a file, and beside it a secret."""
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "list/inner").mkdir(parents=True)
    (tmp_path / "list/file").write_bytes(b"0123456789")
    return tmp_path / "list"


def irregular(folder: Path) -> list[str]:
    """What is in no way a regular file: pipes that nobody writes to or reads, devices, a folder, a socket."""
    os.mkfifo(folder / "pipe")
    (folder / "link to a pipe").symlink_to(folder / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(folder / "socket"))
    server.close()
    return [*(str(folder / name) for name in ("pipe", "link to a pipe", "socket", "")), "/dev/zero", "/dev/tty"]


def test_only_regular_files_are_opened_and_nothing_is_waited_for(folder: Path) -> None:
    for path in irregular(folder):
        for within in (None, PathPolicy(own=("/",))):
            with pytest.raises(OSError, match=r"not a regular file|Is a directory") as refused:
                open_local(path, within)
            assert reason_of(refused.value) == "missing_file"


def test_a_pipe_with_a_writer_is_not_read_either(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        writer = os.open(folder / "pipe", os.O_WRONLY)
        os.write(writer, b"bytes of somebody else")
        with pytest.raises(OSError, match="not a regular file"):
            read_local(folder / "pipe", 100)
        assert os.read(reader, 100) == b"bytes of somebody else"
        os.close(writer)
    finally:
        os.close(reader)


def test_a_file_that_becomes_a_pipe_meanwhile_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(folder / "pipe")
    sound = os.stat(folder / "file")
    monkeypatch.setattr("pipeline.local.os.stat", lambda path, **_: sound)
    with pytest.raises(OSError, match="not a regular file"):
        open_local(folder / "pipe")


def test_who_exchanges_folders_for_links_leads_no_reader_out(folder: Path) -> None:
    reach = PathPolicy(own=(str(folder),))
    outside, inner = folder.parent / "outside", folder / "inner"
    outside.mkdir()
    (outside / "a").write_bytes(b"a secret")
    (inner / "a").write_bytes(b"ours")
    refused = 0
    with exchanging(inner, outside):
        for _ in range(5000):
            try:
                assert read_local(inner / "a", 100, reach) == b"ours"
            except OSError:
                refused += 1
    assert refused > 10


def test_bytes_are_limited(folder: Path) -> None:
    path = folder / "file"
    assert read_local(path, 10) == b"0123456789"
    assert read_local(path, 4, offset=3, size=4) == b"3456"
    assert read_local(path, 100, offset=8, size=50) == b"89"
    assert read_local(path, 100, offset=50, size=50) == b""
    for limit, size in ((9, None), (9, 10), (100, 10**12)):
        with pytest.raises(TooLarge) as refused:
            read_local(path, limit, size=size)
        assert reason_of(refused.value) == "too_large"
    for offset in (2**63 - 1, 10**30):
        with pytest.raises(OSError, match="Invalid argument") as missing:
            read_local(path, 10, offset=offset, size=9)
        assert reason_of(missing.value) == "missing_file"


def test_links_lead_nowhere_outside(folder: Path) -> None:
    reach = PathPolicy(own=(str(folder),))
    (folder / "inside").symlink_to("inner/../file")
    (folder / "out").symlink_to("../secret")
    (folder / "far").symlink_to("out")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    (folder / "neighbour").symlink_to(f"{folder}s")
    (folder.parent / "lists").write_bytes(b"another folder of nearly the same name")
    assert read_local(folder / "inside", 100, reach) == b"0123456789"
    for name in ("out", "far", "up/secret", "../secret", "neighbour", "inner/../../secret", "up/list/../secret"):
        with pytest.raises(Outside) as refused:
            open_local(folder / name, reach)
        assert reason_of(refused.value) == "forbidden_reference"
    for name, why in (("loop", "Too many levels"), ("none", "No such file"), ("nul\0", "a path has no NUL")):
        with pytest.raises(OSError, match=why) as missing:
            open_local(folder / name, reach)
        assert reason_of(missing.value) == "missing_file"
    wider = PathPolicy.of((str(folder),), (str(folder.parent / "secret"),))
    assert read_local(folder / "out", 100, wider) == b"secret"
    assert read_local(folder / "out", 100) == b"secret"  # what a command names may be a link to anywhere


def test_a_folder_that_is_a_link_itself_is_what_it_leads_to(folder: Path) -> None:
    linked = folder.parent / "linked"
    linked.symlink_to(folder)
    reach = PathPolicy(own=(str(linked),))
    for place in (linked, folder):
        assert reach.refusal(f"{place}/file") is None
        assert read_local(place / "file", 100, reach) == b"0123456789"
    (folder / "out").symlink_to("../secret")
    with pytest.raises(Outside):
        open_local(linked / "out", reach)


FORBIDDEN = [
    "/etc/passwd", "file:///etc/passwd", "file://localhost/etc/passwd", "FILE:///etc/passwd", "fi\tle:///etc/passwd",
    "file:///lists/../etc/passwd", "file:///lists/%2e%2e/etc/passwd", "/lists/../etc/passwd", "file:///lists2/a.png",
    "file:/etc/passwd", "//etc/passwd", "tar:///lists/a.tar?offset=0&size=9", "tar:///etc/a.tar?offset=0&size=9",
    "tar:///roots/../etc/a.tar?offset=0&size=9", "tar:///roots/%2e%2e/etc/a.tar?offset=0&size=9",
    "embedding:///lists?part=0&row=0", "embedding:///etc?part=0&row=0",
    "s3://other/a.png", "s3://images2/a.png", "s3://images", "s3://shared/a.png", "s3://shared/sets2/a.png",
    "s3://shared/sets/../a.png", "S3://images/a.png", "s3:images/a.png",
    "s3://arn:aws:s3:us-east-1:123456789012:accesspoint:mine/a.png",
]  # fmt: skip
NAMED = [
    "", "http://h/a.png", "https://h/../etc/passwd", "/lists/a.png", "/lists/inner/../a.png", "file:///lists/a%20b.png?2",
    "/roots/a.png", "/one.tar", "tar:///roots/a.tar?offset=0&size=9#a.png", "tar:///one.tar?offset=0&size=9",
    "embedding:///roots?part=0&row=0", "s3://images/a.png", "s3://images/b//c.png", "s3://shared/sets/a.png",
    "ftp://h/a.png", "gs://bucket/a.png", "a.png", "file:a.png", "file://host/a.png", "http://[::1", "tar://[/a.tar",
]  # fmt: skip


def test_a_table_names_what_is_its_own_and_what_roots_name() -> None:
    reach = PathPolicy.of(("/lists",), ("/roots", "/one.tar", "s3://images", "s3://shared/sets/"))
    assert {reference: reach.refusal(reference) for reference in FORBIDDEN} == dict.fromkeys(
        FORBIDDEN, "forbidden_reference"
    )
    assert {reference: reach.refusal(reference) for reference in NAMED} == dict.fromkeys(NAMED)
    nothing = PathPolicy()
    assert all(nothing.refusal(reference) for reference in FORBIDDEN)
    assert nothing.refusal("https://h/a.png") is None
    assert nothing.refusal("/lists/a.png") == nothing.refusal("s3://images/a.png") == "forbidden_reference"
    assert PathPolicy.of((), ("/",)).refusal("/etc/passwd") is None


def test_roots_are_paths_or_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ana")
    assert PathPolicy.of((), ("~/images", "sets")).roots == ("/home/ana/images", os.path.abspath("sets"))
    for root in ("", "s3://", "s3:///", "file:///a", "https://h/", "gs://bucket"):
        with pytest.raises(ValueError, match="is neither a path nor s3://BUCKET"):
            PathPolicy.of((), (root,))


def test_paths_of_references() -> None:
    assert local_path("file:///a%20b%231.png") == local_path("/a b#1.png") == "/a b#1.png"
    assert local_path("file:///caf%E9.png") == "/caf\udce9.png"
    assert [local_path(other) for other in ("a.png", "file:a.png", "file://host/a.png", "s3://b/a.png")] == [None] * 4
    for reference, why in (("/nul\0", "no NUL"), ("file:///nul%00", "no NUL"), ("http://[::1", "Invalid IPv6")):
        with pytest.raises(ValueError, match=why):
            local_path(reference)
