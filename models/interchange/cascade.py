"""A whole folder in diffusers' layout, such as Karlo's, as one generator."""

from pathlib import Path

from models.cascade import UnCLIP
from models.clip import Clip
from models.interchange.decoder import import_decoder
from models.interchange.prior import import_prior
from models.interchange.upsampler import import_upsampler
from models.sampling_config import SamplingConfig

KARLO_SAMPLING = SamplingConfig(
    candidates=1,
    prior_steps=25,
    prior_sampler="ddpm",
    prior_guidance=3.0,
    decoder_steps=50,
    decoder_guidance=7.0,
    upsampler_256_steps=7,
    size=256,
)
"""Karlo's own defaults: it draws one embedding a caption, and ends at 256 px, after six steps and one of a second
network that a model trained here does not have."""


def import_unclip(folder: str | Path, clip: Clip, sampling: SamplingConfig = KARLO_SAMPLING) -> UnCLIP:
    """Reads prior, decoder and, where there is one, upsampler, and join them to their CLIP, on its device.

    The folder holds no CLIP with an image encoder: Karlo's is OpenAI's ViT-L/14. Raises FileNotFoundError when a file
    is missing, and ValueError when something does not fit or embeddings have another dimension than CLIP's.
    """
    folder, device = Path(folder), clip.mean.device
    prior, decoder = import_prior(folder), import_decoder(folder)
    for name, dim in (("prior", prior.embed_dim), ("decoder", decoder.embed_dim)):
        if dim != clip.embed_dim:
            raise ValueError(
                f"{folder / name} was trained on {dim}-dimensional embeddings, this CLIP makes {clip.embed_dim}: pass "
                "the CLIP that it was trained with, which for Karlo is OpenAI's ViT-L/14"
            )
    upsampler = import_upsampler(folder).to(device) if (folder / "super_res_first").is_dir() else None
    return UnCLIP(clip, decoder.to(device), prior.to(device), upsampler_256=upsampler, sampling=sampling)
