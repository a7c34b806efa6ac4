"""What travels to a cluster: code, the configuration resolved, small lists and files; and what is said of the rest."""

import dataclasses
import hashlib
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import save_file

import cluster.package
from cluster.package import Package, check_size, make_package, send_weights, write_zip
from cluster.submission import put_package
from pipeline.config import Config, load_config, make_config
from pipeline.data.source.forget import Request, find
from pipeline.data.source.journal import EMPTY, change_journal, with_forgotten
from pipeline.data.source.stage import scan
from pipeline.errors import UserError
from pipeline.graph.artifacts import read_table
from pipeline.graph.keys import differences
from pipeline.store import open_store
from pipeline.store.records import read_blob
from tests.chain import ROOT
from tests.secrets import leaks

URL = "s3://bucket/prefix"


def _config(folder: Path, paths: list[Path | str], **more: object) -> Config:
    return make_config(
        {"project": "p", "store": URL, "preset": "nano", "source": {"paths": [str(path) for path in paths]}, **more}
    )


def _list(path: Path, *urls: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("url,caption\n" + "".join(f"{url},a picture\n" for url in urls))
    return path


def _project(config: Config, **more: object) -> dict:
    return yaml.safe_load(make_package(config, URL, "out", EMPTY, **more).files["project.yaml"])


@pytest.mark.parametrize("name", ["nano", "demo"])
def test_the_resolved_configuration_is_the_same_one(name: str) -> None:
    config = load_config(ROOT / f"configs/{name}.yaml", ["decoder.model.dropout=0.1", "scale=2"])
    there = make_config(_project(config))
    assert there.run.output == "out"
    assert there.store == URL
    run = dataclasses.replace(there.run, output=config.run.output)
    assert dataclasses.replace(there, store=config.store, run=run) == config


def test_the_unpacked_package_is_the_whole_code(tmp_path: Path) -> None:
    package = make_package(_config(tmp_path, ["drawings:nano"]), URL, "out", EMPTY)
    found = [f for folder in cluster.package.CODE for f in (ROOT / folder).rglob("*") if f.is_file()]
    code = {f.relative_to(ROOT).as_posix() for f in found if "__pycache__" not in f.parts}
    # Nothing there reads these.
    idle = {name for name in code if name.startswith("cluster/") and not name.endswith(".py")}
    idle |= {name for name in code if name.endswith("/py.typed")}
    assert {"pipeline/presets/nano.yaml", "pipeline/report/templates/page.html", "serve/studio/studio.js"} <= code
    assert set(package.files) == code - idle - {"pipeline/schema.json"} | {"project.yaml"}
    assert sum(package.sizes.values()) < 3 << 20


def test_what_else_lies_in_the_folders_of_the_code_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = (
        "jobs/run.py",
        "pipeline/presets/nano.yaml",
        "pipeline/report/templates/page.html",
        "serve/studio/studio.js",
    )
    left = (
        "jobs/.env", "cluster/.netrc", "jobs/.run.py.swp", "jobs/.git/config.py", "jobs/notes.txt", "serve/tokens",
        "pipeline/presets/.nano.yaml", "pipeline/presets/nano.yaml~", "pipeline/report/templates/.page.html.swp",
        "serve/studio/key.pem", "models/__pycache__/run.py", "models/weights.safetensors", "jobs/id.json",
    )  # fmt: skip
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(cluster.package, "ROOT", tmp_path)
    assert set(cluster.package.code()) == set(kept)


def test_same_files_same_bytes(tmp_path: Path) -> None:
    lists = [_list(tmp_path / "a/list.csv", "http://a/1.png"), _list(tmp_path / "b/list.csv", "s3://b/1")]
    config = _config(tmp_path, lists)
    one = make_package(config, URL, "out", EMPTY)
    first = write_zip(one, tmp_path / "1.zip")
    for file in lists:
        file.touch()
    again = make_package(config, URL, "out", EMPTY)
    assert first.read_bytes() == write_zip(again, tmp_path / "2.zip").read_bytes()
    assert again.key == one.key
    assert dataclasses.replace(one, files=one.files | {"project.yaml": b"another"}).key != one.key
    with zipfile.ZipFile(first) as archive:
        assert [row["url"] for row in _rows(archive.read("lists/0/list.rows"))] == ["http://a/1.png"]
        assert [row["url"] for row in _rows(archive.read("lists/1/list.rows"))] == ["s3://b/1"]
        project = yaml.safe_load(archive.read("project.yaml"))
    assert project["source"]["paths"] == ["lists/0/list.rows", "lists/1/list.rows"]


def _rows(data: bytes) -> list[dict[str, Any]]:
    return pq.ParquetFile(io.BytesIO(data)).read().to_pylist()


def test_a_list_travels_as_it_is_read_masked_and_without_what_was_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a cluster, and into the store for Kubernetes; keys and splits do not move. A row that may not name its file
    keeps no list here, and is refused there."""
    monkeypatch.chdir(tmp_path)
    store = open_store(str(tmp_path / "store"))
    table = tmp_path / "list.csv"
    lines = ["https://ana:hunter2pw@h.test/a.png,masked,a,train"]
    lines += [f"http://h.test/{i}.png,caption {i},group {i % 7}," for i in range(40)]
    lines += ["http://h.test/0.png,again,b,test", ",none,c,", "s3://images/a.png,of a root,c,"]
    lines += [
        f"{url},not to be named,c," for url in ("/etc/passwd", "../secret.png", "s3://other/a.png", "tar:///a.tar")
    ]
    table.write_text("\n".join(["picture,said,by,split", *lines, ""]))
    source = {"image_column": "picture", "caption_column": "said", "group_column": "by", "shard_rows": 10}
    source |= {"paths": [str(table)], "roots": ["s3://images", "sets"]}
    config = _config(tmp_path, [], store=store.url, source=source)
    found = find(store, scan(config.source, store, write=True).shards, None, Request.read(["http://H.test/23.png"]))
    journal = change_journal(store, "p", lambda j: with_forgotten(j, found.marks))
    there = tmp_path / "there"
    assert not [name for name in make_package(config, URL, "out", journal, here=True).files if name.startswith("lists")]

    path = put_package(store, make_package(config, store.url, "out", journal))
    with zipfile.ZipFile(io.BytesIO(store.read(path))) as archive:
        archive.extractall(there)
    [name] = [file for file in there.rglob("*") if "lists" in file.parts and file.is_file()]
    rows = _rows(name.read_bytes())
    assert len(rows) == 48
    assert rows[0]["url"] == "https://***@h.test/a.png"
    assert leaks([there, ("rows", repr(rows))], {name: name for name in ("hunter2pw", "23.png", "caption 23")}) == []

    sent = yaml.safe_load((there / "project.yaml").read_text())
    assert sent["source"]["roots"] == [str(tmp_path / "sets"), "s3://images"]
    sent["source"]["paths"] = [str(there / listed) for listed in sent["source"]["paths"]]
    other = open_store(str(tmp_path / "elsewhere"))
    ours = scan(config.source, store, write=True, journal=journal)
    theirs = scan(make_config(sent).source, other, write=True, journal=journal)
    assert theirs.keys == ours.keys
    assert [shard.ledger for shard in theirs.shards] == [shard.ledger for shard in ours.shards]
    assert theirs.shards[2].ledger.rejected == {"forgotten": 1}
    assert theirs.shards[4].ledger.rejected == {"duplicate_url": 1, "no_reference": 1, "forbidden_reference": 4}
    refs = [[read_table(at, shard.refs) for shard in cut.shards] for at, cut in ((store, ours), (other, theirs))]
    assert refs[0] == refs[1]


def test_what_lies_in_files_stays_and_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    beside = _list(tmp_path / "beside.csv", "http://a/1.png", "2.png")
    by_path = _list(tmp_path / "by-path.csv", "http://a/1.png", f"{tmp_path}/pictures/2.png")
    (tmp_path / "folder").mkdir()
    config = _config(tmp_path, ["beside.csv", by_path, "folder", "drawings:nano"])
    package = make_package(config, URL, "out", EMPTY)
    paths = [str(beside), str(by_path), str(tmp_path / "folder"), "drawings:nano"]
    assert _project(config)["source"]["paths"] == paths
    assert len(package.notes) == 3
    assert f"every machine must find it, and the files that it names, at {beside}" in package.notes[0]
    travelling = _config(tmp_path, [_list(tmp_path / "web.csv", "http://a/1.png")])
    assert _project(travelling, here=True)["source"]["paths"] == [str(tmp_path / "web.csv")]
    assert make_package(config, URL, "out", EMPTY, here=True).notes == ()


def test_files_of_recipes_travel_and_weights_go_through_the_store(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    hosts, weights = tmp_path / "hosts.txt", tmp_path / "decoder.safetensors"
    hosts.write_text("bad.example\n")
    save_file({"w": np.ones(3, np.float32)}, weights)
    more = {"pairs": {"deny_hosts": str(hosts)}, "decoder": {"init_from": str(weights)}}
    config = _config(tmp_path, ["drawings:nano"], **more)
    package = make_package(config, URL, "out", EMPTY)
    values = yaml.safe_load(package.files["project.yaml"])
    where = values["pairs"]["deny_hosts"]
    assert package.files[where] == hosts
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert values["decoder"]["init_from"] == sha256
    send_weights(store, package)
    assert read_blob(store, sha256) == weights.read_bytes()
    write_zip(package, tmp_path / "p.zip")
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        archive.extractall(tmp_path / "there")
    values["pairs"]["deny_hosts"] = str(tmp_path / "there" / where)
    there = make_config(values)
    assert (there.pairs, differences(there.decoder)) == (config.pairs, differences(config.decoder))
    weights.write_bytes(b"others")
    with pytest.raises(UserError, match="changed during this command"):
        send_weights(store, package)


def test_a_package_that_is_too_large_names_its_largest_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{i}.bin": bytes(i) for i in range(9)}
    check_size(Package(files))
    monkeypatch.setattr(cluster.package, "LARGEST", 35)
    with pytest.raises(UserError, match=r"over 0 MiB: 8\.bin .*, 7\.bin .*, 6\.bin .*, 5\.bin .*, 4\.bin [^,]*; cut"):
        check_size(Package(files))
    with pytest.raises(UserError, match=r"the package of this job has .* over 0 MiB"):
        make_package(_config(tmp_path, ["drawings:nano"]), URL, "out", EMPTY)


@pytest.mark.parametrize(
    ("setting", "machines"), [("clip.weights", "head"), ("evaluation.judge", "head and its GPU nodes")]
)
@pytest.mark.parametrize("kind", ["local-dir:", "open_clip:ViT-B-32:"])
def test_a_clip_in_a_folder_or_a_file_needs_a_path_that_the_job_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, machines: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my-clip").touch()  # a folder is not looked for
    stage, name = setting.split(".")

    def package(place: object, here: bool) -> Package:
        config = _config(tmp_path, ["drawings:nano"], **{stage: {name: f"{kind}{place}"}})
        return make_package(config, URL, "out", EMPTY, here)

    for here, wanted in ((False, "a path that the cluster has"), (True, "its whole path")):
        with pytest.raises(UserError, match=rf"^{setting}: my-clip is found from this folder only; write {wanted}"):
            package("my-clip", here)
    place = tmp_path / "my-clip"
    assert package(place, here=True).notes == ()
    note = f"{place} ({setting}) is not copied: the cluster's {machines} must have it there"
    assert package(place, here=False).notes == (note,)


def test_a_tracker_of_the_users_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mytracker.py").write_text("def make(*_): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = _config(tmp_path, ["drawings:nano"], run={"trackers": ["mytracker:make", "tensorboard", "json:dumps"]})
    package = make_package(config, URL, "out", EMPTY)
    assert package.files["mytracker.py"] == tmp_path / "mytracker.py"
    assert not [name for name in package.files if name.startswith(("json", "tensorboard"))]
    sys.modules.pop("mytracker", None)
    (tmp_path / "mine").mkdir()  # a package without __init__.py
    (tmp_path / "mine/tracker.py").write_text("def make(*_): ...\n")
    run = dataclasses.replace(config.run, trackers=("mine.tracker:make",))
    package = make_package(dataclasses.replace(config, run=run), URL, "out", EMPTY)
    assert package.files["mine/tracker.py"] == tmp_path / "mine/tracker.py"
