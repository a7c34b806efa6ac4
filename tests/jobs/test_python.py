"""What a program does with ``import unclip``: open a project, read its data, train a model, draw."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

import unclip
from models.sampling_config import OTHER_NAMES, SamplingConfig
from tests.chain import ROOT
from tests.faults import Undisturbed, copy
from tests.jobs.mistakes import refuses
from tests.models.small_models import make
from unclip.options import Options

FEW: dict[str, Any] = {"size": 64, "decoder_steps": 2, "prior_steps": 2, "candidates": 1, "progress": False}
SIDE = 64  # px


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> unclip.Model:
    """A bundle of random weights, from its folder."""
    folder = tmp_path_factory.mktemp("python") / "bundle"
    make().save(folder)
    return unclip.load(folder, device="cpu")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, undisturbed: Undisturbed) -> unclip.Project:
    """A project of thirty rows that is made up to the codec, in a copy of its store."""
    folder = tmp_path_factory.mktemp("project")
    copy(undisturbed.data, folder)
    return unclip.open(undisturbed.config(folder))


def test_opening_a_model_leaves_the_number_of_threads_alone(model: unclip.Model, tmp_path: Path) -> None:
    model.cascade.save(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        unclip.load(tmp_path, device="cpu")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_the_package_is_light_and_says_what_it_has() -> None:
    code = (
        "import sys, unclip; heavy = {'torch', 'ray', 'numpy', 'pyarrow', 'yaml', 'pydantic'} & set(sys.modules);"
        "assert not heavy, heavy; print(unclip.__version__, *dir(unclip))"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    version, *names = said.split()
    assert version == "0.1.0"
    assert {"load", "open", "train", "Model", "Project", "Artifact", "UserError"} <= set(names)
    assert all(getattr(unclip, name) for name in names)
    assert (ROOT / "unclip/py.typed").is_file()
    with pytest.raises(AttributeError, match="unclip"):
        unclip.generate  # noqa: B018


@pytest.mark.parametrize("name", ["models", "jobs"])
def test_a_package_that_hides_ours_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / "program.py").write_text("import unclip\nunclip.train\n")
    command = [sys.executable, str(tmp_path / "program.py")]
    found = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert "hides the one that unclip needs; rename yours" in found.stderr


def test_a_caption_becomes_an_image_and_a_list_becomes_a_list(model: unclip.Model) -> None:
    heart = model.generate("a red heart", **FEW)
    assert (heart.size, heart.mode) == ((SIDE, SIDE), "RGB")
    several = model.generate(["a red heart", "a cat", "a red heart"], seed=[0, 5, 6], batch=2, **FEW)
    assert near(several[0], heart)
    assert not near(several[2], heart)
    assert near(model("a red heart", seed=6, **FEW), several[2])
    assert [near(*pair) for pair in zip(model.generate("a cat", seed=[4, 5], **FEW), several, strict=False)] == [0, 1]
    assert near(model.generate("a cat", seed=np.array([5]), **FEW)[0], several[1])
    second = model.generate(["a cat", "a red heart"], seed=5, **FEW)[1]
    assert near(second, several[2])


def test_names_of_other_programs_mean_the_same(model: unclip.Model) -> None:
    less: dict[str, Any] = {"prior_steps": 2, "candidates": 1, "progress": False}
    theirs = model.generate("a cat", num_images_per_prompt=2, size="64x64", num_inference_steps=3, **less)
    ours = model.generate("a cat", n=2, size=64, steps=3, **less)
    assert [one.recipe for one in theirs] == [one.recipe for one in ours]
    [scaled] = model.generate("a cat", n=1, size=512, guidance_scale=2.0, steps=2, upsampler_1024_steps=2, **less)
    assert scaled.recipe.options["decoder_guidance"] == 1.0
    assert set(SamplingConfig.__dataclass_fields__) < Options.__annotations__.keys()
    assert Options.__annotations__.keys() - set(SamplingConfig.__dataclass_fields__) < OTHER_NAMES.keys()


def near(a: Image.Image, b: Image.Image) -> bool:
    """Equal but for rounding."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) <= 1


def test_images_are_varied_interpolated_changed_and_embedded(model: unclip.Model, tmp_path: Path) -> None:
    heart, cat = model.generate(["a red heart", "a cat"], **FEW)
    heart.save(tmp_path / "heart.png")
    varied = model.vary(tmp_path / "heart.png", n=2, caption="a red heart", **FEW)
    assert len(varied) == 2
    assert not near(*varied)
    [alike] = model.vary(heart, n=1, eta=0.0, **FEW)
    between = model.interpolate(heart, cat, n=3, **FEW)
    changed = model.change(heart, "a red heart", "a blue heart", shares=[0.0, 0.5], **FEW)
    assert len(between) == 3
    assert near(between[0], alike)
    assert near(changed[0], alike)
    assert not near(changed[1], alike)
    images, captions = model.embed([heart, cat]), model.embed(["a red heart", "a cat"])
    assert (images @ captions.T).shape == (2, 2)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(model.embed("a cat"), captions[1], atol=1e-6)
    np.testing.assert_allclose(model.embed(heart), images[0], atol=1e-6)


def test_an_image_is_given_as_pils_as_an_array_as_a_tensor_or_as_a_path(model: unclip.Model, tmp_path: Path) -> None:
    heart = model.generate("a red heart", **FEW)
    heart.save(tmp_path / "heart.png")
    pixels = np.asarray(heart)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    one = model.embed(heart)
    for same in (tmp_path / "heart.png", pixels, tensor, tensor / 255, tensor.permute(1, 2, 0)):
        np.testing.assert_allclose(model.embed(same), one, atol=1e-6)
    several = model.embed([heart, tmp_path / "heart.png", pixels])
    np.testing.assert_allclose(several, [one] * 3, atol=1e-6)
    for stack in (np.stack([pixels] * 2), torch.stack([tensor] * 2)):
        np.testing.assert_allclose(model.embed(stack), [one] * 2, atol=1e-6)
    for given in (str(tmp_path / "heart.png"), tmp_path / "heart.png", pixels, tensor):
        [alike] = model.vary(given, n=1, eta=0.0, **FEW)
        assert near(alike, model.vary(heart, n=1, eta=0.0, **FEW)[0])


def test_what_is_neither_caption_nor_image_is_named_in_a_line(model: unclip.Model, tmp_path: Path) -> None:
    """Above all a str that names an image: its text would be embedded without a word."""
    heart = Image.new("RGB", (32, 32), "red")
    heart.save(tmp_path / "heart", "PNG")
    tensor = torch.full((3, 32, 32), 2.0)
    values: dict[Callable[[], object], str] = {
        lambda: model.embed("heart.png"): r"embed\(Path\('heart.png'\)\) embeds the image",
        lambda: model.embed("my heart.JPG"): "looks like a file",
        lambda: model.embed(["a cat", str(tmp_path / "heart")]): "looks like a file",
        lambda: model.embed(["a cat", heart]): "call embed once for each kind",
        lambda: model.generate("a cat", seed=-1): "a seed is -1: use a whole number, 0 or more",
        lambda: model.generate(["a cat", "a dog"], seed=[1, -2]): "a seed is -2",
        lambda: model.vary(heart, n=1, seed=-1, **FEW): "a seed is -1",
        lambda: model.cascade.generate(["a cat"], [-1]): "a seed is -1",
        lambda: model.generate(
            "a cat", guidence=3
        ): r"unknown sampling options \['guidence'\]: did you mean guidance\?",
        lambda: model.generate("a cat", sise=64): r"unknown sampling options \['sise'\]: did you mean size\?",
        lambda: model.generate("a cat", width=64): "width is not known here: images are square: give size",
        lambda: model.generate("a cat", height=64): "height is not known here: images are square: give size",
        lambda: model.generate("a cat", generator=7): "generator is not known here: give its seed",
        lambda: model.generate("a cat", negative_prompt="a dog"): "negative_prompt is not known here",
        lambda: model.generate(["a cat"], seed=[1, 2]): "1 captions and 2 seeds",
        lambda: model.generate("word " * 100): "shorten it",
        lambda: model.generate("a cat", n=0): "n is 0; use 1 to 1000",
        lambda: model.generate(["a cat", "a dog"], num_images=0): "n is 0; use 1 to 1000",
        lambda: model.vary(heart, n=0): "n is 0; use 1 to 1000",
    }
    refuses(values, ValueError)
    types: dict[Callable[[], object], str] = {
        lambda: model.embed(tensor): r"an image is Tensor float32 \[3, 32, 32\], 2 to 2: give PIL's",
        lambda: model.embed([tensor.int()]): r"an image is Tensor int32 \[3, 32, 32\]: .* in \[0, 1\]",
        lambda: model.vary(tensor.bfloat16()): r"an image is Tensor bfloat16 \[3, 32, 32\], 2 to 2: give PIL's",
        lambda: model.vary(tensor[0].bfloat16()): r"an image is Tensor bfloat16 \[32, 32\], 2 to 2: give PIL's",
        lambda: model.embed(7): "not int 7",
        lambda: model.embed(None): "not None",
        lambda: model.vary(np.zeros((32, 32, 3))): r"an image is ndarray float64 \[32, 32, 3\], 0 to 0: give",
        lambda: model.vary(tensor): "2 to 2: give PIL's",
        lambda: model.vary(None): "an image is None",
        lambda: model.interpolate(heart, 7): "an image is int 7",
        lambda: model.generate(7): "captions are int 7: give a text, or a list of texts",
        lambda: model.generate(None): "captions are None",
        lambda: model.generate(["a cat", 7]): "captions are list of int, str",  # type: ignore[list-item]
        lambda: model.generate("a cat", seed=1.5): r"a seed is 1\.5",
    }
    refuses(types, TypeError)
    (tmp_path / "a.png").write_text("no image")
    refuses({lambda: model.vary(tmp_path / "a.png"): "a.png", lambda: model.to("cuda"): "no GPU"})
    refuses({lambda: unclip.load(tmp_path / "nothing"): "nothing", lambda: unclip.load("me/it"): "hf download me/it "})
    assert model.embed("a cat with a heart.").shape == model.embed(heart).shape


def test_progress_is_shown_left_out_or_passed_on(model: unclip.Model, capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[tuple[str, int, int]] = []
    model.generate("a cat", **FEW | {"progress": lambda *step: steps.append(step)})
    assert steps[:3] == [("diffusion_prior", 1, 2), ("diffusion_prior", 2, 2), ("decoder", 1, 2)]
    assert capsys.readouterr().err == ""
    model.generate(["a cat"] * 3, batch=2, **FEW | {"progress": True})
    assert f"drawing: {2 * len(steps)} of {2 * len(steps)} steps" in capsys.readouterr().err


def test_a_model_is_shown_moved_saved_and_given_another_part(model: unclip.Model, tmp_path: Path) -> None:
    shown = repr(model)
    assert "decoder" in shown
    assert len(shown.splitlines()) < 10
    moved = unclip.Model(model.cascade).to("cpu")
    assert moved.device.type == "cpu"
    assert moved.cascade.codec is not None
    ar = model.replace(diffusion_prior=None, sampling=replace(model.sampling, prior="ar"))
    ar.save(tmp_path / "ar")
    again = unclip.load(tmp_path / "ar", device="cpu")
    assert again.sampling.prior == "ar"
    assert near(again.generate("a cat", **FEW), model.generate("a cat", prior="ar", **FEW))
    wrong: dict[Callable[[], object], str] = {
        lambda: model.replace(decoder=model.cascade.diffusion_prior): "decoder is a DiffusionPrior: give a Decoder",
        lambda: model.replace(upsampler_256=7): "upsampler_256 is a int: give a Upsampler",
        lambda: model.replace(prior=None): r"prior: unknown part; did you mean ar_prior\?",
        lambda: model.replace(
            unet=None
        ): "unet: unknown part; known are ar_prior, clip, codec, decoder, diffusion_prior",
    }
    refuses(wrong, ValueError)


def test_a_project_is_planned_and_run(project: unclip.Project, capsys: pytest.CaptureFixture[str]) -> None:
    plan = project.plan()
    assert {"ar_prior", "decoder", "bundle"} <= set(plan.stale)
    assert {v.state for v in plan.verdicts if v.stage in ("pairs", "curation")} == {"fresh"}
    assert len(plan.verdicts) == len(project.stages)
    assert [line.split()[0] for line in repr(plan).splitlines()[1 : 1 + len(project.stages)]] == project.stages
    assert len(repr(project).splitlines()) == 1
    told: list[object] = []
    result = project.run(until="codec", tell=told.append)
    assert [type(event) for event in told] == [unclip.RunPlan]
    assert (result.plan.stale, str(result)) == ([], "nothing to do")
    assert {*result.artifacts} == result.plan.wanted
    kept = result.artifacts["curation"].table(columns=["key"])
    assert kept == project.artifact("curation").table(columns=["key"])
    assert len(kept) > 20
    assert capsys.readouterr().out == ""
    refuses({lambda: project.artifact("decoder"): "make them with unclip run"})


def test_values_open_as_their_file_does(undisturbed: Undisturbed, tmp_path: Path) -> None:
    path = undisturbed.config(tmp_path)
    values = yaml.safe_load(path.read_text())
    of_file, of_values = (unclip.open(source, "decoder.seed=1").plan() for source in (path, values))
    assert of_file.verdicts == of_values.verdicts
    assert of_file.verdicts != unclip.open(path).plan().verdicts
    assert unclip.open(path, decoder={"seed": 1}).plan().verdicts == of_file.verdicts
    half = unclip.open(path, scale=0.5)
    assert half.plan().verdicts == unclip.open(path, "scale=0.5").plan().verdicts
    assert unclip.open(half.config).plan().verdicts == half.plan().verdicts != of_file.verdicts
    refuses({lambda: unclip.open(values, "decodr.seed=1"): "did you mean decoder"})
    refuses({lambda: unclip.open(values, preset="nanno"): "preset: .nanno. is not one of nano"})


def test_artifacts_are_tables_files_and_models(project: unclip.Project, tmp_path: Path) -> None:
    embeddings = project.artifact("embeddings")
    table = embeddings.table(columns=["key", "image_embedding"])
    assert table.column_names == ["key", "image_embedding"]
    assert table.num_rows == embeddings.record.ledger.kept == sum(len(part) for part in embeddings.tables())
    assert "30 rows" in repr(embeddings)
    assert project.artifact("curation").table("rejected").column_names == ["key", "reason", "near"]
    clip = project.artifact("clip")
    assert "loss" in clip.table().column_names
    assert clip.model().embed_dim == len(table["image_embedding"][0])
    assert project.artifact("codec").model().buckets == 1024
    assert (clip.save(tmp_path) / "open_clip_config.json").read_bytes() == clip.read("open_clip_config.json")
    calls: dict[Callable[[], object], str] = {
        lambda: embeddings.table("images"): "has no table images; it has embeddings",
        lambda: embeddings.model(): "not a model",
        lambda: clip.read("nothing"): "has no file nothing",
        lambda: project.artifact("pairs").table("images"): "not a table",
        lambda: next(clip.tables()): "has no rows",
    }
    refuses(calls)


def keys_of(pairs: list[Any]) -> list[str]:
    return [pair.key for pair in pairs]


def test_pairs_are_read_in_many_ways(project: unclip.Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, as a webdataset, by the workers of a DataLoader, by datasets, and as tensors: the same pairs."""
    pairs = project.pairs("train", embeddings=True)
    found = list(pairs)
    assert len(found) == len(pairs) == project.artifact("curation").record.ledger.kept > 20
    assert found[0].image.size == (found[0].width, found[0].height)
    table = project.artifact("embeddings").table()
    row = table["key"].to_pylist().index(found[3].key)
    assert found[3].image_embedding.tolist() == table["image_embedding"][row].as_py()
    assert list(project.pairs("test")) == []
    assert "data" not in repr(found[0])
    refuses({lambda: project.pairs("tests"): "split 'tests'"})

    samples = list(pairs.webdataset())
    assert [sample["__key__"] for sample in samples] == [pair.key for pair in found]
    assert [sample["txt"].decode() for sample in samples] == [pair.caption for pair in found]
    assert json.loads(samples[0]["json"])["attribution"] == found[0].attribution
    [(image, text), *_] = pairs.webdataset().decode("pil").to_tuple("jpg", "txt")
    assert (image.size, text) == (found[0].image.size, found[0].caption)
    loaded = DataLoader(pairs.webdataset(), batch_size=None, num_workers=2)
    assert sorted(sample["__key__"] for sample in loaded) == sorted(pair.key for pair in found)

    assert [pairs[place].key for place in (0, 3, -1)] == [found[place].key for place in (0, 3, -1)]
    assert [pair.key for pair in pairs[5:1:-2]] == [pair.key for pair in found[5:1:-2]]
    assert pairs[4].data == found[4].data
    assert (pairs[4].image_embedding == found[4].image_embedding).all()
    with pytest.raises(IndexError, match="there are"):
        pairs[len(pairs)]
    keys = [key for batch in DataLoader(pairs, 5, True, num_workers=2, collate_fn=keys_of) for key in batch]
    assert sorted(keys) == sorted(pair.key for pair in found) != keys

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    theirs = pairs.to_hf()
    assert theirs["captions"][:] == [pair.captions for pair in found]
    assert theirs[0]["image"].size == found[0].image.size
    assert theirs[0]["image_embedding"] == found[0].image_embedding.tolist()

    tensors = pairs.tensors(side=32)
    assert tensors["captions"] == [pair.caption for pair in found]
    assert tuple(tensors["image"].shape) == (len(found), 3, 32, 32)
    assert tensors["text_embedding"].dtype == torch.float32
    batches = list(DataLoader(pairs.to_torch(side=32), 5, num_workers=2))
    assert [caption for batch in batches for caption in batch["caption"]] == tensors["captions"]
    for name in ("image", "image_embedding", "text_embedding"):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), tensors[name])
    assert repr(pairs.to_torch(side=32)) == f"{pairs!r} for torch, images of 32 px"
    assert pairs.to_torch(side=0)[1].keys() == {"caption", "image_embedding", "text_embedding"}


def test_pairs_are_a_ray_dataset(project: unclip.Project) -> None:
    pairs = project.pairs()
    rows = {row["key"]: row for row in pairs.ray().take_all()}
    assert rows.keys() == {pair.key for pair in pairs}
    for pair in pairs:
        assert rows[pair.key]["captions"] == pair.captions
        assert rows[pair.key]["data"] == pair.data
