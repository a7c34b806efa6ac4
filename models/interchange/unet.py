"""Our U-Net as diffusers' UNet2DModel (without attention) or UNet2DConditionModel (with it)."""

from typing import Any, NamedTuple

from models.interchange.names import Table, pair

IDLE = {"sample_size", "dropout", "downsample_padding", "downsample_type", "upsample_type", "num_train_timesteps"}
"""Fields of both classes that change nothing in these networks, or are read elsewhere."""

DOWN = {"Resnet": "ResnetDownsampleBlock2D", "SimpleCrossAttn": "SimpleCrossAttnDownBlock2D"}
UP = {"Resnet": "ResnetUpsampleBlock2D", "SimpleCrossAttn": "SimpleCrossAttnUpBlock2D"}


class Shape(NamedTuple):
    """Holds the arguments of ``models.nn.unet.UNet`` that its tensors depend on."""

    in_channels: int
    out_channels: int
    channels: int
    depth: int
    multipliers: tuple[int, ...]
    attention_levels: frozenset[int] = frozenset()
    head_channels: int = 64
    context_width: int = 0
    scale_shift: bool = True


def multipliers_of(widths: list[int]) -> tuple[int, ...]:
    """Returns channel multipliers of ``block_out_channels``. Raises ValueError unless they are whole numbers."""
    if any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels is {widths}: each must be a multiple of the first")
    return tuple(width // widths[0] for width in widths)


def attention_levels(config: dict[str, Any]) -> list[int]:
    """Returns the levels that attend, from config.json's down_block_types.

    Raises ValueError on other blocks than ours.
    """
    kinds = config["down_block_types"]
    if not set(kinds) <= set(DOWN.values()):
        raise ValueError(f"down_block_types is {kinds}: only {' and '.join(DOWN.values())} are known")
    return [level for level, kind in enumerate(kinds) if kind == DOWN["SimpleCrossAttn"]]


def unet_config(shape: Shape, sample_size: int, dropout: float) -> dict[str, Any]:
    """Returns config.json of the same network in diffusers.

    Raises ValueError for a width that is not a multiple of 32, and if the first multiplier is not 1.
    """
    # diffusers makes its timestep embedding four times as wide as the first resolution, ours as ``channels``.
    if shape.multipliers[0] != 1:
        raise ValueError(f"multipliers begin with {shape.multipliers[0]}: only 1 can be exported to diffusers' layout")
    if shape.channels % 32:  # diffusers normalises 32 groups everywhere, ours as many as divide the width
        raise ValueError(f"channels is {shape.channels}: only multiples of 32 can be exported to diffusers' layout")
    levels = range(len(shape.multipliers))
    kinds = ["SimpleCrossAttn" if level in shape.attention_levels else "Resnet" for level in levels]
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": sample_size,
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "time_embedding_type": "positional",
        "down_block_types": [DOWN[kind] for kind in kinds],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": [UP[kind] for kind in reversed(kinds)],
        "block_out_channels": [shape.channels * multiplier for multiplier in shape.multipliers],
        "layers_per_block": shape.depth,
        "mid_block_scale_factor": 1,
        "dropout": dropout,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-05,
        "resnet_time_scale_shift": "scale_shift" if shape.scale_shift else "default",
        "class_embed_type": None,
    }
    if not shape.attention_levels:
        return config | {"add_attention": False}
    return config | {
        "_class_name": "UNet2DConditionModel",
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "attention_head_dim": shape.head_channels,
        "cross_attention_dim": shape.context_width,
        "class_embed_type": "identity",
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "resnet_out_scale_factor": 1.0,
    }


def idle_fields(shape: Shape) -> set[str]:
    """Returns fields of the class's config.json that need not be checked for a network of this shape."""
    if not shape.attention_levels:
        return IDLE | {"attention_head_dim"}
    # Fields of blocks that these networks do not have.
    return IDLE | {
        "transformer_layers_per_block",
        "addition_embed_type_num_heads",
        "attention_type",
        "use_linear_projection",
        "upcast_attention",
    }


def unet_table(shape: Shape) -> Table:
    """Yields names of all tensors, ours and theirs."""
    yield pair("time.0", "time_embedding.linear_1")
    yield pair("time.2", "time_embedding.linear_2")
    yield pair("conv_in", "conv_in")
    yield pair("norm_out", "conv_norm_out")
    yield pair("conv_out", "conv_out")
    # Our lists count resizing blocks as stages of their own; diffusers nests them in the block of their resolution.
    yield from _stage("middle.0", "mid_block", "resnets.0", "attentions.0")
    yield from _stage("middle.1", "mid_block", "resnets.1")
    last = len(shape.multipliers) - 1
    down, up = 0, 0
    for block in range(last + 1):
        for layer in range(shape.depth):
            yield from _stage(f"down.{down}", f"down_blocks.{block}", f"resnets.{layer}", f"attentions.{layer}")
            down += 1
        for layer in range(shape.depth + 1):
            yield from _stage(f"up.{up}", f"up_blocks.{block}", f"resnets.{layer}", f"attentions.{layer}")
            up += 1
        if block < last:
            yield from _stage(f"down.{down}", f"down_blocks.{block}", "downsamplers.0")
            yield from _stage(f"up.{up}", f"up_blocks.{block}", "upsamplers.0")
            down, up = down + 1, up + 1


def _stage(ours: str, block: str, resnet: str, attention: str | None = None) -> Table:
    """Yields one residual block and the attention that may follow it."""
    theirs = f"{block}.{resnet}"
    yield pair(f"{ours}.resblock.norm_in", f"{theirs}.norm1")
    yield pair(f"{ours}.resblock.conv_in", f"{theirs}.conv1")
    yield pair(f"{ours}.resblock.modulation", f"{theirs}.time_emb_proj")
    yield pair(f"{ours}.resblock.norm_out", f"{theirs}.norm2")
    yield pair(f"{ours}.resblock.conv_out", f"{theirs}.conv2")
    yield pair(f"{ours}.resblock.skip", f"{theirs}.conv_shortcut")
    if attention is None:
        return
    theirs = f"{block}.{attention}"
    yield pair(f"{ours}.attention.norm", f"{theirs}.group_norm")
    yield pair(f"{ours}.attention.qkv", *(f"{theirs}.to_{part}" for part in "qkv"))
    yield pair(f"{ours}.attention.context_kv", *(f"{theirs}.add_{part}_proj" for part in "kv"))
    yield pair(f"{ours}.attention.out", f"{theirs}.to_out.0")
