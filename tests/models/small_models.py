"""A whole unCLIP and its parts, as small as they can be, and seeded numbers to feed them."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.ar_prior import ARPrior
from models.cascade import UnCLIP
from models.clip import Clip
from models.codec import Codec
from models.codec_fit import fit_codec
from models.decoder import Decoder
from models.diffusion_prior import DiffusionPrior
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.prior_configs import ARPriorConfig, ClipConfig, DiffusionPriorConfig
from models.sampling_config import SamplingConfig
from models.upsampler import Upsampler

DIM, CODES = 16, 4
TEXT: dict[str, Any] = {"text_context": 12, "text_width": 16, "text_heads": 2}
CLIP = ClipConfig(embed_dim=DIM, image_size=32, layers=(1,), width=16, patch=16, text_layers=1, **TEXT)
AR_PRIOR = ARPriorConfig(prefix=6, text_depth=1, width=16, depth=1, heads=2, buckets=8, **TEXT)
DIFFUSION_PRIOR = DiffusionPriorConfig(text_context=12, width=16, depth=1, heads=2)
# A quarter of the usual sizes: 16, 64 and 256 px.
DECODER = DecoderConfig(
    image_size=16, channels=8, depth=1, multipliers=(1,), head_channels=8, attention_resolutions=(16,), text_depth=1,
    **TEXT,
)  # fmt: skip
UPSAMPLER_256 = UpsamplerConfig(low_size=16, image_size=64, channels=8, depth=1, multipliers=(1, 1))
UPSAMPLER_1024 = UpsamplerConfig(
    low_size=64, image_size=256, channels=8, depth=1, multipliers=(1, 1), corruption="bsr_light", patch=4
)
SAMPLING = SamplingConfig(
    prior_steps=3, decoder_steps=4, decoder_guidance=1.0, upsampler_256_steps=3, upsampler_1024_steps=2
)
CAPTIONS = ["a red fox", "a blue house", ""]


def make_codec(codes: int = CODES) -> Codec:
    z = F.normalize(torch.randn(50, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    return fit_codec(z, (z * z.flip(0)).sum(-1), codes, 8).codec


def make() -> Any:
    """An UnCLIP that lacks nothing: untrained, but with every weight at work."""
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "decoder": Decoder(DECODER, DIM),
        "diffusion_prior": DiffusionPrior(DIFFUSION_PRIOR, DIM),
        "ar_prior": ARPrior(AR_PRIOR, DIM, CODES),
        "upsampler_256": Upsampler(UPSAMPLER_256),
        "upsampler_1024": Upsampler(UPSAMPLER_1024),
    }
    for model in models.values():
        for parameter in model.eval().parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return UnCLIP(Clip.build(CLIP, seed=0).eval(), codec=make_codec(), sampling=SAMPLING, **models)


def _image(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(60, 200, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((40, 40), Image.Resampling.BICUBIC)


IMAGES = [_image(0), _image(1)]


def randomised(module: nn.Module, seed: int = 0) -> Any:
    """The same module with all weights drawn anew, so that no zero at the start hides a branch."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(n: int = 500, d: int = 24, rank: int = 24, seed: int = 0) -> Tensor:
    """Unit-norm rows with an offset, a falling spectrum and at most ``rank`` directions."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(1, 0.05, rank) * torch.randn(n, rank, generator=generator)
    z = spread @ torch.randn(rank, d, generator=generator) / d**0.5 + torch.ones(d) / d**0.5
    return (z / z.norm(dim=-1, keepdim=True)) if rank == d else z
