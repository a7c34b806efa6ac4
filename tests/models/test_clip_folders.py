"""CLIPs in folders and by name: what cannot be used is refused, tokenizers of their own, and no code is run."""

import json
import pickle
import re
import shutil
import socket
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from models.clip import TOKENIZER_FILES, WEIGHTS_FILE, Clip, config_in, tokenizer_in
from models.tensors import shapes_only
from models.view import view
from pipeline.data.embeddings.encoder import OpenEncoder
from pipeline.doctor import clip_weights
from pipeline.errors import UserError
from pipeline.store import open_store
from pipeline.store.records import put_blob
from tests.models.clip_folders import LETTERS, VIT, bring_code, change, change_text, save_siglip, views

ROOT = Path(__file__).parents[2]


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no open_clip_config.json"):
        Clip.from_folder(tmp_path)
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
    for edit, said in (
        ({"hf_model_name": "roberta-base"}, "roberta-base needs the hub"),
        ({"tokenizer_kwargs": {"clean": "canonicalize"}}, "does not read CLIP's own BPE"),
        ({"vocab_size": 32000}, "does not read CLIP's own BPE"),
        ({"context_length": 248}, "does not read CLIP's own BPE"),
    ):
        text = saved["model_cfg"]["text_cfg"] | edit
        path.write_text(json.dumps({**saved, "model_cfg": saved["model_cfg"] | {"text_cfg": text}}))
        with pytest.raises(ValueError, match=said):
            Clip.from_folder(tmp_path)
    with pytest.raises(ValueError, match="needs the hub"):
        Clip.pretrained("roberta-ViT-B-32", "laion2b_s12b_b32k")


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

    def __len__(self) -> int:
        return 50_000 if self.letters == LETTERS else len(self.letters)

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(self.letters)

    def __call__(
        self, texts: list[str], return_tensors: str, max_length: int, padding: str, truncation: bool
    ) -> SimpleNamespace:
        assert (return_tensors, padding, truncation) == ("pt", "max_length", True)
        rows = [[self.letters.find(letter) + 2 for letter in text][:max_length] for text in texts]
        return SimpleNamespace(input_ids=torch.tensor([row + [1] * (max_length - len(row)) for row in rows]))


@pytest.fixture(scope="module")
def saved_siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_siglip(tmp_path_factory.mktemp("saved") / "siglip")
    (folder / "tokenizer.json").write_text(LETTERS)
    return folder


@pytest.fixture
def siglip(saved_siglip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a SigLIP, to be changed at will, with a stand-in for transformers."""
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoTokenizer=AutoTokenizer))
    return Path(shutil.copytree(saved_siglip, tmp_path / "siglip"))


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
    (tmp_path / "saved" / WEIGHTS_FILE).unlink()
    assert torch.equal(tokenizer_in(tmp_path / "saved")(captions), tokens)


def test_an_own_tokenizer_that_is_not_there_is_one_line(siglip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (siglip / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded"):
        Clip.from_folder(siglip)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'sentencepiece>=0.2,<1' 'transformers>=5,<6'"):
        Clip.from_folder(siglip)


class Evil:
    """Touches a file where it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.folder / "ran",))


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
    for opening in (Clip.from_folder, tokenizer_in):
        with pytest.raises(ValueError, match="code") as refused:
            opening(tmp_path)
        assert "\n" not in str(refused.value)
    assert asked == []
    assert not (tmp_path / "ran").exists()


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
def test_a_folder_sends_open_clip_nowhere_else(tower: str, values: dict, said: str, siglip: Path) -> None:
    change(siglip, tower, values)
    with pytest.raises(ValueError, match=said) as refused:
        Clip.from_folder(siglip)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["hf-hub:evil/model", "local-dir:/tmp"])
def test_a_name_is_one_of_open_clips_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_clip.factory._get_hf_config", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=f"open_clip has no model '{name}'"):
        Clip.pretrained(name, "any")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of open_clip's by name."""
    file = tmp_path_factory.mktemp("named") / "test-tiny-vit.json"
    file.write_text(json.dumps(VIT.model_config()))
    open_clip.add_model_config(file)
    return file.stem


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_named_weights_that_are_a_pickle_run_nothing(suffix: str, tiny: str, tmp_path: Path) -> None:
    weights = tmp_path / f"weights{suffix}"
    weights.write_bytes(pickle.dumps(Evil(tmp_path), protocol=2))
    with pytest.raises(ValueError, match="could not be loaded") as refused:
        Clip.pretrained(tiny, str(weights))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_named_weights(tiny: str, tmp_path: Path) -> None:
    clip = Clip.build(VIT, seed=0).eval()
    weights = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in clip.model.state_dict().items()}}, weights)
    again = Clip.pretrained(tiny, str(weights))
    assert torch.equal(again.encode_image(views()), clip.encode_image(views()))
    with pytest.raises(ValueError, match=r"weights 'laion9b' could not be loaded .* tags of test-tiny-vit are none"):
        Clip.pretrained(tiny, "laion9b")
    with pytest.raises(ValueError, match="open_clip has no model 'ViT-Z'"):
        Clip.pretrained("ViT-Z", "openai")


def test_doctor_and_the_workers_of_embeddings_say_what_is_lacking(
    siglip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "store"))
    blobs = {file.name: put_blob(store, file) for file in siglip.iterdir()}
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(clip_weights, "find_spec", lambda name: None)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = " ".join(f"'{requirement}'" for requirement in extras["siglip"])
    lacks = re.escape(f"has its own tokenizer: pip install {asked} on every node")
    with pytest.raises(UserError, match=rf"clip\.weights: local-dir:{siglip} {lacks}"):
        clip_weights.find_weights("clip.weights", f"local-dir:{siglip}")
    with pytest.raises(UserError, match=f"embeddings: the CLIP cannot be opened on {socket.gethostname()}: .*{lacks}"):
        OpenEncoder(store, blobs, 4, 0, False)()


def test_a_tokenizer_without_its_vocabulary_is_refused(siglip: Path) -> None:
    """Transformers makes one of its special tokens then, and every word is unknown to it."""
    (siglip / "tokenizer.json").write_text("abc")
    with pytest.raises(ValueError, match="knows 3 tokens, and its text tower 50,000: its vocabulary"):
        Clip.from_folder(siglip)


@pytest.mark.parametrize(
    "said",
    [{"vocab_file": "PATH"}, {"vocab": "PATH"}, {"sp_model_kwargs": {"model_file": "PATH"}}, {"a": [{"b": "PATH"}]}],
)
def test_a_tokenizer_names_no_file_by_any_field(said: dict, siglip: Path, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("secret")
    said = json.loads(json.dumps(said).replace("PATH", str(tmp_path / "credentials")))
    harmless = {"special_tokens_map_file": "/home/a/special_tokens_map.json", "vocab_file": None}
    (siglip / "tokenizer_config.json").write_text(json.dumps(harmless))
    config_in(siglip)
    for name in TOKENIZER_FILES:
        (siglip / name).write_text(json.dumps({"eos_token": "</s>", "unk_token": "."} | said))
        with pytest.raises(ValueError, match=rf"{name} names a file of this machine \((vocab(_file)?|model_file|b)\)"):
            Clip.from_folder(siglip)
        (siglip / name).unlink()


def test_a_link_in_a_clip_folder_leads_nowhere_but_into_the_cache_of_the_hub(siglip: Path, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("secret")
    for at, target in (
        ("chat_template.jinja", tmp_path / "credentials"),
        ("additional_chat_templates", tmp_path),
        ("gone.json", tmp_path / "gone"),
    ):
        (siglip / at).symlink_to(target)
        with pytest.raises(ValueError, match=f"{at} is a link that leads out of the folder"):
            Clip.from_folder(siglip)
        (siglip / at).unlink()
    cached = tmp_path / "hub" / "snapshots" / "commit"
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    cached.mkdir(parents=True)
    for file in siglip.iterdir():
        (tmp_path / "hub" / "blobs" / f"{file.name}.sha256").write_bytes(file.read_bytes())
        (cached / file.name).symlink_to(f"../../blobs/{file.name}.sha256")
    Clip.from_folder(cached)


def test_a_pickle_beside_the_weights_is_not_read_and_none_in_their_place(tmp_path: Path) -> None:
    Clip.build(VIT, seed=0).save(tmp_path)
    for name in ("open_clip_pytorch_model.bin", "open_clip_model.pth", "pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(tmp_path)))
    Clip.from_folder(tmp_path)
    (tmp_path / "open_clip_model.safetensors").write_bytes(pickle.dumps(Evil(tmp_path)))
    with pytest.raises(ValueError, match="holds no CLIP that open_clip can load"):
        Clip.from_folder(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no open_clip_model.safetensors"):
        Clip.from_folder(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "ViT-B-16-SigLIP", "convnext_base", "ViTamin-S", "coca_ViT-B-32"])
def test_each_kind_of_tower_is_measured_before_it_is_built(name: str) -> None:
    """Networks of open_clip and of timm pass with the sizes of their weights."""
    model_config = open_clip.get_model_config(name)
    model_config["text_cfg"].pop("hf_tokenizer_name", None)
    with torch.device("meta"):
        whole = open_clip.create_model(name, load_weights=False, device="meta")
    sizes = {key: tensor.shape for key, tensor in whole.state_dict().items()}
    numbers = [shape.numel() for shape in sizes.values()]
    with shapes_only(Path("weights"), numbers):
        again = open_clip.create_model(name, load_weights=False, device="meta")
    assert {key: tensor.shape for key, tensor in again.state_dict().items()} == sizes
    with pytest.raises(ValueError, match="describes a larger model"), shapes_only(Path("weights"), numbers):
        torch.nn.Linear(sum(numbers), 65)
