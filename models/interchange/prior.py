"""The diffusion prior as diffusers' PriorTransformer.

Our own prior embeds captions itself, which no class of diffusers does: its table of tokens, or its copy of CLIP's text
tower, stays in ``ours/prior``, and ``prior_inputs`` makes what the network takes. Karlo's prior is a ``ClipPrior``.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip_prior import ClipPrior, ClipPriorConfig
from models.diffusion_prior import DiffusionPrior
from models.interchange.decoder import read_part
from models.interchange.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Weights,
    check_config,
    derive,
    load,
    read_json,
    read_ours,
    write_ours,
    write_part,
)
from models.interchange.names import Table, pair, put_under, to_theirs, under
from models.interchange.schedules import Process, check_process, read_scheduler, write_scheduler
from models.interchange.text import read_text, read_text_config, text_config, write_text
from models.prior_configs import DiffusionPriorConfig, TextTower

BARE = {"positional_embedding": "position", "prd_embedding": "query", "clip_mean": "mean", "clip_std": "std"}


def prior_table(depth: int) -> Table:
    """Yields names of all tensors but the bare ones."""
    yield pair("timestep.0", "time_embedding.linear_1")
    yield pair("timestep.2", "time_embedding.linear_2")
    yield pair("noised_in", "proj_in")
    yield pair("embedding_in", "embedding_proj")
    yield pair("states_in", "encoder_hidden_states_proj")
    yield pair("transformer.norm", "norm_out")
    yield pair("out", "proj_to_clip_embeddings")
    for layer in range(depth):
        ours, theirs = f"transformer.blocks.{layer}", f"transformer_blocks.{layer}"
        yield pair(f"{ours}.norm_attention", f"{theirs}.norm1")
        yield pair(f"{ours}.qkv", *(f"{theirs}.attn1.to_{part}" for part in "qkv"))
        yield pair(f"{ours}.attention_out", f"{theirs}.attn1.to_out.0")
        yield pair(f"{ours}.norm_mlp", f"{theirs}.norm3")
        yield pair(f"{ours}.mlp_in", f"{theirs}.ff.net.0.proj")
        yield pair(f"{ours}.mlp_out", f"{theirs}.ff.net.2")


def part_of(config: DiffusionPriorConfig, embed_dim: int) -> dict[str, Any]:
    """Returns config.json of the network in diffusers."""
    clip = isinstance(config, ClipPriorConfig)
    return {
        "_class_name": "PriorTransformer",
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.depth,
        "embedding_dim": embed_dim,
        "num_embeddings": config.text_context,
        "additional_embeddings": 4,
        "time_embed_act_fn": "silu",
        "norm_in_type": None,
        "embedding_proj_norm_type": None,
        "encoder_hid_proj_type": "linear" if clip else None,
        "added_emb_type": "prd",
        "time_embed_dim": None,
        # Two more inputs, "there is text" and "there is none", choose between a bias and the null embedding.
        "embedding_proj_dim": None if clip else embed_dim + 2,
        "clip_embed_dim": None,
    }


def prior_inputs(
    prior: DiffusionPrior, tokens: Tensor, text_embedding: Tensor, keep_text: Tensor
) -> dict[str, Tensor | None]:
    """Returns what the exported PriorTransformer takes besides x and t, by its own names; arguments as in ``forward``.

    The mask is never left out, though all ones for our own prior: without one PriorTransformer is not causal.
    """
    if isinstance(prior, ClipPrior):
        text = prior.text(tokens, keep_text)
        return {
            "proj_embedding": text.pooled,
            "encoder_hidden_states": text.states,
            "attention_mask": text.shown,
        }
    keep = keep_text[:, None].to(text_embedding.dtype)
    return {
        "proj_embedding": torch.cat([text_embedding * prior.embed_dim**0.5 * keep, keep, 1 - keep], dim=1),
        "encoder_hidden_states": prior.caption(tokens, keep_text),
        "attention_mask": torch.ones(len(tokens), prior.config.text_context, device=tokens.device),
    }


def export_prior(prior: DiffusionPrior, folder: str | Path) -> None:
    """Writes prior, prior_scheduler, ours/prior and, for a ``ClipPrior``, text_encoder.

    ``post_process_latents`` makes embeddings of length sqrt(d) of our own prior's samples, as an exported decoder's
    text_proj takes them. The regression that a prior with ``ridge`` adds to its network's output is in ours/. Raises
    ValueError if another model's text encoder is in the folder.
    """
    folder, config, d = Path(folder), prior.config, prior.embed_dim
    weights = dict(prior.state_dict())
    if isinstance(prior, ClipPrior):
        assert isinstance(config, ClipPriorConfig)
        text = TextTower(
            d, config.text_depth, config.text_heads, config.text_context, config.vocabulary, quick_gelu=True
        )
        write_text(folder / "text_encoder", text_config(text, d), under("text.", weights))
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("text.")}
    else:
        weights |= own_to_bare(prior, weights)
        del weights["null_embedding"]
    theirs = to_theirs(weights, prior_table(config.depth))
    shapes = {"position": (1, -1, config.width), "query": (1, 1, -1), "mean": (1, -1), "std": (1, -1)}
    theirs |= {name: weights.pop(ours).view(shapes[ours]) for name, ours in BARE.items()}
    write_part(folder / "prior", part_of(config, d), theirs)
    write_scheduler(folder / "prior_scheduler", Process(config.schedule, config.steps, "x0"), "fixed_small_log", None)
    write_ours(folder, "prior", config, {"embed_dim": d, "text_tower": prior.text_tower}, weights)


def own_to_bare(prior: DiffusionPrior, weights: Weights) -> Weights:
    """Returns our own prior's tensors where Karlo's differ: null embedding and positions, and no standardisation."""
    # A linear layer of [x, 1, 0] for a shown text and [0, 0, 1] for a hidden one: its last two columns are our bias and
    # null embedding.
    columns = [
        weights["embedding_in.weight"],
        weights["embedding_in.bias"][:, None],
        weights["null_embedding"][:, None],
    ]
    positions = F.pad(weights["position"], (0, 0, prior.config.text_context, 0))  # the caption brings its own
    return {
        "embedding_in.weight": torch.cat(columns, dim=1),
        "embedding_in.bias": torch.zeros_like(weights["embedding_in.bias"]),
        "position": positions,
        "mean": torch.zeros(prior.embed_dim),
        "std": torch.full((prior.embed_dim,), 1 / prior.config.scale),
    }


def bare_to_own(weights: Weights) -> Weights:
    """Returns the inverse of ``own_to_bare``."""
    columns, bias = weights["embedding_in.weight"], weights["embedding_in.bias"]
    kept = {name: tensor for name, tensor in weights.items() if name not in ("mean", "std")}
    return kept | {
        "embedding_in.weight": columns[:, :-2].contiguous(),
        "embedding_in.bias": columns[:, -2] + bias,
        "null_embedding": columns[:, -1] + bias,
        "position": weights["position"][-4:].contiguous(),
    }


def import_prior(folder: str | Path) -> DiffusionPrior:
    """Reads a prior in diffusers' layout: an exported one, or Karlo's as a ``ClipPrior``; fp32, in evaluation mode.

    Raises FileNotFoundError when a file is missing, and ValueError when something does not fit.
    """
    folder = Path(folder)
    path = folder / "prior" / CONFIG_FILE
    found, process = read_json(path), read_scheduler(folder / "prior_scheduler")
    ours = read_ours(folder, "prior", DiffusionPriorConfig, ClipPriorConfig)
    if ours is not None:
        config, embed_dim, weights = ours.config, derive(folder, lambda: ours.sizes["embed_dim"]), ours.weights
        tower = ours.sizes.get("text_tower")
    else:
        text = read_text_config(folder / "text_encoder")
        config = derive(folder, lambda: config_of(found, text, process))
        embed_dim, weights, tower = text["hidden_size"], {}, None
    check_process(folder / "prior_scheduler", process, Process(config.schedule, config.steps, "x0"))
    check_config(path, found, part_of(config, embed_dim), {"dropout"})
    part = read_part(folder / "prior", prior_table(config.depth), BARE)
    missing = set(BARE.values()) - part.keys()
    if missing:
        raise ValueError(f"{folder / 'prior' / WEIGHTS_FILE} does not fit: {sorted(missing)} are missing")
    part |= {name: part[name].flatten(0, -2).squeeze(0) for name in BARE.values()}
    if isinstance(config, ClipPriorConfig):
        part |= put_under("text.", read_text(folder / "text_encoder", config.text_depth))
        return load(lambda: ClipPrior(config, embed_dim), weights | part, folder)
    return load(lambda: DiffusionPrior(config, embed_dim, tower), weights | bare_to_own(part), folder)


def config_of(found: dict[str, Any], text: dict[str, Any], process: Process) -> ClipPriorConfig:
    """Returns our configuration of the prior that these config.json describe."""
    return ClipPriorConfig(
        text_context=text["max_position_embeddings"],
        width=found["num_attention_heads"] * found["attention_head_dim"],
        depth=found["num_layers"],
        heads=found["num_attention_heads"],
        vocabulary=text["vocab_size"],
        schedule=process.schedule,
        steps=process.steps,
        text_depth=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
    )
