"""Writing past the page cache: whole blocks go to the disk directly, and what cannot goes the plain way."""

import errno
import fcntl
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.store import direct
from pipeline.store.direct import DIRECT, write_direct

BLOCK = 1 << 14
BUFFERS = st.lists(st.binary(max_size=3) | st.integers(0, 3 * BLOCK).map(os.urandom), max_size=4)


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Bytes of each write, in blocks of BLOCK, and whether they went to the disk directly."""
    monkeypatch.setattr(direct, "BLOCK", BLOCK)
    write, found = os.write, []

    def spy(descriptor: int, data: memoryview) -> int:
        count = write(descriptor, data)
        found.append((count, is_direct(descriptor)))
        return count

    monkeypatch.setattr(os, "write", spy)
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(buffers=BUFFERS)
def test_what_is_written_can_be_read(written: list[Any], tmp_path: Path, buffers: list[bytes]) -> None:
    write_direct(tmp_path / "file", [memoryview(buffer) for buffer in buffers])
    assert (tmp_path / "file").read_bytes() == b"".join(buffers)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux writes past the page cache")
def test_whole_blocks_are_written_directly(written: list[tuple[int, bool]], tmp_path: Path) -> None:
    with open(tmp_path / "probe", "wb", buffering=0) as probe:
        try:
            fcntl.fcntl(probe, fcntl.F_SETFL, DIRECT)
        except OSError:
            pytest.skip("the file system of this folder cannot write directly")
    write_direct(tmp_path / "file", [memoryview(bytes(n)) for n in (BLOCK - 1, 2, BLOCK)])
    assert written == [(BLOCK, True), (BLOCK, True), (1, False)]


def test_a_file_system_that_cannot_is_written_to_plainly(
    written: list[tuple[int, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(2 * BLOCK)
    spy = os.write

    def refused(descriptor: int, data: memoryview) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, "refused")
        return spy(descriptor, data)

    monkeypatch.setattr(os, "write", refused)
    write_direct(tmp_path / "file", [memoryview(data)])
    assert written == [(BLOCK, False), (BLOCK, False)]
    control = fcntl.fcntl

    def told_when_asked(descriptor: int, command: int, *flags: int) -> int:
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, "refused")
        return control(descriptor, command, *flags)

    monkeypatch.setattr(fcntl, "fcntl", told_when_asked)
    write_direct(tmp_path / "other", [memoryview(data)])
    assert (tmp_path / "file").read_bytes() == (tmp_path / "other").read_bytes() == data


def test_a_full_disk_is_told(written: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="full"):
        write_direct(tmp_path / "file", [memoryview(b"1")])
