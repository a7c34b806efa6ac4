"""How a bundle turns captions into pictures unless told otherwise. No torch here, as in the other configurations."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from models.prior_configs import require

SAMPLING_FILE = "sampling.json"
DECODER_SAMPLERS = ("ddpm", "ddim", "dpm")
PRIOR_SAMPLERS = ("analytic", *DECODER_SAMPLERS)


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling defaults; the class's own are the paper's.

    ``prior`` "diffusion" or "ar" draws ``candidates`` image embeddings a caption and keeps the best. ``..._guidance``
    is w in (1 + w) conditional - w unconditional, one less than the literature's scale: the decoder's 0.25 is the
    paper's 1.25. ``temperature`` is the AR prior's. ``..._sampler`` is "ddpm", "ddim" or "dpm" (DPM-Solver++, for 15 to
    25 steps), and for the prior "analytic", DDPM with Analytic-DPM's variance; a prior that was never measured for it
    gets DDPM's. The upsamplers use DDIM, with GLIDE's uneven grid where ``upsampler_256_steps`` is 27. ``size`` is the
    largest picture to make: 64, 256 or 1024. ``tile`` is the side of the overlapping tiles in which the upsamplers
    work where memory is short, in pixels; 0 takes pictures whole.
    """

    prior: str = "diffusion"
    candidates: int = 2
    prior_steps: int = 64
    prior_sampler: str = "analytic"
    prior_guidance: float = 0.0
    temperature: float = 1.0
    decoder_steps: int = 250
    decoder_sampler: str = "ddpm"
    decoder_guidance: float = 0.25
    upsampler_256_steps: int = 27
    upsampler_1024_steps: int = 15
    size: int = 1024
    tile: int = 0

    def __post_init__(self) -> None:
        require(self.prior in ("diffusion", "ar"), f"prior is {self.prior!r}: use 'diffusion' or 'ar'")
        for name, known in (("prior_sampler", PRIOR_SAMPLERS), ("decoder_sampler", DECODER_SAMPLERS)):
            sampler = getattr(self, name)
            require(sampler in known, f"{name} is {sampler!r}: use one of {', '.join(known)}")
        for name in ("candidates", "prior_steps", "decoder_steps", "upsampler_256_steps", "upsampler_1024_steps"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: use 1 or more")
        require(self.temperature > 0, f"temperature is {self.temperature}: use a number above 0")
        require(self.size in (64, 256, 1024), f"size is {self.size}: use 64, 256 or 1024")
        require(self.tile >= 0, f"tile is {self.tile}: use 0 for whole pictures, or a side in pixels")


def change_sampling(sampling: SamplingConfig, options: dict[str, object]) -> SamplingConfig:
    """``sampling`` with some fields replaced. Raises ValueError on an unknown one or a value out of range."""
    known = [known.name for known in fields(SamplingConfig)]
    unknown = options.keys() - set(known)
    if unknown:
        raise ValueError(f"unknown sampling options {sorted(unknown)}: the known ones are {', '.join(known)}")
    return replace(sampling, **options)  # type: ignore[arg-type]


def read_sampling(folder: Path) -> SamplingConfig:
    """The sampling defaults in a bundle's folder, or the class's own where there are none. Raises ValueError as
    above."""
    path = folder / SAMPLING_FILE
    if not path.is_file():
        return SamplingConfig()
    try:
        options = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}): mend or delete it") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds no sampling options but {options!r}: mend or delete it")
    return change_sampling(SamplingConfig(), options)


def write_sampling(folder: Path, sampling: SamplingConfig) -> None:
    """Write the sampling defaults into a bundle's folder, as ``read_sampling`` takes them."""
    (folder / SAMPLING_FILE).write_text(json.dumps(asdict(sampling), indent=2) + "\n")
