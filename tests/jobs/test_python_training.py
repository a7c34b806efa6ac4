"""What ``unclip.train`` makes of tensors and datasets of a program's own."""

import io
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import unclip
from models.clip import Clip
from models.codec_fit import fit_codec
from models.folder import load_model, save_model
from models.view import view
from pipeline.config import preset_config
from pipeline.data.curation.reading import Pair
from tests.faults import Undisturbed, copy
from tests.jobs.mistakes import refuses


def test_a_model_trained_on_tensors_is_that_of_the_pipeline(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Rows of one shard in one order, so the same order of rows, the same noise, and the same weights."""
    copy(undisturbed.data, tmp_path)
    few = ("source.shard_rows=1000", "diffusion_prior.samples=128", "run.diffusion_prior.threads=1")
    project = unclip.open(undisturbed.config(tmp_path), *few)
    project.run(until="diffusion_prior")
    artifact = project.artifact("diffusion_prior")
    data = project.pairs("train", embeddings=True).tensors()
    tower = project.artifact("clip").model()
    trained = unclip.train("diffusion_prior", data, "nano", "cpu", tower, samples=128, batch=32, captions="first")
    artifact.save(tmp_path / "prior")
    expected = load_model(tmp_path / "prior")
    for name, value in trained.model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-6)
    assert [line["loss"] for line in trained.journal] == pytest.approx(
        [line["loss"] for line in artifact.table().to_pylist() if line.get("loss") is not None], rel=1e-4
    )


@cache
def clip() -> Clip:
    """A CLIP of the preset nano, of fewer dimensions."""
    return Clip.build(replace(preset_config("nano").clip.model, embed_dim=16), 0)


def train(*arguments: Any, **options: Any) -> Any:
    return unclip.train(*arguments, clip=clip(), **options)


@pytest.mark.parametrize("stage", ["clip", "ar_prior", "upsampler_256"])
def test_every_kind_of_model_is_trained_on_tensors(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The decoder is trained by examples/another_decoder.py, the diffusion prior above."""
    rows = 24
    image, text = torch.randn(2, rows, 16, generator=torch.Generator().manual_seed(0)).unbind()
    image, text = (torch.nn.functional.normalize(each, dim=1) for each in (image, text))
    side = {"clip": 64, "upsampler_256": 256}.get(stage, 8)
    data = {
        "image": torch.randint(256, (rows, 3, side, side), dtype=torch.uint8),
        "captions": [f"picture {i}" for i in range(rows)],
        "image_embedding": image,
        "text_embedding": text,
    }
    codec = fit_codec(image, (image * text).sum(1), components=8).codec
    model, journal = train(stage, data, device="cpu", codec=codec, samples=16, batch=8, progress=False)
    assert [line["samples"] for line in journal] == [8, 16]
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not model.training
    assert capsys.readouterr().err == ""


def test_a_decoder_that_whitens_measures_the_rows_that_it_is_given() -> None:
    image = torch.nn.functional.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    pixels = torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
    data = {"image": pixels, "captions": ["a picture"] * 8, "image_embedding": image}
    model, _ = train("decoder", data, device="cpu", samples=8, batch=8, progress=False, model={"whiten": True})
    torch.testing.assert_close(model.whitening.mean, image.mean(0))


class Drawn(torch.utils.data.Dataset[tuple[Image.Image, list[str]]]):
    """Images of one colour with its captions, as torchvision's CocoCaptions gives them."""

    def __init__(self, rows: int):
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, place: int) -> tuple[Image.Image, list[str]]:
        if not 0 <= place < self.rows:
            raise IndexError(place)
        return Image.new("RGB", (80, 70), (place * 7 % 256, place, 0)), [f"colour {place}", "unread"]


SHORT: dict[str, Any] = {"device": "cpu", "progress": False, "batch": 8}


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_a_dataset_trains_as_its_columns_do() -> None:
    """Of torch, of Hugging Face and a list: the same rows, so the same weights."""
    rows, side = Drawn(24), preset_config("nano").clip.model.image_size
    each = [rows[place] for place in range(24)]
    pixels = torch.stack([torch.tensor(view(image, side)).permute(2, 0, 1) for image, _ in each])
    columns = {"image": pixels, "captions": [captions[0] for _, captions in each]}
    expected = train("clip", columns, samples=24, **SHORT).model
    theirs = datasets.Dataset.from_list([{"image": image, "text": captions[0]} for image, captions in each])
    arrays = [{"image": np.asarray(image), "caption": captions} for image, captions in each]
    for data in (rows, theirs.cast_column("image", datasets.Image()), arrays):
        assert same(train("clip", data, samples=24, **SHORT).model, expected)


@pytest.mark.parametrize("stage", ["decoder", "diffusion_prior", "ar_prior"])
def test_embeddings_that_a_dataset_lacks_are_made_with_the_given_clip(stage: str) -> None:
    """As the stage of embeddings makes them, so that the same columns make the same weights; CLIP stays as it was."""
    rows, tower = Drawn(24), clip()
    each, side, modes = [rows[place] for place in range(24)], tower.image_size, [m.training for m in tower.modules()]
    pixels = torch.stack([torch.tensor(view(image, side)).permute(2, 0, 1) for image, _ in each])
    captions = [captions[0] for _, captions in each]
    seen = deepcopy(tower).eval()
    with torch.no_grad():
        image, text = seen.encode_image(pixels), seen.encode_text(seen.tokenize(captions))
    codec = fit_codec(image, (image * text).sum(1), components=4).codec
    columns = {"captions": captions, "image_embedding": image.half(), "text_embedding": text.half()}
    if stage == "decoder":
        columns["image"] = pixels  # CLIP of nano reads 64 px, as the decoder does
    expected = train(stage, columns, samples=24, codec=codec, **SHORT)
    made = train(stage, rows, samples=24, codec=codec, validation=rows, **SHORT)
    for name, value in made.model.state_dict().items():
        torch.testing.assert_close(value, expected.model.state_dict()[name], rtol=1e-3, atol=1e-4)
    assert made.journal[0]["validation_rows"] == 24
    assert [m.training for m in tower.modules()] == modes


def test_pairs_are_a_dataset_to_train_on() -> None:
    """A Pair is read by its names; its image is decoded where a model reads images."""
    png = io.BytesIO()
    Image.new("RGB", (70, 64), "red").save(png, "PNG")
    vector = np.full(16, 0.25, np.float16)
    facts = ("000000000000", "file:///a.png", 70, 64, "train", None, None)
    pairs = [Pair(*facts, ["red", "crimson"], png.getvalue(), False, vector, vector)] * 8
    assert train("clip", pairs, samples=8, **SHORT).journal[0]["samples"] == 8
    assert train("diffusion_prior", pairs, samples=8, **SHORT).journal[0]["samples"] == 8


def test_a_training_is_validated_watched_ended_and_resumed(tmp_path: Path) -> None:
    """Ended after any step and called again, it makes the model of a training that was not ended."""
    rows = Drawn(24)
    whole = train("clip", rows, validation=Drawn(10), samples=64, **SHORT)
    seen = [line["samples"] for line in whole.journal if "validation_loss" in line]
    assert seen == [0, 64]
    assert {line["validation_rows"] for line in whole.journal if "validation_loss" in line} == {10}

    told: list[int] = []

    def end(so_far: Any) -> bool:
        told.append(so_far.journal[-1]["samples"])
        return told[-1] in (16, 40)

    options = {"validation": Drawn(10), "checkpoint": tmp_path / "deep" / "clip.safetensors", "callback": end}
    for reached in (16, 40):
        assert train("clip", rows, samples=64, **SHORT, **options).journal[-1]["samples"] == reached
    model, journal = train("clip", rows, samples=64, **SHORT, **options)
    assert same(model, whole.model)
    assert journal == whole.journal
    assert told == [0, 8, 16, 24, 32, 40, 48, 56, 64]
    assert train("clip", rows, samples=64, **SHORT, **options).journal == whole.journal
    with pytest.raises(unclip.UserError, match="belongs to another recipe"):
        train("clip", rows, samples=72, **SHORT, **options)
    (tmp_path / "deep" / "clip.safetensors").write_bytes(b"no")
    with pytest.raises(unclip.UserError, match=r"is not one of clip .* delete it"):
        train("clip", rows, samples=64, **SHORT, **options)


def test_weights_to_begin_with_are_taken(tmp_path: Path) -> None:
    image, text = torch.nn.functional.normalize(
        torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)), dim=2
    )
    data = {"captions": ["a picture"] * 8, "image_embedding": image, "text_embedding": text}
    few: dict[str, Any] = {"device": "cpu", "samples": 8, "batch": 8, "progress": False, "warmup_steps": 0}
    first, _ = train("diffusion_prior", data, **few)
    save_model(tmp_path, first)
    still = {"learning_rate": 1e-30, "weight_decay": 0.0, "seed": 5, "init_from": str(tmp_path / "model.safetensors")}
    again, _ = train("diffusion_prior", data, **few, **still)
    for name, value in first.state_dict().items():
        if name != "gamma":  # which is measured
            torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=1e-20)
    with pytest.raises(unclip.UserError, match=r"init_from: .* does not fit"):
        train("diffusion_prior", data, **few, **still, model={"width": 32})


EMBEDDINGS = {"image_embedding": torch.zeros(2, 16), "text_embedding": torch.zeros(2, 16)}
PAIRS: dict[str, Any] = {"captions": ["a", "b"], **EMBEDDINGS}


def test_mistakes_in_training_are_one_line() -> None:
    pixels = torch.zeros(2, 3, 256, 256)
    calls: dict[Callable[[], object], str] = {
        lambda: unclip.train("clip", {}, weights="open_clip:ViT-B-32:laion2b_s34b_b79k"): "leave weights out",
        lambda: unclip.train("clip", {}, init_from="0" * 64): "name a file",
        lambda: unclip.train("decodr", {}): "unknown model decodr",
        lambda: unclip.train("decoder", {}, sample=3): "did you mean samples",
        lambda: unclip.train("diffusion_prior", {}, preset="tiny"): "pass clip=",
        lambda: unclip.train("upsampler_256", {"image": pixels[..., :9, :9]}): r"reads \[3, 256, 256\]",
        lambda: unclip.train("upsampler_256", {"image": pixels}): "give uint8",
        lambda: unclip.train("clip", {"image": pixels[..., :64, :64].byte(), "captions": ["a"]}): "numbers of rows",
        lambda: train("ar_prior", PAIRS): "pass codec=",
        lambda: unclip.train("diffusion_prior", PAIRS | {"captions": "ab"}): "give a list of strings",
        lambda: unclip.train("diffusion_prior", PAIRS | {"captions": [None]}): "row 0 has no caption: give a",
        lambda: train("diffusion_prior", {"captions": ["a"], "image_embedding": ["b"]}): "image_embedding: not numeric",
        lambda: train("diffusion_prior", PAIRS | {"text_embedding": torch.zeros(2, 12)}): "differ in dimension",
        lambda: train("diffusion_prior", PAIRS | {"text_embedding": torch.zeros(2)}): r"has rows of shape \[\]",
        lambda: train("diffusion_prior", {"tokens": torch.zeros(2, 77), **EMBEDDINGS}): "give whole numbers",
        lambda: train("diffusion_prior", {"captions": ["a"]}): "no image_embedding: give an image and a caption",
        lambda: unclip.train("diffusion_prior", [(Image.new("RGB", (9, 9)), "a")]): "pass clip=, which makes them of",
        lambda: train("decoder", {"captions": ["a"], "image": torch.zeros(1, 3, 8, 8)}): r"CLIP reads \[3, 64, 64\]",
        lambda: train("decoder", {"captions": [], "image": torch.zeros(0, 3, 64, 64)}): "data has no rows",
        lambda: train("clip", [{"image": Image.new("RGB", (9, 9)), "caption": None}]): "row 0 of the data has no capt",
        lambda: train("clip", [{"image": None, "caption": "a"}]): "row 0 of the data has no image; it has caption",
        lambda: train("diffusion_prior", PAIRS, lr=1, epochs=2): "lr is called learning_rate; epochs is called samples",
        lambda: train("clip", [{"caption": "a"}]): "data has no image",
        lambda: train("clip", [3, 4]): "row 0 of the data is a int",
        lambda: train("clip", []): "no rows",
        lambda: train("clip", iter([])): "without len",
        lambda: train("clip", DataLoader([1])): "pass its .dataset",
        lambda: train("clip", [(pixels[0], "a")]): r"row 0 of the data: image is float32 .* give PIL's",
        lambda: train("diffusion_prior", PAIRS, validation=PAIRS): "validation has 2 rows",
    }
    refuses(calls)
