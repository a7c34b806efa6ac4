"""Lists and files of strangers: what they name of this machine is neither read nor waited for, by no command."""

import os
import re
import socket
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.bundles import find_bundle
from jobs.cli import main
from pipeline.config import load_config
from pipeline.data.pairs.decoding import open_image
from pipeline.data.source.lists import path_policy, read_rows
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.retry import Retries, gather
from pipeline.data.source.stage import scan
from pipeline.errors import UserError
from pipeline.graph.artifacts import read_table
from pipeline.sampling.prompts import TABLES, read_prompts
from pipeline.store import open_store
from tests.chain import ROOT, refused
from tests.pipeline.data.bench import Bench, picture, write_list
from tests.secrets import leaks

SECRETS = {"key": "AKIA-tiger-of-the-north", "environment": "owl~of~the~south"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder ``here/lists``, where we are, for lists; around it private things; a secret in our environment."""
    (tmp_path / "here/lists").mkdir(parents=True)
    (tmp_path / "here/credentials").write_text(f"aws_secret_access_key = {SECRETS['key']}\n")
    (tmp_path / "here/private.png").write_bytes(picture(99))
    monkeypatch.setenv("OWL", SECRETS["environment"])
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def irregular(folder: Path) -> list[Path]:
    """A pipe that nobody writes to, a link to it, a socket and a folder, which are called like images."""
    os.mkfifo(folder / "pipe.png")
    (folder / "linked pipe.png").symlink_to("pipe.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(folder / "socket.png"))
    server.close()
    (folder / "folder.png").mkdir()
    return [folder / name for name in ("pipe.png", "linked pipe.png", "socket.png", "folder.png")]


def foreign_rows(here: Path) -> list[tuple[str, str | None]]:
    """References of a table, and how its rows must end."""
    lists = here / "lists"
    (lists / "own.png").write_bytes(picture(0))
    (lists / "inner").mkdir()
    (lists / "inner/own.png").write_bytes(picture(1))
    (lists / "inside.png").symlink_to("inner/own.png")
    (lists / "out.png").symlink_to("../private.png")
    (lists / "up").symlink_to("..")
    (lists / "environ.png").symlink_to("/proc/self/environ")
    (lists / "loop.png").symlink_to("loop.png")
    (lists / "a.tar").write_bytes(picture(0))
    private = quote(str(here / "private.png"))
    rows: list[tuple[str, str | None]] = [("own.png", None), (f"file://{quote(str(lists))}/inner/own.png", None)]
    rows += [(f"{lists}/inside.png", None), ("http://closed.test/a.png", "unreachable")]
    rows += [(f"file://{quote(str(path))}", "missing_file") for path in irregular(lists)]
    rows += [("none.png", "missing_file"), ("loop.png", "missing_file")]
    refused = [
        "out.png", "up/private.png", "environ.png", "../private.png", f"{lists}/../private.png", f"file://{private}",
        f"file://localhost{private}", f"{here}/private.png", "file:///dev/zero", "/dev/zero", "/proc/self/environ",
        f"file://{quote(str(lists))}/%2e%2e/private.png",
        f"tar://{private}?offset=0&size=100", f"tar:///dev/zero?offset=0&size={10**12}",
        f"tar://{quote(str(lists))}/a.tar?offset=0&size=100", f"tar://{quote(str(lists))}/pipe.png?offset=0&size=10",
        f"embedding://{quote(str(lists))}?part=0&row=0", "embedding:///etc?part=0&row=0",
        "s3://anybodys-bucket/a.png", "s3:///key", "s3://b/../c",
        "s3://arn:aws:s3:us-east-1:123456789012:accesspoint:theirs/a.png",
    ]  # fmt: skip
    return rows + [(reference, "forbidden_reference") for reference in refused]


def offline(store: Path, paths: Sequence[str], **source: object) -> Bench:
    """Stages without a network."""
    pairs = {"retries": 0, "timeout_s": 2.0, "hosts": {"closed.test": "127.0.0.1:1"}}
    return Bench(store, paths, source={"shard_rows": 100, **source}, run={"pairs": pairs})


def test_a_table_of_strangers_costs_only_its_own_rows(here: Path) -> None:
    expected = foreign_rows(here)
    path = write_list(here / "lists/list.csv", [(url, f"row {i}") for i, (url, _) in enumerate(expected)])
    bench = offline(here / "store", [path])
    bench.make("source", "captions", "pairs")
    rows = bench.rows("pairs")
    assert [(url, row["reason"]) for (url, _), row in zip(expected, rows, strict=True)] == expected
    ledger = bench.made["pairs"].ledger
    assert ledger.rows == len(expected)
    assert ledger.rejected == Counter(reason for _, reason in expected if reason not in (None, "unreachable"))
    assert leaks([here / "store"], SECRETS) == []


def test_roots_of_the_configuration_admit_rows_and_make_only_their_shards_again(here: Path) -> None:
    expected = foreign_rows(here)
    path = write_list(here / "lists/list.csv", [(url, f"row {i}") for i, (url, _) in enumerate(expected)])
    private = [url for url, _ in expected if "private.png" in url and not url.startswith("tar:")]
    plain = write_list(here / "lists/plain.csv", [("own.png", "another list of the same image")])
    narrow = offline(here / "store", [path, plain])
    wide = offline(here / "store", [path, plain], roots=["private.png"])
    ended = {}
    for name, bench in (("narrow", narrow), ("wide", wide)):
        bench.make("source", "captions", "pairs")
        ended[name] = [row["reason"] for row in bench.rows("pairs")]
    changed = [url for (url, _), *reasons in zip(expected, *ended.values(), strict=False) if len(set(reasons)) > 1]
    tar = f"tar://{quote(str(here))}/private.png?offset=0&size=100"
    assert set(changed) == {*private, "out.png", tar}
    assert narrow.made["source"].key != wide.made["source"].key
    assert narrow.made["captions"].key == wide.made["captions"].key


def test_a_refused_row_bars_no_other_list_from_its_image(here: Path) -> None:
    (here / "theirs").mkdir()
    own = here / "lists/own.png"
    own.write_bytes(picture(0))
    theirs = write_list(here / "theirs/list.csv", [(f"file://{own}", "a stranger's")])
    ours = write_list(here / "lists/list.csv", [(f"file://{own}", "ours")])
    bench = offline(here / "store", [theirs, ours])
    bench.make("source", "pairs")
    assert [row["reason"] for row in bench.rows("pairs")] == ["forbidden_reference", None]


def test_a_list_that_is_moved_is_judged_where_it_lies_now(here: Path) -> None:
    """Though its content is the same, and it was stored before."""
    own = here / "lists/own.png"
    own.write_bytes(picture(0))
    recipe = [SourceRecipe((write_list(here / place, [(str(own), "x")]),)) for place in ("lists/a.csv", "moved.csv")]
    store = open_store(str(here / "store"))
    (here / "elsewhere").mkdir()
    recipe.append(SourceRecipe((write_list(here / "elsewhere/a.csv", [(str(own), "x")]),)))
    ledgers = [scan(each, store, write=True).shards[0].ledger for each in recipe]
    assert [ledger.kept for ledger in ledgers] == [1, 1, 0]
    assert ledgers[2].rejected == {"forbidden_reference": 1}


def test_refused_rows_are_not_tried_again_by_no_list(here: Path) -> None:
    """Nor is a row counted as tried again whose list may not name its image."""
    path = write_list(here / "lists/list.csv", [("../private.png", "theirs"), ("none.png", "lost"), ("out.png", "out")])
    (here / "lists/out.png").symlink_to("../private.png")
    bench = offline(here / "store", [path])
    bench.make("source", "captions", "pairs")
    assert [row["reason"] for row in bench.rows("pairs")] == [
        "forbidden_reference", "missing_file", "forbidden_reference",
    ]  # fmt: skip
    shards = scan(bench.config.source, bench.store, write=True).shards
    reasons = frozenset({"forbidden_reference", "missing_file"})
    reaches = [path_policy(bench.config.source, path)]
    blob, count = gather(bench.store, shards, bench.made["pairs"], reasons, reaches)
    assert count == 2  # the link, which may lead elsewhere by now, is judged by the fetch
    assert blob is not None
    urls = [f"file://{here}/lists/{name}" for name in ("none.png", "out.png", "../private.png")]
    assert Retries(bench.store, (blob,)).times(urls) == [1, 1, 0]
    # This list may not name the folder of another list, also when its rows are tried again.
    (here / "elsewhere").mkdir()
    two = [*reaches, path_policy(bench.config.source, write_list(here / "elsewhere/list.csv", [("a.png", "theirs")]))]
    assert gather(bench.store, shards, bench.made["pairs"], frozenset({"forbidden_reference"}), two)[1] == 0


def foreign_folder(here: Path) -> Counter[str | None]:
    """A folder of images and captions, ``here/lists``, and how its rows must end."""
    lists = here / "lists"
    for i in range(10):
        (lists / f"{i}.png").write_bytes(picture(i))
    (lists / "0.txt").write_text("a sound caption")
    (lists / "1.txt").symlink_to("/proc/self/environ")
    (lists / "2.txt").symlink_to(here / "credentials")
    (lists / "3.txt").symlink_to("../credentials")
    os.mkfifo(lists / "4.txt")
    (lists / "5.txt").symlink_to("/dev/zero")
    (lists / "6.txt").symlink_to("0.txt")
    (lists / "7.txt").symlink_to("7.txt")
    (lists / "8.txt").mkdir()
    (lists / "out.png").symlink_to("../private.png")
    (lists / "out.txt").write_text("an image that is not theirs")
    (lists / "zero.jpg").symlink_to("/dev/zero")
    (lists / "inside.png").symlink_to("0.png")
    irregular(lists)
    return Counter({None: 11, "forbidden_reference": 2, "missing_file": 3})


def test_a_folder_of_strangers_brings_no_secret(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reasons = foreign_folder(here)
    assert main(["init", "foreign", "lists"]) == 0
    bench = offline(here / "store", [str(here / "lists")])
    bench.make("source", "captions", "pairs")
    rows = {Path(row["url"]).name: row["reason"] for row in bench.rows("pairs")}
    assert rows["out.png"] == rows["zero.jpg"] == "forbidden_reference"
    assert Counter(rows.values()) == reasons
    shards = scan(bench.config.source, bench.store, write=True).shards
    captions = [text for shard in shards for text in read_table(bench.store, shard.captions)["captions"].to_pylist()]
    assert sorted(text for texts in captions for text in texts) == [
        "a sound caption", "a sound caption", "an image that is not theirs",
    ]  # fmt: skip
    said = capsys.readouterr()
    assert leaks([here / "store", here / "foreign.yaml", ("out", said.out), ("err", said.err)], SECRETS) == []


def test_init_looks_at_a_foreign_list_and_says_what_it_leaves_out(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = foreign_rows(here)
    path = write_list(here / "lists/list.csv", [(url, f"row {i}") for i, (url, _) in enumerate(expected)])
    assert main(["init", "foreign", path]) == 0
    out = capsys.readouterr().out
    # What lies behind a link to a folder is judged when it is opened.
    refused = [url for url, reason in expected if reason == "forbidden_reference" and url != "up/private.png"]
    assert f"warning: {len(refused):,} rows are left out, which name what a list may not, such as" in out
    assert re.search(r"if they are yours, write roots: \[.+\] below source: in", out)
    found = load_config("foreign.yaml")
    assert found.source.roots == ()
    assert leaks([here / "foreign.yaml", ("out", out)], SECRETS) == []


def test_commands_wait_for_no_pipe(here: Path) -> None:
    pipe, link = here / "pipe", here / "zero"
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    for name in ("pipe.csv", "pipe.parquet", "pipe.tar"):
        Path(name).symlink_to("pipe")
    Path("zero.csv").symlink_to("/dev/zero")
    config = {"project": "p", "store": "store", "preset": "nano", "source": {"paths": ["drawings:nano"]}}
    Path("p.yaml").write_text(yaml.safe_dump(config))
    for words in (
        *(f"init foreign {name}" for name in ("pipe.csv", "pipe.parquet", "pipe.tar", "zero.csv")),
        "plan pipe",
        "plan zero",
        "plan p.yaml pairs.deny_urls=pipe",
        'plan p.yaml embeddings.heads={"aesthetic":zero}',
        "plan p.yaml --profile pipe",
        "plan p.yaml --profile zero",
        "data forget p.yaml --file pipe",
        "data forget p.yaml --file zero",
    ):
        refused(*words.split(), says="not a regular file", cwd=here)
    for path in (pipe, link):
        with pytest.raises(UserError, match="not a regular file"):
            open_image(path)
        (here / "out").mkdir(exist_ok=True)
        (here / "out/bundle.json").unlink(missing_ok=True)
        (here / "out/bundle.json").symlink_to(path)
        with pytest.raises(UserError, match="no finished bundle there"):
            find_bundle(str(here / "out"))
        for kind in (".txt", *TABLES):
            (here / f"prompts{kind}").unlink(missing_ok=True)
            (here / f"prompts{kind}").symlink_to(path)
            with pytest.raises(UserError, match="not a regular file"):
                next(read_prompts(here / f"prompts{kind}", 0, 10))


def test_embeddings_that_lead_elsewhere_are_named(here: Path) -> None:
    folder = here / "lists"
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir()
    for name in ("img_emb", "text_emb"):
        np.save(folder / name / f"{name}_0.npy", np.ones((2, 4), np.float32))
    rows = pa.table({"url": ["a", "b"], "caption": [SECRETS["key"], "b"]})
    pq.write_table(rows, here / "private.parquet")
    (folder / "metadata/metadata_0.parquet").symlink_to(here / "private.parquet")
    recipe = SourceRecipe((str(folder),))
    with pytest.raises(UserError, match=r"metadata_0\.parquet: a link out of the list's own folder"):
        scan(recipe, open_store(str(here / "store")), write=False)
    shards = scan(SourceRecipe(recipe.paths, roots=("private.parquet",)), open_store(str(here / "store")), write=False)
    assert shards.shards[0].ledger.kept == 2


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header whose size may be any number, negative ones too (GNU's binary numbers)."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (size % 2**96).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "second",
    [
        *(tar_header("b.png", size) for size in (-512, -1024, 10**12, 2**88 - 1)),
        *(
            tar_header("b.png", -512, kind)
            for kind in (tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)
        ),
        tar_header("b.png", 10**12, tarfile.XHDTYPE),
    ],
)
def test_a_tar_whose_sizes_lie_ends_in_one_line(here: Path, second: bytes) -> None:
    """tarfile of Python before 3.11.14 and 3.12.12 reads some of them for ever (CVE-2025-8194)."""
    (here / "a.tar").write_bytes(tar_header("a.txt", 0) + second + bytes(1024))
    with pytest.raises(UserError, match=r"^source .*\Z"):
        list(read_rows("a.tar", SourceRecipe(("a.tar",))))


def test_files_that_lists_name_are_opened_in_one_place() -> None:
    """A new ``open`` in the data plane has to be judged, and named here: lists open the list itself, which the
    configuration names, or their own copy of one that is far away; the codec a temporary folder of its own; drawings
    a file of their package."""
    opens = re.compile(r"(?<![\w.])(?<!def )open\(|\bread_bytes\(|\bread_text\(|\bnp\.load\(")
    data = Path(ROOT, "pipeline/data")
    found = {str(file.relative_to(data)) for file in data.rglob("*.py") if opens.search(file.read_text())}
    assert found == {"codec/fit.py", "source/drawings/world.py", "source/remote.py", "source/source.py"}
