"""Datasets of the Hugging Face Hub, fetched by the Hub's own client from an endpoint on this machine."""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.cli import main
from pipeline.data.source import hub
from pipeline.data.source.lists import read_rows, source_at
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import ListRow
from pipeline.errors import UserError
from tests.pipeline.data.bench import Bench, Page, Pages, picture, serving

PATH = "hf://datasets/owner/birds"
COMMITS = ["a" * 40, "b" * 40]
Served = dict[str, bytes]


class Hub(Pages):
    """The API of the Hub, as far as a dataset is read: its commit, its files and their bytes."""

    def publish(self, commit: str, files: Served) -> None:
        said = {"id": "owner/birds", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        info = Page(json.dumps(said).encode(), headers={"Content-Type": "application/json"})
        self["/api/datasets/owner/birds"] = self["/api/datasets/owner/birds/revision/main"] = info
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        tree = Page(json.dumps(entries).encode(), headers={"Content-Type": "application/json"})
        self[f"/api/datasets/owner/birds/tree/{commit}"] = tree
        for name, data in files.items():
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            self[f"/datasets/owner/birds/resolve/{commit}/{name}"] = Page(data, headers=headers)

    def get(self, path: str, default: Any = None) -> Any:
        return super().get(path.partition("?")[0], default) if path.partition("?")[0] in self else Page(status=404)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    pages = Hub({})
    with serving(pages) as address:
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "ENDPOINT", f"http://{address}")
        template = f"http://{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield pages
        forget()


def forget() -> None:
    """Makes this process know nothing of the Hub, as a new one."""
    hub._commit.cache_clear()
    hub._fetched.cache_clear()


def parquet(*seeds: int) -> bytes:
    out = io.BytesIO()
    table = {"image": [{"bytes": picture(i), "path": None} for i in seeds], "text": [f"picture {i}" for i in seeds]}
    pq.write_table(pa.table(table), out)
    return out.getvalue()


def rows_of(path: str = PATH) -> list[ListRow]:
    return list(read_rows(path, SourceRecipe((path,))))


def test_a_dataset_is_fetched_once_and_kept_to_its_commit(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"data/train-00000-of-00001.parquet": parquet(0, 1, 2), "data/test-00000-of-00001.parquet": parquet(3)}
    served.publish(COMMITS[0], {"README.md": b"birds", "a.png": picture(9), **parts})
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine", PATH]) == 0
    assert yaml.safe_load(Path("mine.yaml").read_text())["source"]["paths"] == [f"{PATH}@{COMMITS[0]}"]
    assert "pairs found: 4\n" in capsys.readouterr().out
    asked = [path for path in served.asked if "/resolve/" in path]
    assert {path.rpartition("/")[2] for path in asked} == {Path(name).name for name in parts}
    assert len(rows_of()) == 4
    assert [path for path in served.asked if "/resolve/" in path] == asked
    served.publish(COMMITS[1], {"data/train-00000-of-00001.parquet": parquet(4)})
    forget()
    assert source_at(PATH).fingerprint() != source_at(f"{PATH}@{COMMITS[0]}").fingerprint()
    assert [row.captions for row in rows_of()] == [("picture 4",)]
    bench = Bench(tmp_path / "store", [f"{PATH}@{COMMITS[0]}"])
    assert bench.make("source", "captions", "pairs").ledger.kept == 4
    assert next(row["split"] for row in bench.rows("pairs")) == "test"
    assert all(COMMITS[0] in row["url"] for row in bench.rows("pairs"))


def test_folders_and_files_of_a_dataset_may_be_named(served: Hub) -> None:
    lines = "".join(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) + "\n" for i in range(2))
    images = {f"images/train/{i}.png": picture(i) for i in range(2)}
    served.publish(
        COMMITS[0],
        {**images, "images/train/metadata.jsonl": lines.encode(), "urls.csv": b"url,caption\nhttp://h/0.jpg,a cat\n"},
    )
    assert [row.captions for row in rows_of(f"{PATH}/images")] == [("picture 0",), ("picture 1",)]
    assert {row.reject for row in rows_of(f"{PATH}@main/images")} == {None}
    (row,) = rows_of(f"{PATH}/urls.csv")
    assert (row.url, row.captions) == ("http://h/0.jpg", ("a cat",))


def test_splits_are_read_from_the_names_of_files_where_all_are_there() -> None:
    named = {
        "data/train-00000-of-00002-0a.parquet": "train",
        "default/test/0000.parquet": "test",
        "dev.csv": "validation",
    }
    assert {name: hub._split(name) for name in named} == named
    assert hub._split("data/part-0.parquet") == ""


@pytest.mark.parametrize(
    ("path", "files", "said"),
    [
        ("hf://datasets/owner/none", {}, "cannot be fetched from the Hugging Face Hub"),
        (
            PATH,
            {"README.md": b"no data"},
            "has a supported format; if the Hub has converted it to Parquet, write hf://data",
        ),
        ("hf://owner/birds", {}, "a model of the Hub, not a dataset; write hf://datasets/OWNER/NAME"),
        ("hf://datasets/birds", {}, "Write hf://datasets/OWNER/NAME"),
        ("https://huggingface.co/datasets/owner/birds", {}, "for the Hugging Face Hub, write hf://datasets/OWNER/NAME"),
        ("owner/birds", {}, "a dataset of the Hugging Face Hub is hf://datasets/owner/birds"),
        (f"{PATH}@{COMMITS[0]}/data", {"../../x.parquet": parquet(0)}, "none of its 0 files"),
    ],
)
def test_what_cannot_be_had_is_said_in_a_line(served: Hub, path: str, files: Served, said: str) -> None:
    served.publish(COMMITS[0], files)
    with pytest.raises(UserError, match=r"source .*") as error:
        rows_of(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_large_is_not_fetched_unasked(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MOST_BYTES", 100)
    served.publish(COMMITS[0], {"a.parquet": parquet(0)})
    with pytest.raises(UserError, match=r"type: hf download owner/birds --repo-type dataset --revision a{40}"):
        rows_of()
