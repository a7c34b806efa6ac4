import dataclasses
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from models.clip import Clip, augment, clip_loss
from models.draw import Draw
from models.prior_configs import ClipConfig
from models.tokens import cut_tokens, text_ends, tokenize
from models.view import view
from tests.models.mutations import fails_under

VIT = ClipConfig(
    embed_dim=24, image_size=32, layers=(1,), width=32, patch=16, text_width=16, text_layers=1, text_heads=2,
    text_context=12,
)  # fmt: skip
RESNET = ClipConfig(
    embed_dim=24, image_size=32, tower="resnet", layers=(1, 1, 1, 1), width=4, text_width=16, text_layers=1,
    text_heads=2,
)  # fmt: skip


def views(rows: int = 4, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (rows, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
@fails_under(
    (Clip.encode_image, "images / 255", "images / 256"),
    (Clip.encode_pixels, "- self.mean", "+ self.mean"),
    (Clip.encode_pixels, "/ self.std", "* self.std"),
    (cut_tokens, "cut[:, :-1]", "cut[:, 1:]"),
)
def test_embeddings_equal_open_clips_and_have_norm_one(config: ClipConfig) -> None:
    clip = Clip.build(config, seed=0).eval()
    preprocess = open_clip.image_transform(32, is_train=False)
    image = views()
    theirs = torch.stack([preprocess(Image.fromarray(view.permute(1, 2, 0).numpy())) for view in image])
    expected = clip.model.encode_image(theirs, normalize=True)
    ours = clip.encode_image(image)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.norm(dim=-1), torch.ones(4), rtol=0, atol=1e-6)
    tokens = tokenize(["a cat", "word " * 100])
    short = open_clip.tokenize(["a cat", "word " * 100], context_length=config.text_context)
    text = clip.encode_text(tokens)
    torch.testing.assert_close(text, clip.model.encode_text(short, normalize=True), rtol=0, atol=1e-6)
    assert (clip.embed_dim, clip.image_size, clip.context_length) == (24, 32, config.text_context)


@fails_under(
    (text_ends, "+ 1", "+ 0"),
    (Clip._encode_shorter, "model.positional_embedding[:length]", "model.positional_embedding[-length:]"),
)
def test_the_end_of_a_caption_does_not_see_what_comes_after_it() -> None:
    clip = Clip.build(dataclasses.replace(VIT, text_context=77), seed=0).eval()
    assert clip.text_lengths == (16, 32, 77)
    assert Clip.build(dataclasses.replace(VIT, text_context=32), seed=0).text_lengths == (16, 32)
    tokens = tokenize(["", "a cat", "cat " * 14, "cat " * 15, "cat " * 30, "cat " * 31])
    ends = text_ends(tokens)
    assert ends.tolist() == [2, 4, 16, 17, 32, 33]
    whole = clip.encode_text(tokens)
    for length in (16, 32):
        fit = ends <= length
        torch.testing.assert_close(clip.encode_text(tokens[fit, :length]), whole[fit], rtol=0, atol=1e-6)


def test_a_tower_that_sees_all_of_a_caption_gets_all_of_it() -> None:
    clip = Clip.build(VIT, seed=0)
    clip.model.attn_mask = None
    assert clip.text_lengths == (VIT.text_context,)


def test_a_row_is_embedded_alike_in_any_batch() -> None:
    clip = Clip.build(RESNET, seed=0).eval()
    alone = torch.cat([clip.encode_image(row[None]) for row in views()])
    torch.testing.assert_close(clip.encode_image(views()), alone, rtol=0, atol=1e-5)


def test_views_of_another_size_or_type_are_refused() -> None:
    clip = Clip.build(VIT, seed=0)
    with pytest.raises(ValueError, match=r"got torch.uint8 \(3, 64, 64\)"):
        clip.encode_image(views(size=64))
    with pytest.raises(ValueError, match=r"got torch.float32"):
        clip.encode_image(views() / 255)


def test_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (Clip.build(VIT, seed).encode_image(views()) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    untouched = torch.rand(1)
    torch.manual_seed(0)
    Clip.build(VIT, seed=9)
    assert torch.equal(torch.rand(1), untouched)


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_saved_folder_is_open_clips_local_dir(config: ClipConfig, tmp_path: Path) -> None:
    clip = Clip.build(config, seed=0).eval()
    clip.save(tmp_path)
    image, tokens = views(), tokenize(["a cat"] * 4)
    again = Clip.from_folder(tmp_path)
    assert not again.training
    assert torch.equal(again.encode_image(image), clip.encode_image(image))
    assert torch.equal(again.encode_text(tokens), clip.encode_text(tokens))
    peer = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    assert torch.equal(peer.visual.state_dict()["conv1.weight"], clip.model.visual.state_dict()["conv1.weight"])
    again.save(tmp_path / "copy")
    assert (tmp_path / "copy/open_clip_config.json").read_bytes() == (tmp_path / "open_clip_config.json").read_bytes()


def test_a_folder_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no open_clip_config.json"):
        Clip.from_folder(tmp_path)
    Clip.build(VIT, seed=0).save(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no open_clip_model.safetensors"):
        Clip.from_folder(tmp_path)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    Clip.build(VIT, seed=0).save(tmp_path)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="holds no CLIP that open_clip can load"):
        Clip.from_folder(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="KeyError"):
        Clip.from_folder(tmp_path)


def test_a_text_tower_that_a_folder_cannot_hold_is_refused(tmp_path: Path) -> None:
    Clip.build(VIT, seed=0).save(tmp_path)
    path = tmp_path / "open_clip_config.json"
    saved = json.loads(path.read_text())
    for change, said in (
        ({"hf_model_name": "roberta-base"}, "roberta-base needs the hub"),
        ({"tokenizer_kwargs": {"clean": "canonicalize"}}, "does not read CLIP's own BPE"),
        ({"vocab_size": 32000}, "does not read CLIP's own BPE"),
        ({"context_length": 248}, "does not read CLIP's own BPE"),
    ):
        text = saved["model_cfg"]["text_cfg"] | change
        path.write_text(json.dumps({**saved, "model_cfg": saved["model_cfg"] | {"text_cfg": text}}))
        with pytest.raises(ValueError, match=said):
            Clip.from_folder(tmp_path)
    with pytest.raises(ValueError, match="needs the hub"):
        Clip.pretrained("roberta-ViT-B-32", "laion2b_s12b_b32k")


# --- a tokenizer of its own -------------------------------------------------------------------------------------------

SIGLIP = {  # as ViT-B-16-SigLIP, but tiny
    "embed_dim": 20,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "avg",
        "timm_proj": "linear",
    },
    "text_cfg": {
        "context_length": 8, "vocab_size": 50_000, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
        "tokenizer_kwargs": {"clean": "canonicalize"}, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True,
        "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    },
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class AutoTokenizer:
    """What open_clip asks of transformers' class of that name: a token a letter, from a file in the model's folder."""

    def __init__(self, letters: str):
        self.letters = letters

    @classmethod
    def from_pretrained(
        cls, name: Path, cache_dir: str | None = None, trust_remote_code: bool | None = None
    ) -> "AutoTokenizer":
        assert trust_remote_code is False, "transformers would ask, or do as the folder says"
        return cls((name / "tokenizer.json").read_text())

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(self.letters)

    def __call__(
        self, texts: list[str], return_tensors: str, max_length: int, padding: str, truncation: bool
    ) -> SimpleNamespace:
        assert (return_tensors, padding, truncation) == ("pt", "max_length", True)
        rows = [[self.letters.find(letter) + 2 for letter in text][:max_length] for text in texts]
        return SimpleNamespace(input_ids=torch.tensor([row + [1] * (max_length - len(row)) for row in rows]))


@pytest.fixture
def siglip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as open_clip's hub has one for a SigLIP, with random weights."""
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoTokenizer=AutoTokenizer))
    folder = tmp_path / "siglip"
    folder.mkdir()
    preprocess = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    document = {"model_cfg": SIGLIP, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    (folder / "tokenizer.json").write_text(LETTERS)
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@fails_under(
    (Clip.encode_pixels, "- self.mean", "- 0.45"),
    (Clip.encode_text, "self.own_tokenizer is None", "True"),
    (Clip.tokenize, "self.own_tokenizer(shortened(captions))", "self.own_tokenizer(shortened(captions[::-1]))"),
)
def test_a_siglip_reads_its_own_tokens_and_squashes_as_we_crop(siglip: Path, tmp_path: Path) -> None:
    """Against open_clip's transform and tokenizer; again after it was saved elsewhere, as the clip stage does."""
    clip = Clip.from_folder(siglip)
    clip.save(tmp_path / "saved")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{siglip}")
    captions = ["A cat!", "a  much longer caption", ""]
    images = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in views(size=48)]
    squashed = torch.stack([preprocess(picture) for picture in images])
    ours = torch.from_numpy(np.stack([view(picture, 32) for picture in images]))
    tokens = open_clip.get_tokenizer(f"local-dir:{siglip}", trust_remote_code=False)(captions)
    assert tokens[0].tolist() == [2, -1 + 2, 4, 2, 21, 1, 1, 1]
    model.eval()
    for one in (clip, Clip.from_folder(tmp_path / "saved")):
        torch.testing.assert_close(
            one.encode_image(ours.permute(0, 3, 1, 2)), model.encode_image(squashed, normalize=True), rtol=0, atol=1e-6
        )
        text = one.encode_text(one.tokenize(captions))
        torch.testing.assert_close(text, model.encode_text(tokens, normalize=True), rtol=0, atol=1e-6)
        assert (one.embed_dim, one.image_size, one.context_length) == (20, 32, 8)


def test_an_own_tokenizer_that_is_not_there_is_one_line(siglip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (siglip / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded"):
        Clip.from_folder(siglip)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'unclip-ray\[siglip\]'"):
        Clip.from_folder(siglip)


EVIL = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path(__file__).with_name("ran").touch()
class Evil(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}


def bring_code(folder: Path, said_in: str) -> None:
    """Puts code into a CLIP folder and has one of its files ask for it."""
    (folder / "evil.py").write_text(EVIL)
    if said_in == "tokenizer_kwargs":
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": AUTO_MAP}))
        change_text(folder, tokenizer_kwargs={"trust_remote_code": True})
    else:
        (folder / said_in).write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": AUTO_MAP}))


def change_text(folder: Path, **values: object) -> None:
    """Changes fields of the text tower in a CLIP folder's configuration."""
    change(folder, "text_cfg", values)


def change(folder: Path, tower: str, values: dict[str, object]) -> None:
    path = folder / "open_clip_config.json"
    document = json.loads(path.read_text())
    document["model_cfg"][tower] |= values
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("said_in", ["tokenizer_kwargs", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("tokenizer", [{}, {"hf_tokenizer_name": "x"}], ids=["bpe", "own"])
def test_a_folder_brings_no_code(
    said_in: str, tokenizer: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused in one line before open_clip or transformers, installed or not, is asked."""
    Clip.build(VIT, seed=0).save(tmp_path)
    change_text(tmp_path, **tokenizer)
    bring_code(tmp_path, said_in)
    asked: list[str] = []
    monkeypatch.setattr(open_clip, "create_model", lambda name: asked.append(name))
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name, **_: asked.append(name))
    with pytest.raises(ValueError, match="code") as refused:
        Clip.from_folder(tmp_path)
    assert "\n" not in str(refused.value)
    assert asked == []
    assert not (tmp_path / "ran").exists()


def test_the_gate_lets_no_code_past_transformers_itself(siglip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub's folder of a named model could say: transformers is told not to run it. Needs the siglip extra."""
    monkeypatch.delitem(sys.modules, "transformers")
    pytest.importorskip("transformers")
    bring_code(siglip, "tokenizer_config.json")
    monkeypatch.setattr("models.clip._check_tokenizer_files", lambda folder: None)
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded") as refused:
        Clip.from_folder(siglip)
    assert "trust_remote_code" in str(refused.value)
    assert not (siglip / "ran").exists()


@pytest.mark.parametrize(
    ("tower", "values", "said"),
    [
        ("vision_cfg", {"timm_model_name": "hf-hub:evil/model"}, "its image tower hf-hub:evil/model needs the hub"),
        ("vision_cfg", {"timm_model_name": "hf_hub:evil/model"}, "its image tower hf_hub:evil/model needs the hub"),
        ("vision_cfg", {"timm_model_name": "local-dir:/tmp"}, "its image tower local-dir:/tmp needs the hub"),
        ("vision_cfg", {"timm_model_pretrained": True}, "its image tower test_vit needs the hub"),
        ("text_cfg", {"hf_model_name": "evil/model"}, "its text tower evil/model needs the hub"),
        ("text_cfg", {"tokenizer_kwargs": {"cache_dir": "/etc"}}, "tokenizer_kwargs names cache_dir"),
        ("text_cfg", {"tokenizer_kwargs": {"gguf_file": "x", "clean": "lower"}}, "tokenizer_kwargs names gguf_file"),
        ("text_cfg", {"tokenizer_kwargs": ["clean"]}, "holds no CLIP that open_clip can load"),
        ("text_cfg", {"width": "wide"}, "holds no CLIP that open_clip can load"),
    ],
)
def test_a_folder_sends_open_clip_nowhere_else(
    tower: str, values: dict, said: str, siglip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clip.from_folder(siglip)
    change(siglip, tower, values)
    with pytest.raises(ValueError, match=said) as refused:
        Clip.from_folder(siglip)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_names_no_file_of_the_machine(siglip: Path) -> None:
    path = siglip / "tokenizer_config.json"
    path.write_text(json.dumps({"special_tokens_map_file": "/home/a/special_tokens_map.json", "vocab_file": None}))
    Clip.from_folder(siglip)
    path.write_text(json.dumps({"vocab_file": "/etc/passwd"}))
    with pytest.raises(ValueError, match=r"names a file of this machine \(vocab_file\)"):
        Clip.from_folder(siglip)


@pytest.mark.parametrize("name", ["hf-hub:evil/model", "local-dir:/tmp"])
def test_a_name_is_one_of_open_clips_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_clip.factory._get_hf_config", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=f"open_clip has no model '{name}'"):
        Clip.pretrained(name, "any")


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_named_weights_that_are_a_pickle_run_nothing(suffix: str, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    weights = tmp_path / f"weights{suffix}"
    weights.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="could not be loaded") as refused:
        Clip.pretrained("ViT-B-32", str(weights))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_named_weights(tmp_path: Path) -> None:
    clip = Clip.build(VIT, seed=0).eval()
    (tmp_path / "test-tiny-vit.json").write_text(json.dumps(clip.model_config))
    open_clip.add_model_config(tmp_path / "test-tiny-vit.json")
    weights = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in clip.model.state_dict().items()}}, weights)
    again = Clip.pretrained("test-tiny-vit", str(weights))
    assert torch.equal(again.encode_image(views()), clip.encode_image(views()))
    with pytest.raises(ValueError, match=r"weights 'laion9b' could not be loaded .* tags of test-tiny-vit are none"):
        Clip.pretrained("test-tiny-vit", "laion9b")
    with pytest.raises(ValueError, match="open_clip has no model 'ViT-Z'"):
        Clip.pretrained("ViT-Z", "openai")


@fails_under(
    (clip_loss, "scale * text @ images.T", "scale * image @ texts.T"),
    (clip_loss, "clamp(max=100)", "clamp(max=1)"),
    (clip_loss, "torch.arange(start, start + len(image)", "torch.zeros(len(image), dtype=torch.int64"),
)
def test_loss_equals_open_clips() -> None:
    clip = Clip.build(VIT, seed=0)
    batch = {"image": views(), "tokens": tokenize(["a cat", "a dog", "a fox", "an owl"])}
    draw = Draw([(0, 4)])
    losses = clip_loss(clip, batch, draw)
    image, text = clip.encode_pixels(augment(batch["image"], draw)), clip.encode_text(batch["tokens"])
    expected = open_clip.ClipLoss()(image, text, clip.model.logit_scale.exp())
    torch.testing.assert_close(losses.total.mean(), expected, rtol=0, atol=1e-6)
    assert losses.total.shape == losses.parts["image_to_text"].shape == (4,)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert clip_loss(clip, batch, draw).total.dtype == torch.float32


def test_temperature_stops_at_a_hundredth() -> None:
    clip = Clip.build(VIT, seed=0)
    batch = {"image": views(), "tokens": tokenize(["a cat", "a dog", "a fox", "an owl"])}
    totals = []
    for scale in (100.0, 1e6):
        clip.model.logit_scale.data = torch.tensor(scale).log()
        totals.append(clip_loss(clip, batch, Draw([(0, 4)])).total)
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=1e-3)


def test_augmentation_crops_and_brightens_but_never_flips() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).expand(200, 3, 64, 64)
    pixels = augment(ramp, Draw([(0, 200)]))
    assert pixels.shape == ramp.shape
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert (pixels.diff(dim=-1) >= -1e-6).all()  # rises to the right as before
    torch.testing.assert_close(pixels[:, :, :1].expand_as(pixels), pixels, rtol=0, atol=1e-5)
    flat = augment(torch.full((200, 3, 8, 8), 100, dtype=torch.uint8), Draw([(0, 200)]))[:, 0, 0, 0] * 255
    assert 80 <= flat.min() < 82
    assert 118 < flat.max() <= 120
    share = (pixels[..., -1] - pixels[..., 0])[:, 0, 0] * 255 / 63 / (flat / 100)
    assert 0.73 < share.min() < 0.77  # the same draws: divided by brightness, the ramp's rise is the crop's side
    assert 0.97 < share.max() <= 1.001


def test_it_learns_to_match_eight_pairs() -> None:
    clip = Clip.build(VIT, seed=0)
    colours = torch.tensor([[r, g, b] for r in (0, 220) for g in (0, 220) for b in (0, 220)], dtype=torch.uint8)
    batch = {
        "image": colours[:, :, None, None].expand(-1, -1, 32, 32),
        "tokens": tokenize(["black", "blue", "green", "cyan", "red", "magenta", "yellow", "white"]),
    }
    optimiser = torch.optim.AdamW(clip.parameters(), 3e-3)
    for step in range(60):
        optimiser.zero_grad()
        loss = clip_loss(clip, batch, Draw([(step, 8)])).total.mean()
        loss.backward()
        optimiser.step()
    similarity = clip.encode_image(batch["image"]) @ clip.encode_text(batch["tokens"]).T
    assert similarity.argmax(1).tolist() == list(range(8))
