"""A SigLIP's own tokens, read by transformers itself.

The extra is installed beside the environment for these tests alone: in it, every process that imports open_clip would
take half a second more to start.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import open_clip
import pytest
import torch

from models.clip import Clip
from tests.models.clip_folders import LETTERS, bring_code, save_siglip

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581a", -3.0), ("\u2581cat", -5.0), ("\u2581", -2.0)]


@pytest.fixture(scope="module")
def extra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the siglip extra."""
    folder = tmp_path_factory.mktemp("extra")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["siglip"]
    words = ("install", "--quiet", "--constraint", ROOT / "requirements.lock", "--target", folder, *wanted)
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    return folder


@pytest.fixture
def siglip(extra: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a SigLIP with the files of a T5 tokenizer, as the published ones have, of a few pieces."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(extra)])
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = save_siglip(tmp_path / "siglip", 40)
    tokenizer = Tokenizer(models.Unigram([*PIECES, *((letter, -6.0) for letter in LETTERS)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "extra_ids": 0, "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"} | said))
    return folder


def test_captions_are_read_as_the_tokenizer_itself_reads_them(siglip: Path, tmp_path: Path) -> None:
    """Again after the CLIP was saved elsewhere, as the clip stage does."""
    clip = Clip.from_folder(siglip)
    clip.save(tmp_path / "saved")
    captions = ["A cat!", "a  much longer caption", ""]
    cat = [3, 4, 1, 1, 1, 1, 1, 1]  # of the least costly pieces; it ends and is filled up with </s>
    model = open_clip.create_model(f"local-dir:{siglip}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{siglip}", trust_remote_code=False)(captions)
    for one in (clip, Clip.from_folder(tmp_path / "saved")):
        read = one.tokenize(captions)
        assert read.tolist() == tokens.tolist()
        assert read[0].tolist() == cat
        assert read[2].tolist() == [1] * 8
        text = model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(one.encode_text(read), text, rtol=0, atol=1e-6)


def test_a_tokenizer_without_its_vocabulary_is_refused(siglip: Path) -> None:
    (siglip / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"knows \d tokens, and its text tower 40: its vocabulary, such as tokenizer.json"
    ):
        Clip.from_folder(siglip)
    (siglip / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded") as refused:
        Clip.from_folder(siglip)
    assert "\n" not in str(refused.value)


def test_the_gate_lets_no_code_past_transformers_itself(siglip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub's folder of a named model could say: transformers is told not to run it."""
    bring_code(siglip, "tokenizer_config.json")
    monkeypatch.setattr("models.clip._check_tokenizer_files", lambda folder: None)
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded") as refused:
        Clip.from_folder(siglip)
    assert "trust_remote_code" in str(refused.value)
    assert not (siglip / "ran").exists()
