"""``unclip data``: what is forgotten is nowhere any more, and mistakes are one line."""

import csv
import io
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
from tests.chain import done, here, shard_paths, write_config, write_list
from tests.jobs.test_mistakes import refused
from tests.seaweed import Server


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
    url = f"{s3.url}/forget-{tmp_path.name}"
    store = open_store(url)
    write_list(tmp_path / "list.csv", 100, 150)
    config = write_config(tmp_path, url, pictures, [tmp_path / "list.csv"])
    done(here("run", config, "--until", "curation"))
    before = _rows(store, config, "pairs")
    victim = before[23]
    caption = list(csv.DictReader((tmp_path / "list.csv").open()))[23]["caption"].encode()
    assert len(_holding(store, victim["picture"])) == 1
    shards = shard_paths(store, "embeddings")

    said = done(here("data", "forget", config, victim["key"]))
    assert said.startswith("1 rows are forgotten\n")
    assert "pairs           stale" in said
    nobody = "run.pairs.hosts={drawings.test: '127.0.0.1:1'}"  # none of the other pictures is fetched again
    done(here("run", config, nobody, "--until", "curation"))
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


def test_what_is_forgotten_is_not_kept_by_a_retry(tmp_path: Path, pictures: str) -> None:
    """Rows that failed, were appended to be tried again, and are forgotten then."""
    write_list(tmp_path / "list.csv", 100, 120)
    store = open_store(str(tmp_path / "store"))
    config = write_config(tmp_path, store.url, pictures, [tmp_path / "list.csv"])
    nobody = ("run.pairs.hosts={drawings.test: '127.0.0.1:1'}", "run.pairs.retries=0", "--until", "pairs")
    for _ in range(2):  # the second time the very same rows, since all have failed again
        done(here("run", config, *nobody))
        assert done(here("data", "retry", config)).startswith("20 rows are appended")
    victim = list(csv.DictReader((tmp_path / "list.csv").open()))[7]
    assert done(here("data", "forget", config, victim["url"])).startswith("3 rows are forgotten")
    done(here("run", config, "--until", "curation"))
    ended = [row["reason"] for row in _rows(store, config, "pairs")]
    assert ended[:20] == ended[20:40] == ["unreachable"] * 7 + ["forgotten"] + ["unreachable"] * 12
    assert ended[40:] == [None] * 7 + ["forgotten"] + [None] * 12
    done(here("data", "gc", config, "--yes", "--grace-hours", "0"))
    assert not _holding(store, victim["url"].encode(), victim["caption"].encode())
    assert "nothing to do" in done(here("run", config, "--until", "curation"))


@pytest.mark.parametrize("other", ["forget", "retry", "list"])
def test_a_retry_beside_another_command(
    tmp_path: Path, pictures: str, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """While rows are gathered one of them is forgotten; or, before, the list becomes another one."""
    write_list(tmp_path / "list.csv", 100, 120)
    store = open_store(str(tmp_path / "store"))
    config = write_config(tmp_path, store.url, pictures, [tmp_path / "list.csv"])
    nobody = ("run.pairs.hosts={drawings.test: '127.0.0.1:1'}", "run.pairs.retries=0", "--until", "pairs")
    done(here("run", config, *nobody))
    victim = list(csv.DictReader((tmp_path / "list.csv").open()))[7]
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
        refused("data", "retry", config, says=["the list has changed meanwhile"])
    elif other == "retry":
        refused("data", "retry", config, says=["somebody else has changed the rows to be tried again"])
    else:
        assert done(here("data", "retry", config)).startswith("20 rows are appended")
        (retried,) = read_journal(store, yaml.safe_load(config.read_text())["project"]).retries
        references = [row["url"] for row in read_table(store, retried).to_pylist()]
        assert references[7] == ""
        assert victim["url"] not in references


def _others(rows: list[dict[str, Any]], but: dict[str, Any]) -> list[dict[str, Any]]:
    """The other rows; their places in the tar may have moved."""
    return [{k: v for k, v in row.items() if k != "offset"} for row in rows if row["key"] != but["key"]]


def test_mistakes(tmp_path: Path, pictures: str) -> None:
    write_list(tmp_path / "list.csv", 100, 120)
    config = write_config(tmp_path, str(tmp_path / "store"), pictures, [tmp_path / "list.csv"])
    refused(
        "data",
        "retry",
        config,
        "--reason",
        "timeout",
        says=["not made for the current list and recipes: pairs", "--until pairs"],
    )
    done(here("run", config, "--until", "pairs"))
    refused("data", "retry", config, "--reason", "timout", says=["unknown reason timout"])
    refused("data", "retry", config, "--reason", "timeout,opted_out", says=["opted_out is final"])
    assert "no row to retry" in done(here("data", "retry", config, "--reason", "timeout"))
    other = ("--set", "pairs.encode_quality=90")  # of which no pairs are made
    refused("data", "retry", config, *other, says=["not made for the current list and recipes: pairs"])
    refused("data", "retry", config, "--set", "pairs.quality=90", says=["pairs.quality: unknown key"])
    refused("data", "forget", config, says=["nothing to forget"])
    (tmp_path / "windows.txt").write_text("\ufeff000000000998\n", encoding="utf-8")  # a key, behind a byte order mark
    refused("data", "forget", config, "--file", tmp_path / "windows.txt", says=["000000000998: no row"])
    refused("data", "forget", config, "--file", tmp_path / "none.txt", says=["none.txt: cannot be read"])
    refused("data", "forget", config, "000000000999", says=["000000000999: no row", "nothing is forgotten"])
    refused("data", "forget", config, "0" * 64, says=["no stored image"])
