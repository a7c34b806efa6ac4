"""The decoder as diffusers' UNet2DConditionModel, UnCLIPTextProjModel and transformers' text encoder.

A decoder with GLIDE's text encoder exports its U-Net alone: the rest has no class in diffusers and stays in
``ours/decoder``. ``Decoder.condition`` then makes what the U-Net takes: ``encoder_hidden_states`` is its ``context``,
``class_labels`` its ``added`` and ``attention_mask`` its ``shown``.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from models.decoder import CLIP_CONTEXT, Decoder
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.interchange.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Weights,
    check_config,
    derive,
    load,
    read_json,
    read_ours,
    read_weights,
    write_ours,
    write_part,
)
from models.interchange.names import Table, pair, put_under, to_ours, to_theirs, under
from models.interchange.schedules import Process, check_process, read_scheduler, write_scheduler
from models.interchange.text import read_text, read_text_config, text_config, write_text
from models.interchange.unet import Shape, attention_levels, idle_fields, multipliers_of, unet_config, unet_table
from models.prior_configs import TextTower

PROJECTIONS: Table = [
    pair("text_to_time", "embedding_proj"),
    pair("image_to_time", "clip_image_embeddings_project_to_time_embeddings"),
    pair("image_to_tokens", "clip_extra_context_tokens_proj"),
    pair("text_to_context.0", "encoder_hidden_states_proj"),
    pair("text_to_context.1", "text_encoder_hidden_states_norm"),
]
NULL_IMAGE = "learned_classifier_free_guidance_embeddings"


class PartConfigs(NamedTuple):
    """Holds the config.json of U-Net, projections and text encoder; the last two are None with GLIDE's encoder."""

    unet: dict[str, Any]
    text_proj: dict[str, Any] | None
    text_encoder: dict[str, Any] | None


def shape_of(config: DecoderConfig) -> Shape:
    """Returns the U-Net of such a decoder."""
    sides = config.feature_sides()
    return Shape(
        in_channels=3 * config.patch**2,
        out_channels=6 * config.patch**2,
        channels=config.channels,
        depth=config.depth,
        multipliers=config.multipliers,
        attention_levels=frozenset(sides.index(side) for side in config.attention_resolutions),
        head_channels=config.head_channels,
        context_width=config.context_width or config.text_width,
    )


def process_of(config: DecoderConfig | UpsamplerConfig) -> Process:
    """Returns the diffusion process of such a model."""
    return Process(config.schedule, config.steps, config.prediction)


def text_of(config: DecoderConfig, tower: TextTower | None) -> TextTower:
    """Returns the sizes of the text encoder of such a decoder, ``tower`` where it is a frozen one."""
    context = min(CLIP_CONTEXT, config.text_context)
    if tower is not None:
        return replace(tower, context=min(context, tower.context))
    sizes = (config.text_width, config.text_depth, config.text_heads)
    return TextTower(*sizes, context, config.vocabulary, quick_gelu=True)


def parts_of(config: DecoderConfig, embed_dim: int, tower: TextTower | None = None) -> PartConfigs:
    """Returns the configurations of such a decoder's parts. Raises ValueError if the classes cannot hold it."""
    unet = unet_config(shape_of(config), config.image_size // config.patch, config.dropout)
    if config.text_encoder == "glide":
        return PartConfigs(unet, None, None)
    text = text_of(config, tower)
    if text.width != embed_dim:
        raise ValueError(
            f"text_width is {text.width} and CLIP's embeddings have {embed_dim} dimensions: UnCLIPTextProjModel "
            "takes one number for both, so this decoder cannot be exported"
        )
    text_proj = {
        "_class_name": "UnCLIPTextProjModel",
        "clip_extra_context_tokens": config.clip_tokens,
        "clip_embeddings_dim": embed_dim,
        "time_embed_dim": 4 * config.channels,
        "cross_attention_dim": config.context_width or config.text_width,
    }
    return PartConfigs(unet, text_proj, text_config(text, embed_dim))


def swap_tokens(projection: Tensor, rows: int) -> Tensor:
    """Returns the projection to the image's tokens with its outputs in the other order.

    Ours come token by token, theirs channel by channel: ``rows`` is the number of tokens (ours to theirs) or of
    channels (theirs to ours).
    """
    return projection.unflatten(0, (rows, -1)).transpose(0, 1).flatten(0, 1)


def export_decoder(decoder: Decoder, folder: str | Path) -> None:
    """Writes decoder, decoder_scheduler, ours/decoder and, with CLIP's text encoder, text_proj and text_encoder.

    Where the decoder works on patches, its U-Net takes and gives ``pixel_unshuffle(x, patch)``. A layout is its
    ``mid_block_additional_residual``, beside zeros for the down blocks, and a correction of pixels comes after it:
    both are in ours/. ``text_proj`` takes image embeddings of length ``decoder.scale``, not 1, or
    whitened ones. Raises ValueError, before anything is written, on a decoder that diffusers' classes cannot hold.
    """
    folder, config = Path(folder), decoder.config
    parts = parts_of(config, decoder.embed_dim, decoder.text_tower)
    rest = dict(decoder.state_dict())
    unet = under("unet.", rest)
    rest = {name: tensor for name, tensor in rest.items() if not name.startswith("unet.")}
    if parts.text_proj is not None and parts.text_encoder is not None:
        write_text(folder / "text_encoder", parts.text_encoder, under("text.", rest))
        projections = {name: tensor for name, tensor in rest.items() if not name.startswith("text.")}
        for name in ("image_to_tokens.weight", "image_to_tokens.bias"):
            projections[name] = swap_tokens(projections[name], config.clip_tokens)
        theirs = {NULL_IMAGE: projections.pop("null_image")} | to_theirs(projections, PROJECTIONS)
        write_part(folder / "text_proj", parts.text_proj, theirs)
        rest = projections
    write_part(folder / "decoder", parts.unet, to_theirs(unet, unet_table(shape_of(config))))
    write_scheduler(folder / "decoder_scheduler", process_of(config), "learned_range", clip=1.0)
    sizes = {"embed_dim": decoder.embed_dim, "text_tower": decoder.text_tower}
    write_ours(folder, "decoder", config, sizes, rest)


def import_decoder(folder: str | Path, embedding_norm: float | None = None) -> Decoder:
    """Reads a decoder in diffusers' layout, Karlo's or an exported one; fp32, in evaluation mode.

    Karlo's takes image embeddings as CLIP makes them, ours come with unit norm: they get the length
    ``embedding_norm``. Without it, that is the root mean square length that the prior in the same folder reports; an
    exported decoder knows its own. Raises FileNotFoundError when a file is missing, and ValueError when something does
    not fit.
    """
    folder = Path(folder)
    found = read_json(folder / "decoder" / CONFIG_FILE)
    process = read_scheduler(folder / "decoder_scheduler")
    ours = read_ours(folder, "decoder", DecoderConfig)
    if ours is not None:
        config, embed_dim, weights = ours.config, derive(folder, lambda: ours.sizes["embed_dim"]), ours.weights
        tower = ours.sizes.get("text_tower")
    else:
        text_proj = read_json(folder / "text_proj" / CONFIG_FILE)
        text = read_text_config(folder / "text_encoder")
        norm = prior_norm(folder) if embedding_norm is None else embedding_norm
        config = derive(folder, lambda: config_of(found, text_proj, text, process, norm))
        embed_dim, weights, tower = derive(folder, lambda: int(text_proj["clip_embeddings_dim"])), {}, None
    shape, parts = shape_of(config), parts_of(config, embed_dim, tower)
    check_process(folder / "decoder_scheduler", process, process_of(config))
    check_config(folder / "decoder" / CONFIG_FILE, found, parts.unet, idle_fields(shape))
    weights = weights | put_under("unet.", read_part(folder / "decoder", unet_table(shape)))
    if parts.text_proj is not None:
        path = folder / "text_proj"
        check_config(path / CONFIG_FILE, read_json(path / CONFIG_FILE), parts.text_proj, set())
        weights |= put_under("text.", read_text(folder / "text_encoder", text_of(config, tower).depth))
        weights |= read_part(path, PROJECTIONS, {NULL_IMAGE: "null_image"})
        for name in {"image_to_tokens.weight", "image_to_tokens.bias"} & weights.keys():
            if len(weights[name]) == config.clip_tokens * shape.context_width:  # else ``load`` reports the misfit
                weights[name] = swap_tokens(weights[name], shape.context_width)
    return load(lambda: Decoder(config, embed_dim, tower), weights, folder)


def config_of(
    unet: dict[str, Any], text_proj: dict[str, Any], text: dict[str, Any], process: Process, embedding_norm: float
) -> DecoderConfig:
    """Returns our configuration of the decoder that these config.json describe."""
    patch = math.isqrt(unet["in_channels"] // 3)
    widths = unet["block_out_channels"]
    return DecoderConfig(
        image_size=unet["sample_size"] * patch,
        channels=widths[0],
        depth=unet["layers_per_block"],
        multipliers=multipliers_of(widths),
        head_channels=unet["attention_head_dim"],
        attention_resolutions=tuple(unet["sample_size"] // 2**level for level in attention_levels(unet)),
        dropout=unet.get("dropout", 0.0),
        text_context=text["max_position_embeddings"],
        text_width=text["hidden_size"],
        text_depth=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
        vocabulary=text["vocab_size"],
        clip_tokens=text_proj["clip_extra_context_tokens"],
        null_image="learned",
        patch=patch,
        schedule=process.schedule,
        steps=process.steps,
        prediction=process.prediction,
        text_encoder="clip",
        context_width=text_proj["cross_attention_dim"],
        embedding_norm=embedding_norm,
    )


def read_part(folder: Path, table: Table, bare: dict[str, str] | None = None) -> Weights:
    """Returns the tensors of a part, named as ours; ``bare`` names single tensors.

    Raises ValueError on unknown ones.
    """
    theirs = read_weights(folder / WEIGHTS_FILE)
    ours = {name: theirs.pop(other) for other, name in (bare or {}).items() if other in theirs}
    ours |= to_ours(theirs, table)
    if theirs:
        raise ValueError(f"{folder / WEIGHTS_FILE} does not fit: {sorted(theirs)[:3]} are unknown")
    return ours


def prior_norm(folder: Path) -> float:
    """Returns the root mean square length of image embeddings.

    It follows from the mean and deviation that the folder's prior keeps.
    """
    path = folder / "prior" / WEIGHTS_FILE
    weights = read_weights(path) if path.is_file() else {}
    if not {"clip_mean", "clip_std"} <= weights.keys():
        raise ValueError(
            f"{folder} lacks the norm of its CLIP's image embeddings (clip_mean and clip_std of a prior): pass "
            "embedding_norm, their root mean square norm"
        )
    # E |z|^2 = |mean|^2 + sum of variances.
    return sum(weights[name].double().square().sum().item() for name in ("clip_mean", "clip_std")) ** 0.5
