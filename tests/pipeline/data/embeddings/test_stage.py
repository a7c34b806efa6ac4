import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.clip import Clip
from models.view import open_view
from pipeline.config import preset_config
from pipeline.data.embeddings import encoder, stage
from pipeline.data.embeddings import parts as image_parts
from pipeline.data.embeddings.encoder import OpenEncoder, cosine_error
from pipeline.data.embeddings.parts import EMBEDDED_CAPTIONS, read_embeddings
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.errors import CorruptObject, UserError
from pipeline.graph.artifacts import read_shards, read_table
from pipeline.graph.shards import map_shards, run_shards
from pipeline.graph.workers import ShardTask, Streamed
from pipeline.store import Store
from pipeline.store.records import blob_path
from tests.faults import forget
from tests.pipeline.data.bench import Bench, picture, save_clip

ROWS = 25
LONG = "a blue heart and " * 6  # 26 tokens, which are encoded in another batch than short captions
BROKEN, SEVERAL, NONE = 4, 6, 7  # rows with a truncated picture, with three captions, with none


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A list of 25 pictures, and a CLIP."""
    folder = tmp_path_factory.mktemp("listed")
    captions = [[f"picture number {i}"] for i in range(ROWS)]
    captions[SEVERAL] = ["a red heart", LONG, "no heart"]
    captions[NONE] = []
    for i in range(ROWS):
        (folder / f"{i}.png").write_bytes(picture(i, 80 + i, 100)[: -300 if i == BROKEN else None])
    urls = [f"file://{folder}/{i}.png" for i in range(ROWS)]
    table = pa.table({"url": urls, "caption": pa.array(captions, pa.list_(pa.string()))})
    pq.write_table(table, folder / "list.parquet")
    return str(folder / "list.parquet"), save_clip(folder / "clip")


BEFORE = ("source", "captions", "pairs", "clip")


def _bare(folder: Path, listed: tuple[str, str], **embeddings: Any) -> Bench:
    return Bench(folder, [listed[0]], clip={"weights": listed[1]}, run={"embeddings": embeddings})


def _bench(folder: Path, listed: tuple[str, str], **embeddings: Any) -> Bench:
    bench = _bare(folder, listed, **embeddings)
    bench.make(*BEFORE, "embeddings")
    return bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, listed: tuple[str, str]) -> Bench:
    return _bench(tmp_path_factory.mktemp("store"), listed, batch=4)


def _everything(bench: Bench) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Keys, embeddings and similarities of all shards; fp32."""
    parts = [read_embeddings(bench.store, blobs["embeddings"]) for _, blobs in bench.blobs("embeddings")]
    image, text, similarity = (np.concatenate([part[i] for part in parts]).astype(np.float32) for i in (1, 2, 3))
    return [key for part in parts for key in part[0]], image, text, similarity


def _expected(bench: Bench, clip: str) -> tuple[np.ndarray, np.ndarray]:
    """The same by open_clip alone, a row at a time, fp32."""
    model = open_clip.create_model(clip).eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.visual.image_mean, model.visual.image_std))
    images, texts = [], []
    with torch.no_grad():
        for shard in read_shards(bench.store, bench.made["pairs"]):
            own = [row for row in bench.rows("pairs") if row["key"].startswith(f"{shard.number:08d}")]
            kept = [row for row in own if row["status"] == "kept"]
            places = [Place.of(row, shard.blobs["images"]) for row in kept]
            for row, data in zip(kept, read_images(bench.store, places), strict=True):
                pixels = torch.from_numpy(open_view(data, 64).copy()).permute(2, 0, 1)[None] / 255
                images.append(model.encode_image((pixels - mean) / std, normalize=True)[0])
                i = int(row["key"][:8]) * 10 + int(row["key"][8:])
                caption = "a red heart" if i == SEVERAL else "" if i == NONE else f"picture number {i}"
                tokens = open_clip.tokenize([caption], context_length=32)
                texts.append(model.encode_text(tokens, normalize=True)[0])
    return torch.stack(images).numpy(), torch.stack(texts).numpy()


def test_they_are_open_clips(bench: Bench, listed: tuple[str, str]) -> None:
    """Within what float16 keeps (2**-11 of each number) and fp32 rounding; similarities are fp32."""
    keys, image, text, similarity = _everything(bench)
    expected_image, expected_text = _expected(bench, listed[1])
    np.testing.assert_allclose(image, expected_image, rtol=2**-11, atol=2e-6)
    np.testing.assert_allclose(text, expected_text, rtol=2**-11, atol=2e-6)
    np.testing.assert_allclose(similarity, (expected_image * expected_text).sum(1), atol=2e-6)
    assert len(keys) == ROWS - 1


def test_every_caption_is_embedded(bench: Bench, listed: tuple[str, str]) -> None:
    """And none changes a byte of what is stored for other rows, or for the first caption, or fetches an image again.
    Those that are cut are counted: this CLIP reads 32 tokens, start and end included."""
    table = pa.concat_tables(read_table(bench.store, blobs["embeddings"]) for _, blobs in bench.blobs("embeddings"))
    more = dict(zip(table["key"].to_pylist(), table["more_text_embeddings"].to_pylist(), strict=True))
    others = more.pop(f"{0:08d}{SEVERAL:04d}")
    assert not any(more.values())
    model = open_clip.create_model(listed[1]).eval()
    with torch.no_grad():
        tokens = open_clip.tokenize([LONG, "no heart"], context_length=32)
        expected = model.encode_text(tokens, normalize=True).numpy()
    np.testing.assert_allclose(np.array(others, np.float32), expected, rtol=2**-11, atol=2e-6)

    rows = pq.read_table(listed[0]).to_pydict()
    rows["caption"][SEVERAL] = ["a red heart", "cat " * 40, *(f"line {i}" for i in range(2 * EMBEDDED_CAPTIONS))]
    words = (29, 30, 31, 80)  # of the first rows
    rows["caption"][: len(words)] = [[" ".join(["cat"] * count)] for count in words]
    beside = Path(listed[0]).with_name("longer.parquet")
    pq.write_table(pa.table(rows), beside)
    longer = _bench(Path(bench.store.url), (str(beside), listed[1]), batch=4)
    assert longer.made["pairs"] == bench.made["pairs"]
    again = pa.concat_tables(read_table(longer.store, blobs["embeddings"]) for _, blobs in longer.blobs("embeddings"))
    assert again["image_embedding"].equals(table["image_embedding"])
    assert not again["text_embedding"].slice(0, 1).equals(table["text_embedding"].slice(0, 1))
    first = table.drop(["more_text_embeddings"]).slice(len(words))
    assert again.drop(["more_text_embeddings"]).slice(len(words)).equals(first)
    more_again = again["more_text_embeddings"].to_pylist()
    assert len(more_again[SEVERAL - 1]) == EMBEDDED_CAPTIONS - 1  # the broken row before it is absent
    assert more_again[SEVERAL:] == table["more_text_embeddings"].to_pylist()[SEVERAL:]
    assert longer.made["embeddings"].metrics["captions_cut"] == 3  # a second caption among them
    assert bench.made["embeddings"].metrics["captions_cut"] == 0


def test_another_width_of_embeddings_and_another_batch_fit(
    bench: Bench, listed: tuple[str, str], tmp_path: Path
) -> None:
    """The width of OpenAI's and LAION's ViT-L; a batch changes no more than rounding."""
    dim = 768
    config = replace(preset_config("nano").clip.model, embed_dim=dim, width=dim, layers=(1,))
    Clip.build(config, seed=1).save(tmp_path / "clip")
    wide = _bare(Path(bench.store.url), (listed[0], f"local-dir:{tmp_path}/clip"), batch=64)
    wide.made |= {name: bench.made[name] for name in BEFORE[:-1]}
    wide.make("clip", "embeddings")
    _, image, text, _ = _everything(wide)
    expected_image, expected_text = _expected(wide, f"local-dir:{tmp_path}/clip")
    assert image.shape == text.shape == (ROWS - 1, dim)
    np.testing.assert_allclose(image, expected_image, rtol=2**-11, atol=2e-6)
    np.testing.assert_allclose(text, expected_text, rtol=2**-11, atol=2e-6)


def test_rows_without_a_picture_are_absent_and_the_order_is_the_lists(bench: Bench) -> None:
    keys, *_ = _everything(bench)
    assert keys == [f"{i // 10:08d}{i % 10:04d}" for i in range(ROWS) if i != BROKEN]
    assert bench.made["embeddings"].ledger.kept == ROWS - 1
    assert bench.made["embeddings"].ledger.rows == bench.made["pairs"].ledger.kept


def test_neither_workers_nor_parts_nor_the_order_of_shards_change_a_byte(
    bench: Bench, listed: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process and by a stream; a damaged image is named."""
    import ray

    monkeypatch.setattr(stage, "PART_BYTES", 1)  # so a part is one batch, and a shard has three
    monkeypatch.setattr(stage, "TASK_BYTES", 3 * 64**2 * 8)  # two batches
    monkeypatch.setattr(
        stage, "map_shards", lambda ctx, tasks, *rest, **more: map_shards(ctx, tasks[::-1], *rest, **more)
    )
    try:
        for workers in (1, 0):
            folder = tmp_path / f"{workers}"
            shutil.copytree(bench.store.url, folder)
            again = _bare(folder, listed, batch=4, workers=workers, decoders=workers)
            forget(again.store, "embeddings")
            again.made |= {name: bench.made[name] for name in BEFORE}
            again.make("embeddings")
            assert again.blobs("embeddings") == bench.blobs("embeddings")
    finally:
        ray.shutdown()
    last = read_shards(again.store, again.made["pairs"])[-1].blobs["images"]
    again.store.delete([blob_path(last), *(entry.path for entry in again.store.list("shards/embeddings/"))])
    with pytest.raises(CorruptObject) as caught:
        again.make("embeddings")
    assert caught.value.path == blob_path(last)


class Watched:
    """A store in which processes that read pictures or captions, or publish embeddings, leave the number of their node.

    The first of each kind that is not the first call of it kills its process, once.
    """

    def __init__(self, store: Store, notes: Path, captions: set[str]):
        self.store, self.notes, self.captions = store, notes, captions

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:  # without __getattr__ before there is a store
        return Watched, (self.store, self.notes, self.captions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        if path in self.captions:
            self._note("captions")
        return self.store.read(path, start, stop)

    def read_parts(self, path: str, parts: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        self._note("decode")
        return self.store.read_parts(path, parts)

    def create(self, path: str, data: bytes | Path, move: bool = False) -> bool:
        if path.startswith("shards/embeddings/"):
            self._note("publish")
        return self.store.create(path, data, move)

    def _note(self, what: str) -> None:
        import ray

        with open(self.notes / what, "a+") as f:
            f.seek(0)
            again = bool(f.read())
            f.write(f"{ray.get_runtime_context().get_node_id()} {os.getpid()}\n")
        if again:
            try:
                (self.notes / f"{what}.killed").touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow  # of workers on one node: tests/jobs/test_crashes.py
def test_decoding_and_encoding_on_nodes_of_their_own_survive_a_kill_of_each(
    bench: Bench, listed: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three raylets. Pictures are read on one node, shards are published on another, captions are read on both, the
    driver is on the third, and the bytes are those of this process."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = {"nodes": {"part": "encode"}, "decoder_nodes": {"part": "decode"}}
    parts = _bare(tmp_path / "store", listed, batch=4, workers=1, decoders=2, **nodes)
    parts.make(*BEFORE)
    captions = {blob_path(blob) for _, blobs in parts.blobs("captions") for blob in blobs.values()}
    watched: Any = Watched(parts.store, tmp_path, captions)
    parts.store = watched
    node = {"object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(**node, num_cpus=2, labels={"part": "decode"})
        cluster.add_node(**node, num_cpus=1, labels={"part": "encode"})
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        parts.make("embeddings")
        where = {n["Labels"].get("part"): n["NodeID"] for n in ray.nodes()}
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert parts.made["embeddings"].key == bench.made["embeddings"].key
    assert parts.blobs("embeddings") == bench.blobs("embeddings")
    for what, on in (("decode", ["decode"]), ("captions", ["decode", "encode"]), ("publish", ["encode"])):
        notes = [line.split() for line in (tmp_path / what).read_text().splitlines()]
        assert {place for place, _ in notes} == {where[part] for part in on}
        assert (tmp_path / f"{what}.killed").exists()
        assert len({pid for _, pid in notes}) > 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"decoders": 2},
            r"^run\.embeddings\.decoders: 2 decoders for each Ray worker, but workers is 0; raise workers$",
        ),
        ({"decoder_nodes": {"a": "b"}}, r"^run\.embeddings\.decoder_nodes: needs decoders, which is auto; raise it$"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    bench: Bench, listed: tuple[str, str], settings: dict[str, Any], said: str
) -> None:
    refused = _bare(Path(bench.store.url), listed, **settings)
    refused.made |= bench.made
    with pytest.raises(UserError, match=said):
        refused.make("embeddings")


def test_the_record_says_how_near_bf16_is_to_fp32(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would do, on the CPU: embeddings by autocast, and the largest error among the first images."""
    monkeypatch.setattr(encoder, "CHECKED", 15)
    opened = OpenEncoder(bench.store, bench.made["clip"].blobs, 4, gpus=0, bf16=True)

    def open_bf16() -> encoder.Encoder:
        opening = opened()
        assert not opening.bf16  # on a CPU
        opening.bf16 = True
        return opening

    cut = image_parts.parts_for(bench.store, opened.clip, 4, {}, stage.PART_BYTES)
    ctx = replace(bench.context("embeddings"), key="bf16", version=1000)
    tasks = [
        ShardTask(pairs.number, f"bf16-{pairs.key}", {"pairs": pairs, "captions": captions})
        for pairs, captions in zip(
            *(read_shards(bench.store, bench.made[n]) for n in ("pairs", "captions")), strict=True
        )
    ]
    made, _ = run_shards(ctx, tasks, Streamed(cut.count, cut.prepare, open_bf16, cut.join), "rows", ROWS)
    _, exact, *_ = _everything(bench)
    near = np.concatenate([read_embeddings(bench.store, shard.blobs["embeddings"])[1] for shard in made]).astype(float)
    np.testing.assert_allclose(np.linalg.norm(near, axis=1), 1, atol=1e-3)
    errors = 1 - (near * exact).sum(1) / np.linalg.norm(near, axis=1) / np.linalg.norm(exact, axis=1)
    assert 1e-6 < errors.max() < 1e-3
    checked = 19  # rows of the first two shards, of which one has nine
    assert [shard.counts for shard in made] == [{"bf16": 9}, {"bf16": 10}, {"bf16": 5}]
    [(name, error)] = cosine_error(ctx, opened, cut, made).items()
    assert (name, error) == ("cosine_error", pytest.approx(errors[:checked].max(), rel=0.1))
    assert "cosine_error" not in bench.made["embeddings"].metrics


def test_few_large_images_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_parts, "READ_BYTES", 100)
    places = [Place(str(i), None, "a.tar", 0, size, "") for i, size in enumerate([60, 40, 1, 500, 99, 1])]
    pieces = [[place.size for place in piece] for piece in image_parts._together(places)]
    assert pieces == [[60, 40], [1], [500], [99, 1]]


def test_shards_without_a_kept_row_are_empty(bench: Bench, tmp_path: Path, listed: tuple[str, str]) -> None:
    table = pa.table({"url": ["file:///nowhere/a.png", "file:///nowhere/b.png"], "caption": ["a", "b"]})
    pq.write_table(table, tmp_path / "lost.parquet")
    paths = [listed[0], str(tmp_path / "lost.parquet")]
    grown = Bench(Path(bench.store.url), paths, clip={"weights": listed[1]})
    grown.make(*BEFORE, "embeddings", "curation", "codec")
    last = read_shards(grown.store, grown.made["embeddings"])[-1]
    assert last.kept == 0
    keys, image, _, _ = read_embeddings(grown.store, last.blobs["embeddings"])
    assert keys == []
    assert len(image) == 0
