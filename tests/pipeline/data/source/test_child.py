"""The child process that reads lists: what it may do, how it ends, and what hostile lists cost."""

import gzip
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.source import reader
from pipeline.data.source.columns import MAX_CAPTIONS, Flaw
from pipeline.data.source.lists import read_rows
from pipeline.data.source.parsers.child import CHARACTERS
from pipeline.data.source.reader import ListReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.stage import scan
from pipeline.errors import UserError
from pipeline.store import Store
from tests.chain import ROOT

PROBES = (
    "import pipeline.data.source.parsers.child as c; c.SECONDS = 0.1, 0;"
    "c.READERS[{0!r}] = 'tests.pipeline.data.source.probes:{1}'; c.main()"
)


@pytest.fixture
def kept_children() -> None:
    """None here: each list of these tests has a child of its own, as outside of tests."""


def probed(monkeypatch: pytest.MonkeyPatch, kind: str, probe: str) -> None:
    """Lets children read files of a kind by a reader of probes.py."""
    monkeypatch.setattr(reader, "_COMMAND", (sys.executable, "-P", "-c", PROBES.format(kind, probe)))


def test_the_child_has_no_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    probed(monkeypatch, "text", "rights")
    with socket.create_server(("127.0.0.1", 0)) as server, ListReader() as lists:
        path = tmp_path / f"{server.getsockname()[1]}.csv"
        path.write_bytes(b"x")
        found = dict(lists.rows("text", path, 2))
    assert found.pop("secret") is None
    assert found["write"] == "refused"
    namespaces = subprocess.run(["unshare", "-Un", "true"], capture_output=True).returncode == 0
    if os.path.exists("/proc/self/ns/user") and namespaces:
        assert found == dict.fromkeys(("read", "write", "remove", "connect", "environment"), "refused")


@pytest.mark.parametrize(
    ("how", "said"), [("crash", "its reader crashed (signal 6)"), ("eat", "takes more memory than its size allows")]
)
def test_a_child_that_dies_of_its_list_ends_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, said: str
) -> None:
    probed(monkeypatch, "text", "failing")
    path = tmp_path / "a.csv"
    path.write_bytes(b"x")
    with ListReader() as lists:
        *rows, last = lists.rows("text", path, 2, how)
        assert list(lists.rows("text", path, 2)) == []
    assert last.reason == "budget_spent"
    assert said in last.what
    assert f"behind row {len(rows):,} of a.csv" in last.what
    assert len(rows) >= 4_000


def test_what_lies_beside_images_is_read_in_the_child_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that crashes it leaves the rest of its folder out, as in any other list."""
    for name in ("0.txt", "1.json", "2.txt"):
        (tmp_path / name).write_text("a cat")
        (tmp_path / name).with_suffix(".jpg").touch()
    probed(monkeypatch, "sidecar", "broken")
    first, crashed = read_rows(str(tmp_path), SourceRecipe((str(tmp_path),)))
    assert first.captions == ("a cat",)
    assert crashed.url.endswith("/1.jpg")
    assert crashed.reject == "budget_spent"
    assert "its reader crashed (signal 6)" in crashed.flaw


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("spin", "in the processor time that its size allows"),
        ("sleep", "no data for 0.1 s"),
        ("killed", "its reader was killed"),
        ("raise", "cannot be read (KeyError: 'a bug')"),
    ],
)
def test_what_may_end_elsewhere_next_time_refuses_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, said: str
) -> None:
    probed(monkeypatch, "text", "failing")
    if how == "sleep":
        monkeypatch.setattr(reader, "WAIT_S", 0.1)
    path = tmp_path / "a.csv"
    path.write_bytes(b"x")
    with ListReader() as lists, pytest.raises(UserError) as refused:
        list(lists.rows("text", path, 2, how))
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.fixture
def liar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], list[Any]]:
    """Reads a list from a child that has been taken over, and answers so."""

    class Liar:
        lies = b""

        def __init__(self, *_: Any, stdin: int, **__: Any):
            self.socket = socket.socket(fileno=os.dup(stdin))
            Thread(target=self.lie, daemon=True).start()

        def lie(self) -> None:
            with suppress(OSError):
                self.socket.sendall(self.lies)

        def kill(self) -> None:
            self.socket.close()

        def wait(self, timeout: float = 0.0) -> int:
            return -9

    def rows(lies: bytes) -> list[Any]:
        Liar.lies = lies
        (tmp_path / "a.csv").write_bytes(b"x")
        with ListReader() as lists:
            return list(lists.rows("text", tmp_path / "a.csv", 2))

    monkeypatch.setattr(subprocess, "Popen", Liar)
    return rows


@pytest.mark.parametrize(
    "batch",
    [
        "[[[1],['a']],[]]", "[[['a'],['b'],['c']],[]]", "[[[['a']],['b']],[]]", "[[['a'],[[['b']]]],[]]",
        "[[['a'],['\\ud800']],[]]", "[[['a'],[]],[]]", "[[],[[0,'no reason','x']]]", "[[],[[[],'not_utf8','x']]]",
        "[[],[[Infinity,'not_utf8','x']]]", "{}", "[" * 100_000, "",
    ],
)  # fmt: skip
def test_what_is_no_row_is_not_believed(liar: Callable[[bytes], list[Any]], batch: str) -> None:
    body = batch.replace("'", '"').encode()
    (row,) = liar(json.dumps(["rows", len(body) if body else 1 << 40]).encode() + b"\n" + body)
    assert isinstance(row, Flaw)
    assert "sent something other than rows" in row.what


@pytest.mark.parametrize(
    ("message", "body", "times"),
    [
        ("said", "hello", 200),
        ("rows", json.dumps([[["a"] * 4096, ["b"] * 4096], []]), 200),
        ("rows", json.dumps([[["a" * MAX_CAPTIONS], ["b"]], []]), 600),
        ("rows", "[[], []]", 1),
    ],
    ids=["said", "rows", "long", "empty"],
)
def test_a_child_that_never_ends_is_ended(
    liar: Callable[[bytes], list[Any]], message: str, body: str, times: int
) -> None:
    found = liar((json.dumps([message, len(body)]) + "\n" + body).encode() * times)
    assert len(found) <= 100_001
    assert "sent something other than rows" in found[-1].what


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads the children of a process in /proc")
def test_rows_that_nobody_wants_leave_no_process_behind(tmp_path: Path) -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())

    path = tmp_path / "a.csv"
    path.write_text("url,caption\n" + "".join(f"http://h/{i},a cat\n" for i in range(20_000)))
    before = children()
    rows = read_rows(str(path), SourceRecipe((str(path),)))
    next(rows)
    assert len(children() - before) == 1
    del rows  # as an interrupted command drops them
    assert children() <= before


def test_a_list_that_is_cut_is_the_same_list_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows end where the budget does, here a smaller one, and the last one says so."""
    budget = "c.Budget = lambda budget=c.Budget: budget(characters=1 << 20)"
    code = f"import pipeline.data.source.parsers.child as c; {budget}; c.main()"
    monkeypatch.setattr(reader, "_COMMAND", (sys.executable, "-P", "-c", code))
    path = tmp_path / "a.csv.gz"
    lines = "".join(f"http://h/{i},{'x' * 4000}\n" for i in range(1_000))
    path.write_bytes(gzip.compress(f"url,caption\n{lines}".encode()))
    found, again = (list(read_rows(str(path), SourceRecipe((str(path),)))) for _ in range(2))
    assert found == again
    assert [row.reject for row in found[-2:]] == [None, "budget_spent"]
    assert (1 << 20) / 4100 < len(found) < ((1 << 20) + CHARACTERS[1] * path.stat().st_size) / 4000


def test_what_a_file_may_cost_does_not_depend_on_the_files_before_it(
    tmp_path: Path, folder_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a file that is appended would end at another row than one that is read with the others."""
    budget = "c.Budget = lambda budget=c.Budget: budget(characters=1 << 16)"
    code = f"import pipeline.data.source.parsers.child as c; {budget}; c.main()"
    monkeypatch.setattr(reader, "_COMMAND", (sys.executable, "-P", "-c", code))
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "a.csv").write_text("url,caption\nhttp://h/a,a cat\n")
    lines = "".join(f"http://h/{i},{'x' * 4000}\n" for i in range(100))
    (lists / "b.csv.gz").write_bytes(gzip.compress(f"url,caption\n{lines}".encode()))
    alone = list(read_rows(str(lists / "b.csv.gz"), SourceRecipe((str(lists / "b.csv.gz"),))))
    assert alone[-1].reject == "budget_spent"
    assert len(alone) > 10
    (lists / "c.csv").write_text("url,caption\nhttp://h/c,a dog\n")
    recipe = SourceRecipe((str(lists),))
    (shard,) = scan(recipe, folder_store, write=True).shards
    assert shard.ledger.rows == len(alone) + 2
    assert shard.ledger.rejected == {"budget_spent": 1}


# --- what hostile lists cost ------------------------------------------------------------------------------------------


def hostile(folder: Path) -> list[Path]:
    """Lists of at most 1.5 MB, each of which took hours or gigabytes."""
    for name, size in (("80k", 80_000), ("1m", 1_000_000)):
        folder.joinpath(f"quotes-{name}.csv").write_text("url,caption\n" + 'a","\n' * (size // 5))
        folder.joinpath(f"quotes-{name}.tsv").write_text("url\tcaption\n" + 'a"\t"\n' * (size // 5))
    urls = [f"http://h/{i}.jpg" for i in range(10_000)]
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), ["x" * 1_000_000])
    listed = pa.ListArray.from_arrays(pa.array(range(10_001), pa.int32()), one)
    for name, captions in (("plain", one), ("listed", listed)):
        pq.write_table(pa.table({"url": urls, "caption": captions}), folder / f"{name}.parquet", compression="zstd")
    none = pa.nulls(30_000_000, pa.string())
    pq.write_table(pa.table({"url": none, "caption": none}), folder / "nulls.parquet")
    with gzip.open(folder / "long.csv.gz", "wb") as file:
        file.write(b"url,caption\n")
        for i in range(1_500):
            file.write(b"http://h/%d.jpg," % i + b"x" * 1_000_000 + b"\n")
    folder.joinpath("empty.csv.gz").write_bytes(gzip.compress(b"url,caption\n" + b",\n" * 10_000_000))
    folder.joinpath("short.csv").write_text("url,caption\n" + "a,b\n" * 250_000)
    with tarfile.open(folder / "links.tar", "w") as tar:
        text = tarfile.TarInfo("text.txt")
        text.size = 500_000
        tar.addfile(text, io.BytesIO(b"a b\n" * 125_000))
        for i in range(900):
            link = tarfile.TarInfo(f"{i}.txt")
            link.type, link.linkname = tarfile.LNKTYPE, "text.txt"
            tar.addfile(link)
    with tarfile.open(folder / "headers.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(16):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.pax_headers = {"a": "1" * 60_000}
            tar.addfile(member)
    return sorted(folder.iterdir())


DRIVER = """
import json, resource, sys, time
from pipeline.data.source.lists import read_rows
from pipeline.data.source.recipe import SourceRecipe
from pipeline.errors import UserError
used = lambda: sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
memory = lambda who: resource.getrusage(who).ru_maxrss >> 10
start, found = memory(resource.RUSAGE_SELF), {}
for path in sys.argv[1:]:
    before, rows, said = used(), 0, ""
    try:
        for row in read_rows(path, SourceRecipe((path,))):
            rows += 1
    except UserError as e:
        said = str(e)
    found[path] = rows, said, used() - before
print(json.dumps([memory(resource.RUSAGE_SELF) - start + memory(resource.RUSAGE_CHILDREN), found]))
"""


@pytest.mark.slow  # of single ones, see above, test_tables and test_fuzz
def test_a_megabyte_of_a_hostile_list_costs_seconds_and_megabytes(tmp_path: Path) -> None:
    paths = hostile(tmp_path)
    ran = subprocess.run([sys.executable, "-c", DRIVER, *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    mebibytes, found = json.loads(ran.stdout)
    print(mebibytes, *found.items(), sep="\n")
    assert len(found) == len(paths) == 12
    assert all(len(said.splitlines()) <= 1 for _, said, _ in found.values())
    # The bound is 5 s, of which the child may take 4; a processor that others use takes longer for the same.
    assert {path: used for path, (_, _, used) in found.items() if used > 7} == {}
    assert mebibytes < 300
