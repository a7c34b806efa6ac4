"""Small CLIPs, and folders of a SigLIP as open_clip and strangers write them."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.prior_configs import ClipConfig

VIT = ClipConfig(
    embed_dim=24, image_size=32, layers=(1,), width=32, patch=16, text_width=16, text_layers=1, text_heads=2,
    text_context=12,
)  # fmt: skip


def views(rows: int = 4, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (rows, 3, size, size), generator=generator, dtype=torch.uint8)


SIGLIP = {  # as ViT-B-16-SigLIP, but tiny
    "embed_dim": 20,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "avg",
        "timm_proj": "linear",
    },
    "text_cfg": {
        "context_length": 8, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
        "tokenizer_kwargs": {"clean": "canonicalize"}, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True,
        "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    },
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_siglip(folder: Path, tokens: int = 50_000) -> Path:
    """Writes a folder as open_clip's hub has one for a SigLIP, with random weights and without a tokenizer's files."""
    folder.mkdir()
    preprocess = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    text = SIGLIP["text_cfg"] | {"vocab_size": tokens}
    document = {"model_cfg": SIGLIP | {"text_cfg": text}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


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
