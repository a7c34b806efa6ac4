"""Tests that the page is complete, safe, small, balanced and atomic, and never fails for what a store holds."""

import random
import re
import shutil
import signal
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact
from pipeline.graph.stages import Graph
from pipeline.report import page as report
from pipeline.report.images import Album
from pipeline.report.inputs import ReportInput
from pipeline.report.page import write_report
from pipeline.store import FolderStore
from pipeline.store.records import blob_path, put_blob
from tests.pipeline.report.made_up import chain, config, encoded, graph

TILES = [("samples", "Images"), ("evaluation", "Quality"), ("data", "Data"), ("lineage", "Cost")]
STAGES = (
    *("source", "captions", "pairs", "filter", "clip", "embeddings", "curation", "index", "codec", "ar_prior"),
    *("diffusion_prior", "decoder", "upsampler_256", "upsampler_1024", "bundle", "samples", "evaluation"),
)
SECTIONS = (*("samples", "evaluation"), *("data", "codec", "training", "lineage", "environment"))
VOID = {"meta", "img", "br"}


def render(store: FolderStore, config: Any, graph: Graph, made: dict[str, Artifact]) -> str:
    """Returns the page of these artefacts."""
    return report.render(ReportInput(store, made), config, graph)


class Balance(HTMLParser):
    """Collects ids, links and sources, and fails on a tag that is not closed in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.unnamed = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data") and v]
        self.unnamed += tag == "img" and not values.get("alt")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Passes over the empty elements of SVG."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(page: str) -> Balance:
    """Asserts what holds for every page, whatever it shows."""
    balance = Balance()
    balance.feed(page)
    balance.close()
    assert balance.open == []
    assert len(balance.ids) == len(set(balance.ids))
    assert not balance.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    links = {reference[1:] for reference in balance.references if reference.startswith("#")}
    assert links <= set(balance.ids)
    assert links >= set(balance.ids) & set(SECTIONS)  # the contents name every section
    others = [reference for reference in balance.references if not reference.startswith(("#", "samples/"))]
    assert all(reference.startswith("data:image/") for reference in others)
    assert "url(" not in page.split("</style>")[0]
    assert balance.unnamed == 0
    assert len(page.encode()) < 5 << 20
    return balance


def test_a_full_chain_has_every_section(store: FolderStore, made: dict[str, Artifact], tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.html"
    write_report(store, config(), graph(), made, path)
    page = path.read_text()
    balance = checked(page)
    assert [name for name in balance.ids if name in SECTIONS] == list(SECTIONS)
    assert set(balance.ids) >= {"clip", "ar_prior", "diffusion_prior", "decoder", "upsampler_256", "upsampler_1024"}
    assert "cannot be shown" not in page
    assert all(made[stage].key[:12] in page for stage in STAGES)
    assert "<b>75 of 90 rows</b>" in page
    assert re.findall(r'<li><h2><a href="#(\w+)">(\w+)</a></h2>', page) == TILES
    assert "a crimson circle on white" in page
    assert "http-equiv" not in page
    # Funnel, sizes, lengths, similarity, spectrum, six losses, four by timestep.
    assert page.count('role="img"') == 15
    assert page.count('alt="preview of decoder after') == 4
    # Three lines, and in the table of all numbers three lines and four figures.
    assert (page.count(">✓<"), page.count(">✗<"), page.count(">·<")) == (1 + 1 + 2, 1 + 1 + 1, 1 + 1 + 1)
    assert "+0.2 (-0.1 to 0.3)" in page
    assert "From above: the real image; the AR prior; the decoder, given the image&#39;s own embedding." in page
    assert page.count('alt="Held-out captions: ') == 8
    assert "243 a second, 41% of what matrix products reach there</summary>" in page
    assert "<td>time: forward</td><td><bdi>98.0%</bdi></td>" in page
    assert "319 components asked for, 95 kept" in page
    assert "fp32 (clip); bf16 (ar_prior" in page
    assert [p.name for p in path.parent.iterdir()] == ["report.html", "report.json"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_beginning_and_every_gap_works(store: FolderStore, made: dict[str, Artifact], stage: str) -> None:
    until = STAGES[: STAGES.index(stage) + 1]
    for names in (until, [name for name in reversed(STAGES) if name != stage], [stage]):
        page = render(store, config(), graph(), {name: made[name] for name in names})
        checked(page)
        assert "cannot be shown" not in page
        assert ('http-equiv="refresh"' in page) == (not {"samples", "evaluation"} <= set(names))


def test_the_chain_is_that_of_the_configuration(store: FolderStore, made: dict[str, Artifact]) -> None:
    nothing = render(store, config(), graph(), {})
    checked(nothing)
    assert "0 of 17 stages are done; next is source." in nothing
    small = graph(
        "bundle.models=[diffusion_prior, decoder]", "bundle.sampling.prior=diffusion", "bundle.sampling.size=64"
    )
    page = render(store, config(), small, {"source": made["source"]})
    assert re.findall(r'<li class="(\w+)">(\w+)</li>', page) == [
        ("done", "source"),
        *(("open", name) for name in ("captions", "pairs", "filter", "clip", "embeddings", "curation", "index")),
        *(("open", name) for name in ("diffusion_prior", "decoder", "bundle", "samples", "evaluation")),
    ]
    data = {name: stage for name, stage in graph().items() if stage.kind in ("source", "data") or name == "clip"}
    del data["codec"]
    page = render(store, config(), data, {"source": made["source"]})
    assert "http-equiv" not in page  # there are no results to be waited for
    assert "1 of 8 stages" in page


def test_hostile_captions_are_escaped_and_shortened(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' \u202e" + "long " * 2000
    store = FolderStore(str(tmp_path))
    made = chain(store, caption=hostile)
    made["<b>odd</b>"] = replace(made["bundle"], stage="<b>odd</b>", key="<i>key</i>")
    named = config()
    named.project = "<script>project</script>"
    page = render(store, named, graph(), made)
    checked(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "onerror=alert(2)>" not in page
    assert "long " * 100 not in page
    assert "&lt;script&gt;project" in page
    assert "&lt;b&gt;odd" in page


def test_missing_blobs_become_lines(store: FolderStore, made: dict[str, Artifact], tmp_path: Path) -> None:
    store = FolderStore(shutil.copytree(store.url, str(tmp_path / "copy")))
    decoder, samples = made["decoder"].blobs, made["samples"].blobs
    gone = [decoder["metrics.jsonl"], decoder["preview.png"], samples["0002.png"]]
    gone += [made["embeddings"].shard_table or "", made["captions"].shard_table or ""]
    store.delete(map(blob_path, gone))
    page = render(store, config(), graph(), made)
    checked(page)
    for what in ("The loss curve of decoder", "previews/000000051200.png of decoder", "Sample 0002.png"):
        assert f"{what} cannot be shown: blobs/" in page
    assert "The histogram of similarity cannot be shown: blobs/" in page
    assert "What the first shards hold cannot be shown: blobs/" in page
    assert page.count("cannot be shown") == 5


def test_an_empty_store_and_odd_metrics_never_fail(tmp_path: Path, made: dict[str, Artifact]) -> None:
    odd = {"explained_variance_ratio": "x", "captions": 5, "seeds": {"a": 1}, "settings": [1], "warnings": 3}
    times: dict[str, Any] = {"seconds": 1.0, "rate": "?"}
    broken = {name: replace(artifact, metrics=odd, times=times) for name, artifact in made.items()}
    page = render(FolderStore(str(tmp_path)), config(), graph(), broken)
    checked(page)
    assert page.count("cannot be shown") > 10


def test_many_large_noisy_images_stay_within_the_limit(store: FolderStore, made: dict[str, Artifact]) -> None:
    noise = Image.frombytes("RGB", (640, 640), random.Random(0).randbytes(3 * 640 * 640))
    blob = put_blob(store, encoded(noise))
    noisy = {"samples": replace(made["samples"], blobs={f"{i:04d}.png": blob for i in range(200)})}
    for stage in ("clip", "ar_prior", "decoder", "upsampler_256", "upsampler_1024"):
        noisy[stage] = replace(made[stage], blobs={f"previews/{i}.png": blob for i in range(50)})
    page = render(store, config(), graph(), made | noisy)
    checked(page)
    assert "188 more are in the folder of samples" in page


def test_the_old_report_stands_when_the_writer_dies(
    store: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/jobs/test_every_crash.py kills the process there."""
    path = tmp_path / "report.html"
    write_report(store, config(), graph(), {}, path)
    before = path.read_bytes()
    monkeypatch.setattr(report, "crash_point", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        write_report(store, config(), graph(), {}, path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_report_that_cannot_be_written_is_explained(store: FolderStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*; choose another run\.output"):
        write_report(store, config(), graph(), {}, tmp_path / "file" / "report.html")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(store, config(), graph(), {}, tmp_path / "report.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "report.html", "report.json"]


def test_a_section_that_a_stage_declares_is_escaped_and_never_stops_the_page(
    store: FolderStore, made: dict[str, Artifact]
) -> None:
    def page(show: Any, licenses: tuple[str, ...] | None = None) -> str:
        stages = {name: replace(each, show=show if name == "index" else None) for name, each in graph().items()}
        whole = report.render(ReportInput(store, made, Album(licenses=licenses)), config(), stages)
        return whole.partition('<section id="stage-index">')[2].partition("</section>")[0] or whole

    shown = {"<b>rows</b>": 7, "a <i>strip</i>": encoded(Image.new("RGB", (8, 8)))}
    section = page(lambda *_: shown)
    assert "&lt;b&gt;rows&lt;/b&gt;" in section
    assert section.count("<img ") == 1
    assert not any(tag in section for tag in ("<b>", "<i>"))
    assert page(lambda *_: shown, ("CC0-1.0",)).count("<img ") == 0
    assert "The section of index cannot be shown: division by zero" in page(lambda *_: 1 / 0)
