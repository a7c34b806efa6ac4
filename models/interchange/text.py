"""Our CLIP text encoder as transformers' CLIPTextModelWithProjection."""

from pathlib import Path
from typing import Any

import torch

from models.interchange.files import CONFIG_FILE, Weights, check_config, read_json, read_weights, write_part
from models.interchange.names import Table, pair, to_ours, to_theirs
from models.prior_configs import TextTower

WEIGHTS_FILE = "model.safetensors"
# transformers writes no field that has its default.
DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
}


def text_config(tower: TextTower, embed_dim: int) -> dict[str, Any]:
    """Returns config.json of the encoder in transformers."""
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": tower.vocabulary,
        "hidden_size": tower.width,
        "intermediate_size": 4 * tower.width,
        "projection_dim": embed_dim,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "max_position_embeddings": tower.context,
        "hidden_act": "quick_gelu" if tower.quick_gelu else "gelu",
        "layer_norm_eps": 1e-05,
        "attention_dropout": 0.0,
        "bos_token_id": tower.vocabulary - 2,
        "eos_token_id": tower.vocabulary - 1,
        "pad_token_id": 0,
    }


def read_text_config(folder: Path) -> dict[str, Any]:
    """Returns config.json of the encoder in ``folder``. Raises as ``read_json``, and ValueError if it is not CLIP's."""
    found = DEFAULTS | read_json(folder / CONFIG_FILE)
    expected = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-05, "intermediate_size": 4 * found["hidden_size"]}
    check_config(folder / CONFIG_FILE, found, expected, found.keys() - expected.keys())
    return found


def text_table(depth: int) -> Table:
    """Yields names of the tensors, but for the positions, which are a bare tensor here."""
    yield pair("token", "text_model.embeddings.token_embedding")
    yield pair("transformer.norm", "text_model.final_layer_norm")
    yield pair("projection", "text_projection")
    for layer in range(depth):
        ours, theirs = f"transformer.blocks.{layer}", f"text_model.encoder.layers.{layer}"
        yield pair(f"{ours}.norm_attention", f"{theirs}.layer_norm1")
        yield pair(f"{ours}.qkv", *(f"{theirs}.self_attn.{part}_proj" for part in "qkv"))
        yield pair(f"{ours}.attention_out", f"{theirs}.self_attn.out_proj")
        yield pair(f"{ours}.norm_mlp", f"{theirs}.layer_norm2")
        yield pair(f"{ours}.mlp_in", f"{theirs}.mlp.fc1")
        yield pair(f"{ours}.mlp_out", f"{theirs}.mlp.fc2")


POSITION = "text_model.embeddings.position_embedding.weight"


def write_text(folder: Path, config: dict[str, Any], weights: Weights) -> None:
    """Writes the encoder with the tensors ``weights``, which are emptied.

    Raises ValueError if another encoder is there already: prior and decoder may share one, not replace it.
    """
    theirs = {POSITION: weights.pop("position")} | to_theirs(weights, text_table(config["num_hidden_layers"]))
    if (folder / WEIGHTS_FILE).is_file():
        there = read_weights(folder / WEIGHTS_FILE)
        if there.keys() != theirs.keys() or not all(torch.equal(there[name], theirs[name].cpu()) for name in theirs):
            raise ValueError(f"{folder} holds another text encoder: export this model into a folder of its own")
        return
    write_part(folder, config, theirs, WEIGHTS_FILE)


def read_text(folder: Path, depth: int) -> Weights:
    """Returns the encoder's tensors, named as ours. Raises as ``read_weights``, and ValueError on unknown tensors."""
    theirs = read_weights(folder / WEIGHTS_FILE)
    theirs.pop("text_model.embeddings.position_ids", None)  # a constant that old versions saved
    ours = {"position": theirs.pop(POSITION)} if POSITION in theirs else {}
    ours |= to_ours(theirs, text_table(depth))
    if theirs:
        raise ValueError(f"{folder / WEIGHTS_FILE} does not fit: {sorted(theirs)[:3]} are unknown")
    return ours
