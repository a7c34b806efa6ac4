"""Damaged objects are named in a line, quarantined by a command and made again; a full disk ends a run with a line."""

import errno
import json
import os
import re
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from jobs.cli import main
from pipeline.graph.artifacts import artifact_path, read_shards, shard_path
from pipeline.store import Store
from pipeline.store.records import blob_path
from tests.chain import MICRO, data_blobs, keys, write_config, write_list
from tests.faults import (
    FEW,
    RUN,
    Undisturbed,
    artifact,
    assert_each_shard_once,
    assert_sound,
    copy,
    forget,
)
from tests.pipeline.data.bench import picture, write_tar

IN_PROCESS = MICRO["run"] | RUN

Output: TypeAlias = pytest.CaptureFixture[str]
WAYS = {
    "truncate": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "overwrite": lambda file: file.write_bytes(bytes(len(file.read_bytes()))),
    "delete": lambda file: file.unlink(),
}


def _repaired(command: list[str], path: str, capsys: Output) -> None:
    """Runs a command that meets a damaged object, then what its error names, then the command again."""
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {path} "), error
    way_out = re.search(r": unclip (data check .*) quarantines it, and the next run makes it again$", error)
    assert way_out, error
    assert main(shlex.split(way_out[1])) == 0
    assert "quarantined" in capsys.readouterr().out


def _blob(store: Store, stage: str, name: str) -> str:
    return blob_path(read_shards(store, artifact(store, stage))[1].blobs[name])


def _overwrite(store: Store, path: str) -> None:
    WAYS["overwrite"](Path(store.url, path))


def _assert_healed(store: Store, reference: Store) -> None:
    assert_sound(store)
    assert keys(store) == keys(reference)
    assert data_blobs(store) == data_blobs(reference)


# The damaged object, the damage, and the stage that is forgotten so that somebody looks at it.
VICTIMS: dict[str, tuple[Callable[[Store], str], str, str]] = {
    "artefact record": (lambda s: artifact_path("pairs", artifact(s, "pairs").key), "truncate", ""),
    "shard record": (lambda s: shard_path("pairs", read_shards(s, artifact(s, "pairs"))[1].key), "overwrite", "pairs"),
    "pictures": (lambda s: _blob(s, "pairs", "images"), "truncate", "embeddings"),
    "index": (lambda s: _blob(s, "pairs", "index"), "overwrite", "embeddings"),
    "references": (lambda s: _blob(s, "source", "refs"), "delete", "pairs"),
    "captions": (lambda s: _blob(s, "captions", "captions"), "truncate", "curation"),
    "embeddings": (lambda s: _blob(s, "embeddings", "embeddings"), "overwrite", "codec"),
    "shard table": (lambda s: blob_path(artifact(s, "pairs").shard_table or ""), "delete", "curation"),
}


# The other kinds, all at once: test_several_damaged_objects_are_found_at_once.
FAST = ("artefact record", "shard record", "pictures", "index")


@pytest.mark.parametrize("victim", [v if v in FAST else pytest.param(v, marks=pytest.mark.slow) for v in VICTIMS])
def test_what_is_damaged_is_made_again(victim: str, undisturbed: Undisturbed, tmp_path: Path, capsys: Output) -> None:
    store = copy(undisturbed.data, tmp_path)
    find, way, forgotten = VICTIMS[victim]
    path = find(store)
    if forgotten:
        forget(store, forgotten, shards=victim != "shard record")
    WAYS[way](Path(store.url, path))
    damaged = store.read(path) if way != "delete" else None
    command = ["run", str(undisturbed.config(tmp_path)), "--until", "codec"]
    _repaired(command, path, capsys)
    assert main(command) == 0
    assert [store.read(entry.path) for entry in store.list(f"damaged/{path}.")] == ([damaged] if damaged else [])
    assert_each_shard_once(store, undisturbed.data)
    _assert_healed(store, undisturbed.data)


def test_several_damaged_objects_are_found_at_once(undisturbed: Undisturbed, tmp_path: Path, capsys: Output) -> None:
    store, config = copy(undisturbed.data, tmp_path), str(undisturbed.config(tmp_path))
    paths = [VICTIMS[victim][0](store) for victim in ("shard table", "captions", "embeddings", "references")]
    for path in paths:
        _overwrite(store, path)
    before = {entry.path: entry.version for entry in store.list("")}
    assert main(["data", "check", config, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [damage["path"] for damage in found["damage"]] == sorted(paths)
    assert {entry.path: entry.version for entry in store.list("")} == before
    assert main(["data", "check", config]) == 1
    said = capsys.readouterr().out
    assert all(f"{store.url}/{path} has other bytes than its name says: to be quarantined" in said for path in paths)
    assert "\nthe next run remakes what is lost of captions, embeddings, pairs, source; " in said
    assert f"nothing is changed without --repair: unclip data check {config} --repair" in said
    assert main(["data", "check", config, "--repair"]) == 0
    assert main(["run", config, "--until", "codec"]) == 0
    assert main(["data", "check", config]) == 0
    _assert_healed(store, undisturbed.data)


def test_a_lost_artefact_that_is_pinned_for_other_data_is_not_made_from_these(
    undisturbed: Undisturbed, tmp_path: Path, capsys: Output
) -> None:
    store = copy(undisturbed.data, tmp_path)
    clip = artifact(store, "clip").key
    more = write_list(tmp_path / "more.csv", 60, 65)
    config = write_config(tmp_path, store.url, undisturbed.pictures, [undisturbed.list, more], **FEW, run=IN_PROCESS)
    store.delete([artifact_path("clip", clip)])
    assert main(["run", str(config), "--until", "codec"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith(f"error: clip is pinned to {clip[:12]}, which is missing")
    assert "clip" not in keys(store)


def test_a_changed_picture_in_a_tar_of_the_users(tmp_path: Path, pictures: str, capsys: Output) -> None:
    pairs = [{f"{i:02d}.png": picture(i), f"{i:02d}.txt": f"colour {i}".encode()} for i in range(20)]
    tar = write_tar(tmp_path / "mine.tar", {name: data for pair in pairs for name, data in pair.items()})
    config = write_config(tmp_path, str(tmp_path / "store"), pictures, [tar], **FEW, run=IN_PROCESS)
    assert main(["run", str(config), "--until", "clip"]) == 0
    with tarfile.open(tar) as made:
        member = made.getmember("03.png")
    changed = bytearray(tar.read_bytes())
    changed[member.offset_data + member.size - 20] ^= 255
    when = tar.stat()
    tar.write_bytes(changed)
    os.utime(tar, ns=(when.st_atime_ns, when.st_mtime_ns))  # as after bits rotted: nothing says that it changed
    capsys.readouterr()
    assert main(["run", str(config), "--until", "embeddings"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert errors == [
        f"error: {tar} has another image of row 000000000003 than the index says: it is a file of yours: "
        "restore it, or list it again as a new source"
    ]
    changed[member.offset_data + member.size - 20] ^= 255
    tar.write_bytes(changed)
    os.utime(tar, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert main(["run", str(config), "--until", "embeddings"]) == 0


@pytest.mark.parametrize("until", ["pairs", pytest.param("decoder", marks=pytest.mark.slow)])
def test_a_full_disk(
    until: str,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
) -> None:
    store = copy(undisturbed.data, tmp_path)
    if until == "pairs":
        for stage in ("source", "pairs"):
            forget(store, stage)
        store.delete([entry.path for entry in store.list("blobs/")])
    room = _size(store) + (100_000 if until == "pairs" else 4_000_000)
    sync = os.fsync

    def full(handle: int) -> None:
        if _size(store) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    command = ["run", str(undisturbed.config(tmp_path)), "--until", until]
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        assert main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: store {store.url}: the disk is full; free space and run the same command again"
    assert_sound(store)
    assert main(command) == 0
    assert_sound(store)
    reference = undisturbed.data if until == "pairs" else undisturbed.trained
    assert read_shards(store, artifact(store, "pairs")) == read_shards(reference, artifact(reference, "pairs"))
    if until == "decoder":
        assert keys(store) == keys(reference)


def _size(store: Store) -> int:
    return sum(file.stat().st_size for file in Path(store.url).rglob("*") if file.is_file())


def test_damaged_pictures_are_found_by_an_export(undisturbed: Undisturbed, tmp_path: Path, capsys: Output) -> None:
    """And made again by the next run, to which everything is fresh otherwise."""
    store, config = copy(undisturbed.data, tmp_path), str(undisturbed.config(tmp_path))
    path = _blob(store, "pairs", "images")
    _overwrite(store, path)
    _repaired(["data", "export", config, "--to", str(tmp_path / "out")], path, capsys)
    assert main(["run", config, "--until", "codec"]) == 0
    _assert_healed(store, undisturbed.data)
    assert main(["data", "export", config, "--to", str(tmp_path / "again")]) == 0
