"""Karlo's parts, small, as diffusers, transformers and open_clip have them."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from models.clip_prior import ClipPrior, ClipPriorConfig
from models.decoder import Decoder
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.interchange import export_decoder, export_prior, export_upsampler
from models.upsampler import Upsampler

DIM, CONTEXT, VOCABULARY = 24, 11, 50
START, END = VOCABULARY - 2, VOCABULARY - 1
TOKENS = 3
NORM = 7.5
CONFIG = DecoderConfig(
    image_size=16, channels=32, depth=2, multipliers=(1, 2), head_channels=16, attention_resolutions=(8,), dropout=0.1,
    text_context=CONTEXT, text_width=DIM, text_depth=2, text_heads=2, vocabulary=VOCABULARY, clip_tokens=TOKENS,
    null_image="learned", text_encoder="clip", context_width=20, embedding_norm=NORM,
)  # fmt: skip
CLIP_PRIOR = ClipPriorConfig(
    text_context=CONTEXT, width=32, depth=2, heads=2, vocabulary=VOCABULARY, text_depth=2, text_heads=2
)
UPSAMPLER = UpsamplerConfig(
    low_size=4, image_size=16, channels=32, depth=2, multipliers=(1, 2), dropout=0.1, crop=1.0,
    corrupt_at_inference=False, scale_shift=False, last_unet=True,
)  # fmt: skip


def lively(module: nn.Module, seed: int = 0) -> Any:
    """The same module, all of whose weights matter: none are zero, and signals keep their size."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=g)
            if parameter.ndim > 1 and "embed" not in name and "position" not in name and "token" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module.eval()


def precise(scheduler: UnCLIPScheduler) -> UnCLIPScheduler:
    """The same scheduler in double precision: in single, the first step's 1 - (1 - alpha) keeps no digit of alpha."""
    scheduler.betas = scheduler.betas.double()
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def captions() -> Tensor:
    """Three of 77 tokens: a short one, one that fills the context, and an empty one."""
    tokens = torch.zeros(3, 77, dtype=torch.int64)
    tokens[0, :5] = torch.tensor([START, 3, 17, 9, END])
    tokens[1, :CONTEXT] = torch.tensor([START, *range(20, 20 + CONTEXT - 2), END])
    tokens[2, :2] = torch.tensor([START, END])
    return tokens


def clip_text_tower(seed: int = 5, vocabulary: int = VOCABULARY, context: int = CONTEXT) -> open_clip.CLIP:
    """A small CLIP of open_clip with OpenAI's activation; its text tower is the reference for ours."""
    text = {"context_length": context, "vocab_size": vocabulary, "width": DIM, "heads": 2, "layers": 2}
    vision = {"image_size": 16, "patch_size": 16, "width": 64, "layers": 1, "head_width": 64}
    return lively(open_clip.CLIP(DIM, vision, text, quick_gelu=True), seed)


def text_features(clip: open_clip.CLIP, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns open_clip's token states, its caption embedding before normalisation, and a mask of real tokens."""
    tokens = tokens[:, :CONTEXT]
    states = clip.ln_final(clip.transformer(clip.token_embedding(tokens) + clip.positional_embedding, clip.attn_mask))
    return states, clip.encode_text(tokens), torch.arange(CONTEXT) <= (tokens == END).int().argmax(1)[:, None]


def write_text_encoder(clip: open_clip.CLIP, folder: Path) -> None:
    """The tower in the layout of transformers' CLIPTextModelWithProjection."""
    vocabulary, context = len(clip.token_embedding.weight), len(clip.positional_embedding)
    weights = {
        "text_model.embeddings.token_embedding.weight": clip.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": clip.positional_embedding,
        "text_model.embeddings.position_ids": torch.arange(context)[None],  # as old versions wrote
        "text_model.final_layer_norm.weight": clip.ln_final.weight,
        "text_model.final_layer_norm.bias": clip.ln_final.bias,
        "text_projection.weight": clip.text_projection.T,
    }
    for i, block in enumerate(clip.transformer.resblocks):
        prefix = f"text_model.encoder.layers.{i}"
        for kind in ("weight", "bias"):
            parts = getattr(block.attn, f"in_proj_{kind}").chunk(3)
            weights |= {f"{prefix}.self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
            for name, module in (
                ("self_attn.out_proj", block.attn.out_proj),
                ("layer_norm1", block.ln_1),
                ("layer_norm2", block.ln_2),
                ("mlp.fc1", block.mlp.c_fc),
                ("mlp.fc2", block.mlp.c_proj),
            ):
                weights[f"{prefix}.{name}.{kind}"] = getattr(module, kind)
    folder.mkdir(parents=True)
    save_file({k: v.detach().clone().contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    config = {"vocab_size": vocabulary, "hidden_size": DIM, "intermediate_size": 4 * DIM, "projection_dim": DIM,
              "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": context}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def unet(
    side: int, layers: int, widths: tuple[int, ...], context: int, head: int, dropout: float = 0.0
) -> UNet2DConditionModel:
    """The decoder's network: no attention at the largest resolution."""
    deeper = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=side, in_channels=3, out_channels=6, block_out_channels=widths, layers_per_block=layers,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * deeper),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * deeper, "ResnetUpsampleBlock2D"),
        cross_attention_dim=context, attention_head_dim=head, class_embed_type="identity", dropout=dropout,
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


def upsampler(side: int, layers: int, widths: tuple[int, ...], dropout: float = 0.0) -> UNet2DModel:
    """One of the upsampler's two networks."""
    return UNet2DModel(
        sample_size=side, in_channels=6, out_channels=3, block_out_channels=widths, layers_per_block=layers,
        down_block_types=("ResnetDownsampleBlock2D",) * len(widths), dropout=dropout, add_attention=False,
        up_block_types=("ResnetUpsampleBlock2D",) * len(widths),
    )  # fmt: skip


def prior() -> PriorTransformer:
    """The prior's network."""
    return PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=DIM, num_embeddings=CONTEXT
    )


def write_all(folder: Path) -> None:
    """Writes a folder with all parts and nothing of ours, as Karlo's: CLIP's tokens, captions of 77, 16 px, then 64."""
    torch.manual_seed(0)
    tokens = {"vocabulary": 49408, "text_context": 77}
    network = lively(ClipPrior(dataclasses.replace(CLIP_PRIOR, **tokens), DIM))
    network.mean.normal_()
    network.std.uniform_(0.5, 1.5)
    images = lively(Decoder(dataclasses.replace(CONFIG, **tokens), DIM))
    images.text = network.text
    export_prior(network, folder)
    export_decoder(images, folder)
    export_upsampler(lively(Upsampler(dataclasses.replace(UPSAMPLER, low_size=16, image_size=64))), folder)
    shutil.rmtree(folder / "ours")


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
