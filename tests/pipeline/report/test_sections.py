"""Tests that the sections show what stages leave in a store, and read little of it."""

import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pipeline.data.pairs.row_index import index_table
from pipeline.evaluate.figure import Figure
from pipeline.graph.artifacts import Artifact, Shard, read_shards, write_shard_table, write_table
from pipeline.ledger import Ledger
from pipeline.report.data import data_section
from pipeline.report.evaluation import evaluation_section
from pipeline.report.inputs import ReportInput
from pipeline.report.rows import read_first_shards
from pipeline.report.training import preview_names, read_curve
from pipeline.store import Entry, FolderStore
from pipeline.store.records import put_blob
from tests.pipeline.report.made_up import SHARDS


def test_curves_from_json_lines() -> None:
    early = {f"validation_loss_quarter_{i}": 0.1 * i for i in range(1, 5)}
    late = {"validation_loss_quarter_4": 0.02, "validation_loss_quarter_2": 0.5}  # no row fell into the others
    lines = [
        {"samples": 0, "validation_loss": 1.5, "validation_rows": 4, **early},
        {"samples": 128, "loss": 1.0},
        {"samples": 256, "loss": 0.5, "validation_loss": 0.75, **late},
        {"samples": 512, "validation_rows": 0},
    ]
    odd = [b"{", b"\xff\xfe", b"[1]", b"5", b"", b'{"loss": 1}', b'{"samples": 1, "loss": NaN}']
    odd += [b'{"samples": 1, "loss": []}', b'{"samples": 1, "validation_loss": null}']
    curve = read_curve(b"\n".join([*odd, *(json.dumps(line).encode() for line in lines)]))
    assert curve.train == [(128, 1.0), (256, 0.5)]
    assert curve.validation == [(0, 1.5), (256, 0.75)]
    assert (curve.quarters, curve.quarters_at) == ({2: 0.5, 4: 0.02}, 256)
    assert curve.unread == len(odd)


def test_why_nothing_was_measured_is_escaped(store: FolderStore) -> None:
    figures = [Figure("draws", "It <b>draws</b>.", "decoder", "top", "<i>", note="<script>alert(1)</script>").as_json()]
    made = Artifact("evaluation", "k", {}, {}, Ledger(), metrics={"figures": figures})
    page = evaluation_section(ReportInput(store, {"evaluation": made}))
    assert "Nothing was measured: &lt;script&gt;alert(1)&lt;/script&gt;." in page
    one = Figure("holds", "It holds.", "decoder", "top", "<i>", 1.0, 0.5, (0.1, 0.9), holds=True).as_json()
    made = replace(made, metrics={"figures": [*figures, one]})
    more = evaluation_section(ReportInput(store, {"evaluation": made}))
    assert "&lt;script&gt;" in more
    assert not any(tag in page + more for tag in ("<script", "<i>", "<b>draws"))


def test_previews_in_order_of_samples() -> None:
    numbered = {f"previews/{samples:012d}.png": str(samples) for samples in range(900, -1, -100)}
    found = preview_names(numbered | {"preview.png": "900", "model.safetensors": "m"})
    assert found == [(f"previews/{samples:012d}.png", samples) for samples in (0, 300, 600, 900)]
    assert preview_names({}) == []


def test_reasons_are_counted_once_and_explained(store: FolderStore, made: dict[str, Artifact]) -> None:
    page = data_section(ReportInput(store, made))
    assert page.count("<td>duplicate_url ") == 1  # the index of pairs holds these rows again
    assert "an earlier row names the same image" in page
    assert "low_similarity" in page
    assert "<figcaption>low_similarity <bdi>a " in page
    assert "https://example.com/0/9.png" in page
    assert "CC-BY-4.0" in page
    assert page.count("<img ") == 24 + 2  # of the twelve rejected rows shown, those that were rejected with an image


def test_sizes_are_those_of_kept_rows_whose_captions_and_images_are_known(
    store: FolderStore, made: dict[str, Artifact]
) -> None:
    page = data_section(ReportInput(store, made))
    kept = made["curation"].ledger.kept
    shards = read_first_shards(ReportInput(store, made))
    median = statistics.median_high(len(shard.captions[row["key"]]) for shard in shards for row in shard.kept_rows)
    assert f"Short sides of images: {kept} kept rows of 3 shards; the median is 96 px." in page
    assert f"Lengths of captions: {kept} kept rows of 3 shards; the median is {median} characters." in page
    early = data_section(ReportInput(store, {"pairs": made["pairs"]}))
    assert "Short sides of images: 78 kept rows" in early
    assert "Lengths of captions" not in early


def test_the_work_of_a_stage_is_told_where_it_was_written_down(store: FolderStore, made: dict[str, Artifact]) -> None:
    assert "<summary>Workers" not in data_section(ReportInput(store, made))
    took = {"workers": 2, "made_seconds": 10.0, "made_rows": 1000, "written_bytes": 25_000_000}
    took |= {"busy_seconds": 15.0, "wait_seconds": 1.0, "fetch_seconds": 12.0, "write_seconds": 2.0, "pack_seconds": 0}
    told = made | {"pairs": replace(made["pairs"], times={"seconds": 12.0, **took})}
    section = data_section(ReportInput(store, told))
    [row] = [line for line in section.splitlines() if line.startswith("<tr><td>pairs") and "fetch" in line]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert cells == ["pairs", "2", "100", "2.5", "75%", "5%", "fetch 60%, write 10%"]


def test_a_shard_that_kept_nothing_still_tells_why(store: FolderStore) -> None:
    lost = {"status": "rejected", "reason": "timeout"}
    rows = [{"key": str(i), "url": f"https://a:b1@example.com/{i}?X-Amz-Signature=5ec{i}", **lost} for i in range(5)]
    ledger = Ledger(0, {"timeout": 5})
    shard = Shard(0, "k", ledger, {"index": put_blob(store, write_table(index_table(rows)))})
    table, _ = write_shard_table(store, [shard])
    page = data_section(ReportInput(store, {"pairs": Artifact("pairs", "k", {}, {}, ledger, shard_table=table)}))
    assert "No pair was kept" in page
    assert "https://***@example.com/4?X-Amz-Signature=***" in page
    assert "5ec4" not in page


def test_a_damaged_image_costs_one_image(store: FolderStore, made: dict[str, Artifact]) -> None:
    [first, *_] = read_first_shards(ReportInput(store, made))
    rows = [dict(row) for row in first.rows]
    victim = next(row for row in rows if row["key"] in first.kept)
    victim["sha256"] = "0" * 64
    blobs = {"index": put_blob(store, write_table(index_table(rows))), "images": first.shard.blobs["images"]}
    table, ledger = write_shard_table(store, [Shard(0, "k", made["pairs"].ledger, blobs)])
    pairs = Artifact("pairs", "damaged", {}, {}, ledger, shard_table=table)
    page = data_section(ReportInput(store, {"pairs": pairs}))
    assert page.count("<img ") == 23
    assert f"Row {victim['key']} cannot be shown" in page


@dataclass(frozen=True)
class Counting:
    """Remembers what was read from a store."""

    store: FolderStore
    url: str = ""
    reads: list[str] = field(default_factory=list)

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        self.reads.append(path)
        return self.store.read(path, start, stop)

    def list(self, prefix: str) -> Iterator[Entry]:
        raise AssertionError("a report lists nothing")


def test_of_many_shards_few_are_read(store: FolderStore, made: dict[str, Artifact]) -> None:
    many = {}
    for stage in ("captions", "pairs", "embeddings", "curation"):
        rows = read_shards(store, made[stage])
        shards = [
            Shard(i, f"{stage}{i}", Ledger(kept=rows[i % SHARDS].kept), rows[i % SHARDS].blobs) for i in range(500)
        ]
        table, ledger = write_shard_table(store, shards)
        many[stage] = replace(made[stage], shard_table=table, ledger=ledger)
    counting = Counting(store)
    data_section(ReportInput(counting, many))
    assert len(counting.reads) < 60
