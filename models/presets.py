"""Named sizes for every model: plain data. A stage names one and overrides single fields.

Beside the models' stages, "bundle" holds how to sample from them.

nano   every model learns something in seconds on a laptop; for tests and a first look
tiny   a picture worth looking at after half an hour on two CPU cores
small  one consumer GPU
karlo  the widths of the largest open peer, on 768-dimensional embeddings such as ViT-L/14's
paper  Table 3
"""

from typing import Any

from models.image_configs import DecoderConfig, UpsamplerConfig
from models.prior_configs import ARPriorConfig, ClipConfig, DiffusionPriorConfig
from models.sampling_config import SamplingConfig

NANO: dict[str, Any] = {
    "clip": ClipConfig(
        embed_dim=64,
        image_size=64,
        tower="vit",
        layers=(2,),
        width=64,
        patch=16,
        text_width=64,
        text_layers=2,
        text_heads=2,
        text_context=32,
    ),
    "ar_prior": ARPriorConfig(
        text_context=32, prefix=16, text_width=64, text_depth=1, text_heads=2, width=64, depth=2, heads=2
    ),
    "diffusion_prior": DiffusionPriorConfig(text_context=32, width=64, depth=2, heads=2),
    "decoder": DecoderConfig(
        channels=32,
        depth=1,
        multipliers=(1, 2),
        head_channels=16,
        attention_resolutions=(8,),
        dropout=0.0,
        text_context=32,
        text_width=48,
        text_depth=1,
        text_heads=2,
        patch=4,
        prediction="x0",
    ),
    "upsampler_256": UpsamplerConfig(channels=16, depth=1, multipliers=(1, 2), dropout=0.0, patch=4, prediction="x0"),
    "upsampler_1024": UpsamplerConfig(
        low_size=256,
        image_size=1024,
        channels=16,
        depth=1,
        multipliers=(1, 2),
        dropout=0.0,
        corruption="bsr_light",
        schedule="linear",
        patch=4,
        prediction="x0",
    ),
    "bundle": SamplingConfig(
        prior_steps=16,
        decoder_steps=16,
        decoder_sampler="ddim",
        decoder_guidance=1.0,
        upsampler_256_steps=8,
        upsampler_1024_steps=4,
    ),
}

TINY: dict[str, Any] = {
    # CLIP's modified ResNet learns faster than a vision transformer on few small pictures.
    "clip": ClipConfig(
        embed_dim=512,
        image_size=64,
        tower="resnet",
        layers=(2, 2, 2, 2),
        width=32,
        text_width=192,
        text_layers=4,
        text_heads=6,
        text_context=32,
    ),
    "ar_prior": ARPriorConfig(
        text_context=32, prefix=32, text_width=128, text_depth=1, text_heads=4, width=128, depth=3, heads=2
    ),
    "diffusion_prior": DiffusionPriorConfig(text_context=32, width=256, depth=4, heads=4),
    "decoder": DecoderConfig(
        channels=48,
        depth=1,
        multipliers=(1, 2),
        head_channels=32,
        attention_resolutions=(8,),
        dropout=0.0,
        text_context=32,
        text_width=96,
        text_depth=1,
        text_heads=3,
        patch=4,
        prediction="x0",
    ),
    "upsampler_256": UpsamplerConfig(channels=32, depth=1, multipliers=(1, 2), dropout=0.0, patch=4, prediction="x0"),
    "upsampler_1024": UpsamplerConfig(
        low_size=256,
        image_size=1024,
        channels=32,
        depth=1,
        multipliers=(1, 2),
        dropout=0.0,
        corruption="bsr_light",
        schedule="linear",
        patch=4,
        prediction="x0",
    ),
    "bundle": SamplingConfig(
        prior_steps=32,
        decoder_steps=50,
        decoder_sampler="ddim",
        decoder_guidance=1.0,
        upsampler_256_steps=15,
        upsampler_1024_steps=8,
    ),
}

SMALL: dict[str, Any] = {
    "clip": ClipConfig(
        embed_dim=512, image_size=128, layers=(12,), width=512, patch=16, text_width=512, text_layers=8, text_heads=8
    ),
    "ar_prior": ARPriorConfig(text_width=512, text_depth=6, text_heads=8, width=768, depth=12, heads=12, dropout=0.1),
    "diffusion_prior": DiffusionPriorConfig(width=1024, depth=12, heads=16),
    "decoder": DecoderConfig(channels=192, depth=2, text_width=512, text_depth=6, text_heads=8),
    "upsampler_256": UpsamplerConfig(channels=128, depth=2, dropout=0.0),
    "upsampler_1024": UpsamplerConfig(
        low_size=256,
        image_size=1024,
        channels=64,
        depth=2,
        multipliers=(1, 1, 2, 2, 4, 4),
        dropout=0.0,
        corruption="bsr",
        schedule="linear",
    ),
    "bundle": SamplingConfig(prior_guidance=1.0, decoder_steps=100, decoder_guidance=2.0),
}

KARLO: dict[str, Any] = {
    "clip": ClipConfig(
        embed_dim=768,
        image_size=224,
        layers=(24,),
        width=1024,
        patch=14,
        text_width=768,
        text_layers=12,
        text_heads=12,
    ),
    "ar_prior": ARPriorConfig(text_width=768, text_depth=12, text_heads=12, width=2048, depth=20, heads=32),
    "diffusion_prior": DiffusionPriorConfig(width=2048, depth=20, heads=32, drop_text=0.2),
    "decoder": DecoderConfig(
        channels=320, text_context=77, text_width=768, text_depth=12, text_heads=12, drop_text=0.3
    ),
    "upsampler_256": UpsamplerConfig(channels=320, depth=3),
    "upsampler_1024": UpsamplerConfig(
        low_size=256,
        image_size=1024,
        channels=192,
        depth=2,
        multipliers=(1, 1, 2, 2, 4, 4),
        dropout=0.0,
        corruption="bsr",
        schedule="linear",
    ),
    "bundle": SamplingConfig(
        prior_steps=25,
        prior_sampler="ddpm",
        prior_guidance=3.0,
        decoder_steps=50,
        decoder_guidance=7.0,
    ),
}

PAPER: dict[str, Any] = {
    "clip": ClipConfig(
        embed_dim=1024,
        image_size=256,
        layers=(32,),
        width=1280,
        patch=16,
        text_width=1024,
        text_layers=24,
        text_heads=16,
    ),
    "ar_prior": ARPriorConfig(),
    "diffusion_prior": DiffusionPriorConfig(),
    "decoder": DecoderConfig(),
    "upsampler_256": UpsamplerConfig(),
    "upsampler_1024": UpsamplerConfig(
        low_size=256,
        image_size=1024,
        channels=192,
        depth=2,
        multipliers=(1, 1, 2, 2, 4, 4),
        dropout=0.0,
        corruption="bsr",
        schedule="linear",
    ),
    "bundle": SamplingConfig(),
}

PRESETS: dict[str, dict[str, Any]] = {
    "nano": NANO,
    "tiny": TINY,
    "small": SMALL,
    "karlo": KARLO,
    "paper": PAPER,
}
