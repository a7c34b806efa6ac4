"""A source is one file, found by an entry point: every command reads its lists, within the limits of all lists.

The source is that of ``examples/add_source.py``.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.package import make_package
from pipeline.config import load_config
from pipeline.data.source import lists
from pipeline.data.source.columns import MAX_CAPTION
from pipeline.data.source.journal import EMPTY
from pipeline.data.source.lists import BUILT_IN, read_rows
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.stage import scan
from pipeline.graph.artifacts import load_artifact, read_shards, read_table
from pipeline.plugins import plugins
from pipeline.store import Store, open_store
from tests.chain import ROOT, done, here, write_config, write_list
from tests.plugin import install, run_with

GROUP = "unclip.sources"
HOSTILE = [
    ("file:///etc/passwd", "not its own", "forbidden_reference"),
    ("../secret.png", "not its own either", "forbidden_reference"),
    ("tar:///etc/a.tar?offset=0&size=9#a.jpg", "in a tar", "forbidden_reference"),
    ("s3://somebody/a.png", "in a bucket", "forbidden_reference"),
    (f"http://h.test/{'a' * 9000}", "a long reference", "unsupported_reference"),
    (None, "no reference", "no_reference"),
]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder in which the source of the example is installed."""
    return install(
        tmp_path / "site", GROUP, "sqlite", "add_source:Sqlite", (ROOT / "examples/add_source.py").read_text()
    )


@pytest.fixture
def installed_here(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installs it for this process."""
    monkeypatch.syspath_prepend(installed)
    plugins.cache_clear()
    yield
    plugins.cache_clear()


def database(file: Path, rows: list[tuple[str | None, str]]) -> str:
    with closing(sqlite3.connect(file)) as opened, opened:
        opened.execute("CREATE TABLE pairs (url TEXT, caption TEXT)")
        opened.executemany("INSERT INTO pairs VALUES (?, ?)", rows)
    return f"sqlite:{file}?pairs"


def pairs_of(store: Store, stage: str, blob: str) -> list[dict]:
    (record,) = store.list(f"artifacts/{stage}/")
    made = load_artifact(store, stage, record.path.rpartition("/")[2].removesuffix(".json"))
    assert made is not None
    return [row for shard in read_shards(store, made) for row in read_table(store, shard.blobs[blob]).to_pylist()]


def test_pairs_of_a_database_are_fetched_and_what_it_may_not_say_is_refused(
    installed: Path, tmp_path: Path, pictures: str, caplog: pytest.LogCaptureFixture
) -> None:
    listed = list(read_rows(str(write_list(tmp_path / "list.csv", 30, 40)), SourceRecipe(("list.csv",))))
    rows = [(row.url, row.captions[0]) for row in listed]
    rows[0] = rows[0][0], "a monster " * 1000
    path = database(tmp_path / "pairs.db", rows + [row[:2] for row in HOSTILE])
    config = write_config(tmp_path, str(tmp_path / "store"), pictures, [path])
    done(run_with(installed, "run", config, "--until", "pairs"))
    assert f"source {path}: 1 caption cut to" in caplog.text

    store = open_store(str(tmp_path / "store"))
    index = pairs_of(store, "pairs", "index")
    assert [row["url"] for row in index[:10]] == [row.url for row in listed]
    assert {row["status"] for row in index[:10]} == {"kept"}
    assert [row["reason"] for row in index[10:]] == [reason for *_, reason in HOSTILE]
    done(run_with(installed, "run", config, "--only", "captions"))
    captions = [row["captions"] for row in pairs_of(store, "captions", "captions")]
    assert captions[:2] == [[("a monster " * 1000)[:MAX_CAPTION].strip()], [rows[1][1]]]

    assert "nothing to do" in done(run_with(installed, "run", config, "--until", "pairs"))
    with closing(sqlite3.connect(tmp_path / "pairs.db")) as opened, opened:
        opened.execute("DELETE FROM pairs WHERE url IS NULL")
    assert "nothing to do" not in done(run_with(installed, "run", config, "--until", "pairs"))
    without = here("plan", config)
    assert without.returncode == 2
    assert f"source {path}: no such file or folder" in without.stderr


@pytest.mark.usefixtures("installed_here")
def test_its_rows_travel_so_that_a_cluster_needs_no_plug_in(store: Store, tmp_path: Path) -> None:
    """The keys are the same there."""
    path = database(tmp_path / "pairs.db", [("http://h.test/1.png", "one"), ("http://h.test/2.png", "two")])
    config = load_config(ROOT / "configs/nano.yaml", [f"source.paths={json.dumps([path])}"])
    for at_home in (False, True):
        package = make_package(config, "s3://bucket/prefix", "out", EMPTY, here=at_home)
        assert not package.notes
        sent = package.files["lists/0/pairs.rows"]
        assert isinstance(sent, bytes)
        (tmp_path / "pairs.rows").write_bytes(sent)
        there = replace(config.source, paths=(str(tmp_path / "pairs.rows"),))
        assert scan(there, store, write=False).keys == scan(config.source, store, write=False).keys


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemError('two\\nlines')", "SystemError: two lines"),
        ("pass", "AttributeError: module 'odd' has no attribute 'Odd'"),
        ("class Odd: pass", "AttributeError: type object 'Odd' has no attribute 'matches'"),
        ("class Odd(Source):\n    prefixes = ('odd:',)", "TypeError: Can't instantiate abstract class Odd"),
        ("class Odd(Base):\n    def fingerprint(self): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("class Odd(Base):\n    def rows(self, recipe, reader): return 5", "TypeError: 'int' object is not iterable"),
        ("class Odd(Base):\n    def rows(self, *_): yield ListRow(5, ())", "TypeError: sequence item 0: expected str"),
        ("class Odd(Base):\n    def rows(self, *_): yield ListRow('', (), reject='bad')", "KeyError: 'bad'"),
    ],
)
def test_a_broken_one_is_named_in_one_sentence(tmp_path: Path, code: str, said: str) -> None:
    base = (
        "from unclip.sources import ListRow, Source\n"
        "class Base(Source):\n"
        "    prefixes = ('odd:',)\n"
        "    def fingerprint(self): return 1\n"
        "    def rows(self, recipe, reader): return iter(())\n"
    )
    install(tmp_path / "site", GROUP, "broken", "odd:Odd", base + code)
    config = tmp_path / "odd.yaml"
    config.write_text(f"project: odd\npreset: nano\nstore: {tmp_path}/store\nsource: {{paths: ['odd:list']}}\n")
    found = run_with(tmp_path / "site", "plan", config)
    assert found.returncode == 2
    (line,) = found.stderr.strip().splitlines()
    assert f"source broken (odd:Odd) cannot be used: {said}" in line
    assert line.endswith("; correct or uninstall odd-of-mine")


def test_lists_of_our_own_kinds_need_no_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a broken one does not touch them, and none reads what another kind has read."""
    monkeypatch.setattr(lists, "plugins", lambda group: pytest.fail("plug-ins are loaded"))
    file = write_list(tmp_path / "list.csv", 0, 3)
    assert len(list(read_rows(str(file), SourceRecipe((str(file),))))) == 3


@pytest.mark.usefixtures("installed_here")
def test_kinds_are_asked_in_a_stated_order(installed: Path) -> None:
    install(installed, GROUP, "another", "later:Later", "from add_source import Sqlite\nclass Later(Sqlite): pass\n")
    plugins.cache_clear()
    names = [kind.__name__ for kind in lists.sources()]
    assert names == [*(kind.__name__ for kind in BUILT_IN), "Later", "Sqlite"]  # by the names of the entry points
