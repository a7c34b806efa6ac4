import hashlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from models.clip import Clip
from models.tokens import cut_tokens, tokenize
from pipeline.data.embeddings.parts import read_embeddings
from pipeline.data.neighbours.search import embed_caption, embed_image, look_up, read_clip
from pipeline.data.pairs.row_index import SPLITS, read_images
from pipeline.errors import UserError
from pipeline.graph.artifacts import read_shards
from tests.pipeline.data.bench import Bench, picture, save_clip, write_listed

ROWS = 14


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Pictures of which the fourth is too wide for curation; stored without loss, so that a file is the stored one."""
    folder = tmp_path_factory.mktemp("look_up")
    images = [picture(i, 400 if i == 3 else 80) for i in range(ROWS)]
    splits = ["validation" if i == 5 else "test" if i == 11 else "train" for i in range(ROWS)]
    path = write_listed(folder, images, splits, caption="picture\n{}")
    png = {"encode_format": "png", "encode_quality": 1}
    bench = Bench(folder / "store", [path], clip={"weights": save_clip(folder / "clip")}, pairs=png)
    bench.make("source", "captions", "pairs", "clip", "embeddings", "curation", "index")
    return bench


def stored(bench: Bench) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Image and text embeddings of every row, by key."""
    found: dict[str, Any] = {}
    for shard in read_shards(bench.store, bench.made["embeddings"]):
        keys, image, text, _ = read_embeddings(bench.store, shard.blobs["embeddings"])
        found |= {key: (image[i], text[i]) for i, key in enumerate(keys)}
    return found


def test_a_caption_is_read_by_the_tokenizer_of_its_clip(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SigLIP has one of its own, and may read other lengths."""
    clip = read_clip(bench.store, bench.made["clip"])

    def backwards(captions: list[str]) -> torch.Tensor:
        return cut_tokens(tokenize([caption[::-1] for caption in captions]), clip.model.context_length)

    own = Clip(clip.model, clip.model_config, cast(Any, backwards))
    monkeypatch.setattr("pipeline.data.neighbours.search.read_clip", lambda *_: own)
    found = embed_caption(bench.store, bench.made["clip"], "a cat")
    np.testing.assert_allclose(found, clip.encode_text(clip.tokenize(["tac a"])).detach().numpy(), atol=1e-6)


def test_a_query_is_embedded_as_the_rows_were(bench: Bench) -> None:
    image, text = stored(bench)["000000000002"]
    clip = bench.made["clip"]
    np.testing.assert_allclose(embed_caption(bench.store, clip, "picture 2")[0], text, atol=2e-3)
    file = Path(bench.config.source.paths[0]).with_name("2.png")
    np.testing.assert_allclose(embed_image(bench.store, clip, str(file))[0], image, atol=2e-3)


def test_the_nearest_rows_come_with_what_is_known_of_them(bench: Bench) -> None:
    query = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    cosine = {key: float(image.astype(np.float64) @ query[0]) for key, (image, _) in stored(bench).items()}
    rows = {row["key"]: row for row in bench.rows("curation")}
    expected = sorted(rows, key=lambda key: -cosine[key])
    assert len(expected) == ROWS - 1
    found = look_up(bench.store, bench.made, query, 6, SPLITS)
    assert [row.key for row in found] == expected[:6]
    for row in found:
        assert row.similarity == pytest.approx(cosine[row.key], abs=1e-4)
        assert (row.url, row.split) == (rows[row.key]["url"], rows[row.key]["split"])
        assert (row.license, row.attribution) == (rows[row.key]["license"], rows[row.key]["attribution"])
        assert row.place is not None
        [data] = read_images(bench.store, [row.place])
        assert hashlib.sha256(data).hexdigest() == rows[row.key]["sha256"]
        assert row.caption.split() == ["picture", row.url.rpartition("/")[2][:-4]]
    held_out = look_up(bench.store, bench.made, query, 6, ("validation", "test"))
    assert {row.split for row in held_out} == {"validation", "test"}
    assert len(held_out) == 2


@pytest.mark.parametrize(
    ("caption", "says"), [("  \n", "the caption is empty"), ("word " * 100, "has 100 tokens and CLIP reads 75")]
)
def test_captions_that_cannot_be_looked_for(bench: Bench, caption: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        embed_caption(bench.store, bench.made["clip"], caption)


def test_a_file_that_is_no_picture(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no picture")
    for name, why in (("a.txt", "used"), ("absent.png", "read")):
        with pytest.raises(UserError, match=f"{name}: cannot be {why}"):
            embed_image(bench.store, bench.made["clip"], str(tmp_path / name))
