"""Made captions: asked for once, joined with the list's, read by the stages behind, and in the keys of these alone."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.responses import JSONResponse, Response

from models.random_streams import derive_seed
from pipeline.build import build
from pipeline.config import make_config
from pipeline.data.recaption import recipe as module
from pipeline.data.recaption import stage as stage_module
from pipeline.data.recaption.recipe import RecaptionRecipe
from pipeline.data.recaption.stage import RECAPTION
from pipeline.data.source.rows import read_captions
from pipeline.data.source.stage import CAPTIONED
from pipeline.errors import UserError
from pipeline.graph.artifacts import ShardList, read_shards, read_table
from pipeline.graph.plan import plan
from pipeline.graph.runs import record_run
from pipeline.store import open_store
from pipeline.training.feed.tables import JoinedRow, Tables
from tests.pipeline.data.bench import Bench, picture, save_clip
from tests.vision import KEY, Vision, caption_of, completion, serving

ROWS, MISSING, SEVERAL, NONE = 23, 4, 6, 7  # rows without an image, with three captions, without one
PARTS = 4


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vision]:
    monkeypatch.setattr(module, "PART", PARTS)
    monkeypatch.setattr(stage_module, "PART", PARTS)
    monkeypatch.setattr("pipeline.data.recaption.answers.PART", PARTS)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as vision:
        monkeypatch.setenv("OPENAI_BASE_URL", vision.url)
        yield vision


def write(folder: Path, rows: int = ROWS) -> str:
    """A list of pictures, of which one is missing."""
    captions = [[f"picture {i}"] for i in range(rows)]
    captions[SEVERAL], captions[NONE] = ["a red heart", "a heart", "love"], []
    for i in set(range(rows)) - {MISSING}:
        (folder / f"{i}.png").write_bytes(picture(i, 80 + i, 100))
    urls = [f"file://{folder}/{i}.png" for i in range(rows)]
    splits = ["test" if i % 8 == 5 else "train" for i in range(rows)]
    table = pa.table({"url": urls, "caption": pa.array(captions, pa.list_(pa.string())), "split": splits})
    pq.write_table(table, folder / "list.parquet")
    return str(folder / "list.parquet")


def bench(folder: Path, path: str, recaption: dict[str, Any] | None = None, **changes: Any) -> Bench:
    """The graph of a list, of which everything before recaption is made."""
    settings = {"workers": 0, "retries": 0, **changes.pop("settings", {})}
    given = {"model": "eye", "image_size": 64} | (recaption or {})
    made = Bench(folder / "store", [path], recaption=given, run={"recaption": settings}, **changes)
    made.make("source", "captions", "pairs")
    return made


def captions(made: Bench) -> dict[str, list[str]]:
    """The captions of all rows, by key."""
    shards = read_shards(made.store, made.made["recaption"])
    return {key: texts for shard in shards for key, texts in read_captions(made.store, shard).items()}


def contents(made: Bench) -> Any:
    """What the artefact says, without tokens and requests, which a resumed run has elsewhere."""
    artifact = made.made["recaption"]
    blobs = [(shard.number, shard.key, shard.blobs) for shard in read_shards(made.store, artifact)]
    return artifact.key, artifact.metrics["made"], artifact.metrics["reasons"], blobs


def test_a_made_caption_stands_before_those_of_the_list(tmp_path: Path, vision: Vision) -> None:
    made = bench(tmp_path, write(tmp_path))
    artifact = made.make("recaption")
    kept = [row["key"] for row in made.rows("pairs") if row["status"] == "kept"]
    texts = captions(made)
    listed = {
        k: c for s in read_shards(made.store, made.made["captions"]) for k, c in read_captions(made.store, s).items()
    }
    assert texts.keys() == listed.keys()
    said = {caption_of(image, RecaptionRecipe().prompt, "eye") for image in vision.asked}
    assert {texts[key][0] for key in kept} == said
    assert all(texts[key][1:] == listed[key] for key in kept)
    assert {key: texts[key] for key in texts if key not in kept} == {
        key: listed[key] for key in listed if key not in kept
    }
    assert all(count == 1 for count in vision.asked.values())
    assert artifact.metrics | {"reasons": None} == {
        "shards": 3, "asked": ROWS - 1, "made": ROWS - 1, "prompt_tokens": 100 * (ROWS - 1),
        "answer_tokens": 7 * (ROWS - 1), "made_share": 0.95, "reasons": None,
    }  # fmt: skip
    table = ShardList(made.store, artifact)
    assert artifact.ledger.rows == ROWS == table.counts(CAPTIONED).sum()  # the row without one has one now
    assert all("64 pixels" in texts[key][0] or "64 by" in texts[key][0] for key in kept)


def test_a_bad_answer_costs_its_row_the_made_caption_alone(tmp_path: Path, vision: Vision) -> None:
    path = write(tmp_path)
    calm = bench(tmp_path, path)
    calm.make("recaption")
    whole, images = captions(calm), sorted(vision.asked)
    answers = {
        images[0]: Response(status_code=500),
        images[1]: JSONResponse(completion("I'm sorry, I can't help with that.")),
        images[2]: JSONResponse(completion("")),
        images[3]: JSONResponse(completion("word " * 500)),
        images[4]: JSONResponse(["nonsense"]),
        images[5]: Response(status_code=400),
        images[6]: JSONResponse(completion("\x00\x01")),
    }
    (tmp_path / "again").mkdir()
    vision.answer = lambda image, before: answers.get(image)
    faulty = bench(tmp_path / "again", path)
    artifact = faulty.make("recaption")
    assert artifact.metrics["reasons"] == dict.fromkeys(
        ["http_5xx", "refused", "empty_answer", "answer_too_long", "malformed_answer", "http_4xx", "not_text"], 1
    )
    assert artifact.metrics["made"] == ROWS - 1 - len(answers)
    bad = {caption_of(image, RecaptionRecipe().prompt, "eye") for image in answers}
    assert captions(faulty) == {key: texts[1:] if texts and texts[0] in bad else texts for key, texts in whole.items()}


def test_a_budget_stops_and_the_same_command_goes_on(tmp_path: Path, vision: Vision) -> None:
    path = write(tmp_path)
    calm = bench(tmp_path, path)
    calm.make("recaption")
    vision.images.clear()
    (tmp_path / "again").mkdir()
    poor = bench(tmp_path / "again", path, settings={"budget": 8})
    for stop in (1, 2, 3):  # of seven parts two each time; the last part of a shard has fewer rows
        before = vision.asked.total()
        with pytest.raises(UserError, match=r"budget of 8 images is spent, and about \d+ are left: .* requests more"):
            poor.make("recaption")
        assert 0 < vision.asked.total() - before <= 8, stop
    poor.make("recaption")
    assert contents(poor) == contents(calm)
    assert set(vision.asked.values()) == {1}
    assert vision.asked.total() == ROWS - 1


def test_what_a_spent_budget_paid_for_is_a_smaller_coverage(tmp_path: Path, vision: Vision) -> None:
    path = write(tmp_path)
    poor = bench(tmp_path, path, settings={"budget": 12})
    with pytest.raises(UserError) as caught:
        poor.make("recaption")
    coverage = float(str(caught.value).partition("recaption.coverage=")[2].partition(" ")[0])
    before = vision.asked
    less = bench(tmp_path, path, {"coverage": coverage})
    made = less.make("recaption").metrics["made"]
    assert vision.asked == before
    assert 0 < made <= before.total()
    more = bench(tmp_path, path)
    more.make("recaption")
    assert set(vision.asked.values()) == {1}


def test_appended_rows_ask_for_theirs_alone(tmp_path: Path, vision: Vision) -> None:
    path = write(tmp_path)
    made = bench(tmp_path, path)
    verdicts = plan(made.graph, made.source_keys, "bench", made.store, {})
    record_run(made.store, "bench", made.graph, verdicts)
    made.make("recaption")
    for entry in list(made.store.list("shards/recaption/")):  # as a garbage collection leaves it
        if entry.path.rpartition("/")[2].removesuffix(".json") not in {
            shard.key for shard in read_shards(made.store, made.made["recaption"])
        }:
            made.store.delete([entry.path])
    before = captions(made)
    more = bench(tmp_path, write(tmp_path, ROWS + 9))
    more.make("recaption")
    assert vision.asked.total() == ROWS - 1 + 9
    assert set(vision.asked.values()) == {1}
    assert captions(more).items() >= before.items()


def graph_keys(**recaption: Any) -> dict[str, str]:
    values = {"project": "p", "store": "s", "preset": "nano", "source": {"paths": ["list.csv"]}}
    config = make_config(values | ({"recaption": recaption} if recaption else {}))
    with tempfile.TemporaryDirectory() as folder:
        verdicts = plan(build(config), {"source": "s", "captions": "c"}, "p", open_store(folder), {})
    return {verdict.stage: verdict.key for verdict in verdicts}


@pytest.mark.parametrize(
    "change", [{"prompt": "What?"}, {"model": "ear"}, {"image_size": 96}, {"parameters": {}}, {"share": 0.5}]
)
def test_prompt_and_model_move_recaption_and_what_reads_captions(change: dict[str, Any]) -> None:
    without, before, after = graph_keys(), graph_keys(model="eye"), graph_keys(**{"model": "eye", **change})
    assert "recaption" not in without
    assert before.keys() == without.keys() | {"recaption"}
    reading = {name for name, stage in build_graph().items() if {"recaption"} & behind(build_graph(), name)}
    assert reading >= {"clip", "embeddings", "curation", "decoder", "upsampler_256", "bundle"}
    assert {name for name in before if before[name] != after[name]} == reading | {"recaption"}
    assert {name for name in without if before[name] != without[name]} == reading
    assert {before[name] for name in ("source", "captions", "pairs")} == {"s", "c", without["pairs"]}


def build_graph() -> Any:
    values = {"project": "p", "store": "s", "preset": "nano", "source": {"paths": ["list.csv"]}}
    return build(make_config(values | {"recaption": {"model": "eye"}}))


def behind(graph: Any, name: str) -> set[str]:
    """All stages that a stage is made from."""
    return set(graph[name].inputs).union(*(behind(graph, each) for each in graph[name].inputs))


def test_a_prompt_asks_again_and_a_share_of_draws_does_not(tmp_path: Path, vision: Vision) -> None:
    path = write(tmp_path)
    made = bench(tmp_path, path)
    made.make("recaption")
    other = bench(tmp_path, path, {"share": 0.5})
    other.make("recaption")
    assert vision.asked.total() == ROWS - 1
    assert other.made["recaption"].key != made.made["recaption"].key
    assert other.blobs("recaption") == made.blobs("recaption")  # so nothing is embedded again
    bench(tmp_path, path, {"prompt": "What?"}).make("recaption")
    assert vision.asked.total() == 2 * (ROWS - 1)


def test_stages_behind_read_made_captions(tmp_path: Path, vision: Vision) -> None:
    made = bench(tmp_path, write(tmp_path), {"share": 0.75}, clip={"weights": save_clip(tmp_path / "clip")})
    made.make("recaption", "clip", "embeddings", "curation")
    context = made.context("decoder")
    assert context.inputs["captions"] == made.made["recaption"]
    assert context.input_keys["recaption"] == made.made["recaption"].key
    assert "captions" not in context.input_keys
    texts = captions(made)
    assert NONE not in [int(row["key"][-4:]) for row in made.rows("curation") if not texts[row["key"]]]
    for columns in (("tokens", "text_embedding"), ("text_embedding",)):
        rows = Tables(made.store, context.inputs, columns, "train", 0).first(100)
        assert {row.key: row.captions for row in rows} == {row.key: texts[row.key] for row in rows}
        assert {row.first_share for row in rows} == {0.75}
        assert all(row.versions == len(texts[row.key]) for row in rows)
    embedded = [read_table(made.store, s.blobs["embeddings"]) for s in read_shards(made.store, made.made["embeddings"])]
    lengths = {
        key: n
        for table in embedded
        for key, n in zip(*table.select(["key", "caption_length"]).to_pydict().values(), strict=True)
    }
    assert lengths == {key: len(texts[key][0]) for key in lengths}


@pytest.mark.parametrize(("share", "versions"), [(0.95, 2), (0.5, 4), (1.0, 3), (0.25, 2)])
def test_draws_are_mixed_by_the_share(share: float, versions: int) -> None:
    row = JoinedRow("k", None, ["c"] * versions, None, None, None, share)
    draws = 20_000
    counts = [0] * versions
    for i in range(draws):
        counts[row.pick(derive_seed(7, "caption", i))] += 1
    shares = [share, *[(1 - share) / (versions - 1)] * (versions - 1)]
    for count, expected in zip(counts, shares, strict=True):
        assert abs(count / draws - expected) <= 5 * (expected * (1 - expected) / draws) ** 0.5
    assert row.pick(0) == 0  # captions: first
    alike = row._replace(first_share=None)
    assert [alike.pick(i) for i in range(versions)] == list(range(versions))  # as before there were made ones


def test_no_secret_is_stored_or_shown(tmp_path: Path, vision: Vision, caplog: pytest.LogCaptureFixture) -> None:
    made = bench(tmp_path, write(tmp_path))
    made.make("recaption")
    assert {headers["authorization"] for headers in vision.headers} == {f"Bearer {KEY}"}
    files = [file for file in (tmp_path / "store").rglob("*") if file.is_file()]
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
    assert KEY not in caplog.text
    assert KEY not in json.dumps(made.made["recaption"].metrics)


def test_the_report_shows_both_captions(tmp_path: Path, vision: Vision) -> None:
    made = bench(tmp_path, write(tmp_path))
    artifact = made.make("recaption")
    assert RECAPTION.show is not None
    shown = RECAPTION.show(made.store, artifact)
    assert shown["made captions"] == ROWS - 1
    examples = {name: data for name, data in shown.items() if isinstance(data, bytes)}
    assert len(examples) == stage_module.EXAMPLES
    sent = {caption_of(image, RecaptionRecipe().prompt, "eye") for image in vision.asked}
    assert {name.partition("; made: ")[2] for name in examples} <= sent
    assert any(name.startswith("the list: picture 0; made: picture ") for name in examples)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "eye", "max_characters": 2000}, "recaption.max_characters: 2,000 is above curation.max_caption 1,0"),
        ({"model": "eye", "parameters": {"stream": True}}, "parameters: stream is set by this stage"),
        ({"model": "eye", "prompt": " "}, "prompt: is empty"),
        ({"model": "eye", "coverage": 0}, "recaption.coverage"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config({"project": "p", "store": "s", "source": {"paths": ["a"]}, "recaption": values})
    assert message in str(caught.value)


def test_the_plan_says_what_is_sent_and_what_it_costs(tmp_path: Path, vision: Vision) -> None:
    prices = {"prompt_price": 2.0, "answer_price": 8.0}
    made = bench(tmp_path, write(tmp_path), {"coverage": 0.5}, settings={"budget": 100, **prices})
    stage = made.graph["recaption"]
    assert RECAPTION.warn is not None
    [line] = RECAPTION.warn(stage, SimpleNamespace(rows=1_000_000))
    tokens = 500_000 * (len(RecaptionRecipe().prompt) / 4 + (64 / 28) ** 2)
    cost = (2 * tokens + 8 * 500_000 * 70) / 1e6
    assert line == (
        f"recaption sends up to 500,000 images to eye: roughly {tokens / 1e6:.1f} million tokens in and 35.0 million "
        f"out, some {cost:.2f} USD; this run asks for 100 at most"
    )
