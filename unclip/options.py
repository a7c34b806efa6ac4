"""The sampling options of a call, by name, as editors and type checkers see them."""

from typing import Literal, TypedDict


class Options(TypedDict, total=False):
    """Holds sampling options, which hold for one call; ``Model.sampling`` has all with their defaults.

    ``steps`` and ``guidance`` are the decoder's, and so are diffusers' names for them, of which ``guidance_scale``
    counts one more. ``size`` is one of 64, 256, 512 and 1024 pixels that the models make.
    """

    prior: Literal["ar", "diffusion"]
    candidates: int
    prior_steps: int
    prior_sampler: Literal["analytic", "ddpm", "ddim", "dpm"]
    prior_guidance: float
    temperature: float
    decoder_steps: int
    decoder_sampler: Literal["ddpm", "ddim", "dpm"]
    decoder_guidance: float
    decoder_guidance_from: float
    decoder_guidance_to: float
    decoder_threshold: float
    upsampler_256_steps: int
    upsampler_1024_steps: int
    size: int | str
    tile: int
    precision: Literal["fp32", "bf16"]
    steps: int
    num_inference_steps: int
    guidance: float
    guidance_scale: float
    num_images_per_prompt: int
