"""``unclip data``: what is forgotten is nowhere any more, and mistakes are one line."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import jobs.data
from pipeline.data.fetch.references import comparable
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.data.source.duplicates import hashes_of
from pipeline.data.source.journal import read_journal
from pipeline.graph.artifacts import load_artifact, read_shards, read_table
from pipeline.store import Store, open_store
from tests.chain import done, here, refused, shard_paths, write_config, write_list
from tests.pipeline.data.bench import save_clip
from tests.seaweed import Server

UNREACHED = ["no pair is left: 20 of 20 rows are unreachable", "unclip data retry"]
NOBODY = "run.pairs.hosts={drawings.test: '127.0.0.1:1'}"


def _project(
    folder: Path, pictures: str, url: str | None = None, stop: int = 120
) -> tuple[Store, Path, list[dict[str, str]]]:
    """The store, the configuration and the rows of a project of its own."""
    store = open_store(url or str(folder / "store"))
    rows = write_list(folder / "list.csv", 100, stop)
    config = write_config(folder, store.url, pictures, [rows], clip={"weights": save_clip(folder / "clip")})
    return store, config, list(csv.DictReader(rows.open()))


def _rows(store: Store, config: Path, stage: str) -> list[dict[str, Any]]:
    """The index rows of a stage's newest artefact, each with the stored bytes of its picture."""
    plan = done(here("plan", config))
    begin = next(line.split()[2] for line in plan.splitlines() if line.split()[0] == stage)
    (entry,) = store.list(f"artifacts/{stage}/{begin}")
    artifact = load_artifact(store, stage, entry.path.rpartition("/")[2].removesuffix(".json"))
    assert artifact is not None
    rows = []
    for shard in read_shards(store, artifact):
        table = read_table(store, shard.blobs["index"]).to_pylist()
        kept = [row for row in table if row["status"] == "kept"]
        places = [Place.of(row, shard.blobs.get("images")) for row in kept]
        pictures = dict(zip([r["key"] for r in kept], read_images(store, places), strict=True))
        rows += [row | {"picture": pictures.get(row["key"])} for row in table]
    return rows


def _holding(store: Store, *needles: bytes) -> list[str]:
    """Objects that hold one of these, in Parquet columns or as they are."""
    found = []
    for entry in store.list(""):
        data = store.read(entry.path)
        if data[:4] == b"PAR1":
            data = repr(pq.read_table(io.BytesIO(data)).to_pylist()).encode()
        if any(needle in data for needle in needles):
            found.append(entry.path)
    return found


def test_what_is_forgotten_is_nowhere_any_more(tmp_path: Path, pictures: str, s3: Server) -> None:
    store, config, listed = _project(tmp_path, pictures, f"{s3.url}/forget-{tmp_path.name}", 130)
    done(here("run", config, "--until", "curation"))
    before = _rows(store, config, "pairs")
    victim, caption = before[23], listed[23]["caption"].encode()
    assert len(_holding(store, victim["picture"])) == 1
    shards = shard_paths(store, "embeddings")

    said = done(here("data", "forget", config, victim["key"]))
    assert said.startswith("1 rows are forgotten\n")
    assert "pairs           stale" in said
    done(here("run", config, NOBODY, "--until", "curation"))  # none of the other pictures is fetched again
    after = _rows(store, config, "pairs")
    assert _others(after, victim) == _others(before, victim)
    assert after[23]["reason"] == "forgotten"
    assert len(shard_paths(store, "embeddings") - shards) == 1

    hashed = hashes_of([comparable(victim["url"])]).tobytes()
    assert _holding(store, victim["picture"], caption)
    assert _holding(store, hashed)
    done(here("data", "gc", config, "--yes", "--grace-hours", "0"))
    assert not _holding(store, victim["picture"], caption, str(victim["url"]).encode(), hashed)
    assert _holding(store, hashes_of([comparable(before[24]["url"])]).tobytes())
    assert _rows(store, config, "pairs") == after
    assert "nothing to do" in done(here("run", config, "--until", "curation"))


def test_what_is_forgotten_is_not_tried_again(tmp_path: Path, pictures: str) -> None:
    """Rows that failed and are to be tried again, and one of them is forgotten then."""
    store, config, listed = _project(tmp_path, pictures)
    victim = listed[7]
    for _ in range(2):  # the second time the very same rows, since all have failed again
        refused("run", config, NOBODY, "run.pairs.retries=0", "--until", "pairs", says=UNREACHED)
        others = done(here("data", "retry", config, "--reason", "timeout"))
        assert re.fullmatch(r"no row to retry; .*: \d+ unreachable; --reason unreachable retries those\n", others)
        assert done(here("data", "retry", config)).startswith("20 rows are retried in place")
    assert done(here("data", "forget", config, victim["url"])).startswith("1 rows are forgotten")
    done(here("run", config, "--until", "curation"))
    ended = [row["reason"] for row in _rows(store, config, "pairs")]
    assert ended == [None] * 7 + ["forgotten"] + [None] * 12
    done(here("data", "gc", config, "--yes", "--grace-hours", "0"))
    assert not _holding(store, victim["url"].encode(), victim["caption"].encode())
    assert "nothing to do" in done(here("run", config, "--until", "curation"))


@pytest.mark.parametrize("other", ["forget", "retry", "list"])
def test_a_retry_beside_another_command(
    tmp_path: Path, pictures: str, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """While rows are gathered one of them is forgotten; or, before, the list becomes another one."""
    store, config, listed = _project(tmp_path, pictures)
    refused("run", config, NOBODY, "run.pairs.retries=0", "--until", "pairs", says=UNREACHED)
    victim = listed[7]
    scan, gather = jobs.data.scan, jobs.data.gather

    def meanwhile(*arguments: Any, **named: Any) -> Any:
        monkeypatch.undo()
        if other == "list":
            write_list(tmp_path / "list.csv", 100, 121)
        else:
            done(here("data", other, config, *([victim["url"]] if other == "forget" else [])))
        return (gather if other == "forget" else scan)(*arguments, **named)

    monkeypatch.setattr(jobs.data, "gather" if other == "forget" else "scan", meanwhile)
    if other == "list":
        refused("data", "retry", config, says="the list has changed meanwhile")
    elif other == "retry":
        refused("data", "retry", config, says="another process has changed the rows to retry")
    else:
        assert done(here("data", "retry", config)).startswith("20 rows are retried in place")
        done(here("run", config, "--until", "pairs"))
        assert [row["reason"] for row in _rows(store, config, "pairs")] == [None] * 7 + ["forgotten"] + [None] * 12


def _others(rows: list[dict[str, Any]], but: dict[str, Any]) -> list[dict[str, Any]]:
    """The other rows; their places in the tar may have moved."""
    return [{k: v for k, v in row.items() if k != "offset"} for row in rows if row["key"] != but["key"]]


def test_mistakes(tmp_path: Path, pictures: str) -> None:
    """Those of a project whose pairs are made; others are in the table of mistakes and in test_as_run.py."""
    store, config, listed = _project(tmp_path, pictures)
    done(here("run", config, "--until", "pairs"))
    refused("data", "retry", config, "--reason", "timeout,opted_out", says="opted_out is final")
    (tmp_path / "windows.txt").write_text("\ufeff000000000998\n", encoding="utf-8")  # a key, behind a byte order mark
    refused("data", "forget", config, "--file", tmp_path / "windows.txt", says="000000000998: no row")
    refused("data", "forget", config, "000000000999", says=["000000000999: no row", "nothing is forgotten"])
    refused("data", "forget", config, "0" * 64, says="no stored image")
    journal = read_journal(store, yaml.safe_load(config.read_text())["project"])
    says = ["nosuch: no row of the list has this reference; nothing is forgotten", "a URL, a file's whole path"]
    refused("data", "forget", config, listed[0]["url"], "nosuch", says=says)
    assert read_journal(store, yaml.safe_load(config.read_text())["project"]) == journal
