"""A list of strangers' that names what it may not: pipes, devices, sockets, links, other folders, tars, buckets."""

import os
import socket
from collections import Counter
from pathlib import Path

import pytest

from pipeline.data.pairs.peek import look
from tests.pipeline.data.bench import Bench, picture, write_list, write_tar

OUTSIDE = [
    "/etc/passwd", "/dev/zero", "/dev/stdin", "/dev/tty", "/dev/null", "/dev/fd/0", "/proc/self/environ",
    "/proc/self/mem", "/proc/1/environ", "/sys/power/state", "{home}/.ssh/id_ed25519", "{home}/.aws/credentials",
    "{folder}/../secret.png", "{folder}/inner/../../secret.png",
    "{folder}//../secret.png", "{folder}/%2e%2e/secret.png",
]  # fmt: skip
IN_PLACE = [
    "tar://{folder}/own.tar?offset=512&size=100", "tar:///dev/zero?offset=0&size=1000000000000",
    "tar:///proc/self/environ?offset=0&size=100", "tar://{folder}/pipe?offset=0&size=10",
    "tar://{folder}/own.tar?offset=-1&size=-1", "embedding://{folder}/a.npy?row=0", "embedding:///dev/zero?row=0",
    "tar://{folder}/../x.tar?offset=0&size=9", "tar://host{folder}/own.tar?offset=512&size=100",
    "s3://other-bucket/key", "s3://arn:aws:s3:us-east-1:1:accesspoint/x/key", "s3:///key", "s3://b/../c",
]  # fmt: skip
NOTHING = {"pipe": None, "socket": None, "folder": None, "inner": None, "absent.png": None, "a\0b.png": None}
LINKS = {
    "to-zero": "/dev/zero", "to-environ": "/proc/self/environ", "to-secret": "../secret.png", "to-folder": "..",
    "to-pipe": "pipe", "loop": "loop", "twice": "to-secret", "lost": "nowhere",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "list"
    (folder / "inner").mkdir(parents=True)
    (folder / "folder").mkdir()
    (tmp_path / "secret.png").write_bytes(picture(9))
    (folder / "own.png").write_bytes(picture(1))
    (folder / "to-own").symlink_to("own.png")
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    for name, target in LINKS.items():
        (folder / name).symlink_to(target)
    write_tar(folder / "own.tar", {"a.png": picture(2)})
    return folder


def test_a_list_reaches_its_own_files_and_nothing_else(folder: Path) -> None:
    """``init``'s look and the run end by themselves, and every row is counted once."""
    home = os.path.expanduser("~")
    rows = [text.format(folder=folder, home=home) for text in (*OUTSIDE, *IN_PLACE)]
    rows = [f"file://{row}" if i % 2 and row.startswith("/") else row for i, row in enumerate(rows)]
    rows += [f"file://{folder}/{name}".replace("\0", "%00") for name in (*NOTHING, *LINKS)]
    fine = [f"file://{folder}/to-own", f"{folder}/./inner/../own.png"]
    source = write_list(folder / "list.csv", [(row, f"row {i}") for i, row in enumerate([*rows, *fine])])
    bench = Bench(folder.parent / "store", [source], run={"pairs": {"retries": 0, "timeout_s": 3.0}})
    assert look(bench.config.source).rows > 0
    bench.make("source", "pairs")
    found = bench.rows("pairs")
    assert [row["url"] for row in found] == [*rows, *fine]
    kept = [row["url"] for row in found if row["status"] == "kept"]
    assert kept == fine
    reasons = Counter(row["reason"] for row in found if row["status"] != "kept")
    assert reasons.keys() <= {"forbidden_reference", "missing_file", "unsupported_reference"}
    assert sum(reasons.values()) == len(rows) >= 40
    assert reasons["forbidden_reference"] >= len(OUTSIDE) + len(IN_PLACE) - 4
    ledger = bench.made["pairs"].ledger
    assert (ledger.kept, dict(ledger.rejected)) == (len(fine), dict(reasons))
    assert b"root:" not in b"".join(bench.store.read(entry.path) for entry in bench.store.list(""))
