"""Sampling defaults of a bundle. No torch here, as in the other configurations."""

import difflib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from models.prior_configs import check_choices, check_least, require

SAMPLING_FILE = "sampling.json"
PRIORS = {"ar": "ar_prior", "diffusion": "diffusion_prior"}
"""The models that turn a caption into an image embedding, by the value of ``prior``."""
BASE = 64
"""The side of the decoder's images, in pixels."""
UPSAMPLERS = {"upsampler_256": 256, "upsampler_1024": 1024}
"""The side of each upsampler's images, in the order in which they run."""
MODELS = (*PRIORS.values(), "decoder", *UPSAMPLERS)
"""The models of a bundle that are trained for it, in the order in which they run."""
STEPS = {"diffusion_prior": "prior_steps"} | {name: f"{name}_steps" for name in ("decoder", *UPSAMPLERS)}
"""The option with a model's number of sampling steps, by the model."""
UNEVEN_MODEL, UNEVEN = "upsampler_256", 27
"""This model with this number of steps takes GLIDE's uneven grid, which needs ``UNEVEN_OF`` timesteps or more."""
UNEVEN_OF = 50

OTHER_NAMES = {
    **dict.fromkeys(("steps", "num_inference_steps", "decoder_num_inference_steps"), "decoder_steps"),
    **dict.fromkeys(("guidance", "guidance_scale", "decoder_guidance_scale"), "decoder_guidance"),
    "prior_num_inference_steps": "prior_steps",
    "prior_guidance_scale": "prior_guidance",
    "super_res_num_inference_steps": "upsampler_256_steps",
    **dict.fromkeys(("num_images", "num_images_per_prompt", "count"), "n"),
    "seeds": "seed",
    "prompt": "caption",
    "most": "strength",
}
"""Our names of options and parameters, by the names that diffusers, OpenAI's API, the studio and others have."""
INSTEAD = {
    "negative_prompt": "guidance leads away from the empty caption, and from no other: leave it out",
    "generator": "give its seed, such as seed=7",
    **dict.fromkeys(("width", "height"), "images are square: give size, such as size=256"),
    **dict.fromkeys(("cfg", "cfg_scale", "scale"), "give guidance_scale, or guidance, which is one less"),
    **dict.fromkeys(
        ("sampler", "scheduler"), "give decoder_sampler (ddpm, ddim or dpm) or prior_sampler (those or analytic)"
    ),
    "quality": "give steps, such as steps=50",
}
"""What to do instead of what other programs have and these models have not."""


@dataclass(frozen=True)
class SamplingConfig:
    """Holds sampling defaults; the class's own are the paper's.

    Attributes:
        prior: Prior that draws image embeddings: ``diffusion`` or ``ar``.
        candidates: Image embeddings drawn per caption, of which the best is kept.
        prior_steps: Sampling steps of the diffusion prior.
        prior_sampler: Sampler of the diffusion prior: ``analytic`` (DDPM with Analytic-DPM's variance, if the prior has
            measured it), ``ddpm``, ``ddim`` or ``dpm`` (DPM-Solver++, for 15 to 25 steps).
        prior_guidance: Guidance w of the prior: (1 + w) conditional - w unconditional.
        temperature: Sampling temperature of the AR prior.
        decoder_steps: Sampling steps of the decoder; for any model from 2 to its ``steps``. With fewer than 15 steps,
            or a decoder that predicts the image, timesteps are "trailing": they end before timestep 0, where there is
            still noise to remove; those of ``dpm`` end at 0.
        decoder_sampler: Sampler of the decoder: ``ddpm``, ``ddim`` or ``dpm``.
        decoder_guidance: Guidance w of the decoder, one less than the usual scale: 0.25 is the paper's 1.25.
        decoder_guidance_from: Share of the timesteps below which the decoder is not guided: at low noise, guidance adds
            dots and oversaturated colours.
        decoder_guidance_to: Share of the timesteps above which the decoder is not guided.
        decoder_threshold: Quantile of dynamic thresholding, which at every step rescales values that guidance drives
            out of range (0.995 is usual); 0 clips them instead.
        upsampler_256_steps: DDIM steps of the first upsampler; 27 is GLIDE's uneven grid.
        upsampler_1024_steps: DDIM steps of the second upsampler.
        size: Side of the largest image to make, in pixels.
        tile: Side in pixels of the overlapping tiles in which the upsamplers work, to save memory; 0 processes whole
            images.
        precision: Precision of the networks: ``fp32``, or ``bf16`` if the device supports it, which changes an image
            slightly.
    """

    prior: str = "diffusion"
    candidates: int = 2
    prior_steps: int = 64
    prior_sampler: Literal["analytic", "ddpm", "ddim", "dpm"] = "analytic"
    prior_guidance: float = 0.0
    temperature: float = 1.0
    decoder_steps: int = 250
    decoder_sampler: Literal["ddpm", "ddim", "dpm"] = "ddpm"
    decoder_guidance: float = 0.25
    decoder_guidance_from: float = 0.0
    decoder_guidance_to: float = 1.0
    decoder_threshold: float = 0.0
    upsampler_256_steps: int = 27
    upsampler_1024_steps: int = 15
    size: Literal[64, 256, 1024] = 1024
    tile: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        require(self.prior in PRIORS, f"prior is {self.prior!r}: use {' or '.join(map(repr, PRIORS))}")
        check_choices(self)
        check_least(self, 1, "candidates")
        check_least(self, 2, *STEPS.values())
        check_least(self, 0, "tile")
        require(self.temperature > 0, f"temperature is {self.temperature}: use a number above 0")
        first, last = self.decoder_guidance_interval
        require(
            0 <= first <= last <= 1,
            f"decoder_guidance_from is {first} and decoder_guidance_to {last}: use shares from 0 to 1, in this order",
        )
        require(
            0 <= self.decoder_threshold <= 1,
            f"decoder_threshold is {self.decoder_threshold}: use a share from 0 to 1, such as 0.995",
        )

    @property
    def decoder_guidance_interval(self) -> tuple[float, float]:
        """Returns the shares of the timesteps between which the decoder is guided."""
        return self.decoder_guidance_from, self.decoder_guidance_to


def largest_side(models: Collection[str]) -> int:
    """Returns the side, in pixels, of the images that these models end at."""
    return max((side for name, side in UPSAMPLERS.items() if name in models), default=BASE)


def check_sampling(sampling: SamplingConfig, models: Mapping[str, Any]) -> None:
    """Raises ValueError for options that one of the models, configurations by name, would refuse at sampling."""
    for name, model in models.items():
        if name in STEPS:
            steps = getattr(sampling, STEPS[name])
            require(
                steps <= model.steps,
                f"{STEPS[name]} is {steps}, and {name} has {model.steps} timesteps: use 2 to {model.steps}",
            )
        if name == UNEVEN_MODEL:
            require(
                steps != UNEVEN or model.steps >= UNEVEN_OF,
                f"{STEPS[name]} is {UNEVEN}, which takes {UNEVEN_OF} or more timesteps, and {name} has "
                f"{model.steps}: use another number",
            )
        if name == "decoder" and sampling.decoder_guidance:
            share = min(model.drop_image, model.drop_text)
            _check_guided(f"decoder_guidance is {sampling.decoder_guidance}", share, "drop_image and drop_text")
        if name == PRIORS[sampling.prior] and sampling.prior_guidance:
            _check_guided(f"prior_guidance is {sampling.prior_guidance}", model.drop_text, "drop_text")
        if name in UPSAMPLERS:
            multiple = model.patch * 2 ** (len(model.multipliers) - 1)
            require(
                # A tile of one multiple has no room to overlap with its neighbours.
                sampling.tile % multiple == 0 and sampling.tile != multiple,
                f"tile is {sampling.tile}: {name} takes multiples of {multiple} px, from {2 * multiple} on",
            )


def _check_guided(what: str, share: float, names: str) -> None:
    """Raises ValueError for guidance of a model that has never seen a row without its condition."""
    require(share > 0, f"{what}, and the model was trained without {names}: use 0, or train with shares above 0")


def own_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options and parameters by our names and on our scales, of those of OTHER_NAMES.

    A ``size`` of "256x256" is 256, and of "auto" is left out. Raises ValueError for one of INSTEAD, one that is given
    by two names, and a size that is not square.
    """
    own: dict[str, Any] = {}
    for name, value in options.items():
        if name in INSTEAD:
            raise ValueError(f"{name} is not known here: {INSTEAD[name]}")
        if (mine := OTHER_NAMES.get(name, name)) in own:
            raise ValueError(f"{name}: {mine} is given twice; leave one of them out")
        if name.endswith("guidance_scale") and isinstance(value, Real):
            value = max(0.0, float(value) - 1)  # where 1 is none
        if name == "size" and isinstance(value, str):
            found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value)
            if found and found[1] != found[2]:
                raise ValueError(f"size is {value}, and images are square: use one side, such as 256")
            value = int(found[1]) if found else value
        if (name, value) != ("size", "auto"):
            own[mine] = value
    return own


def change_sampling(sampling: SamplingConfig, options: dict[str, object]) -> SamplingConfig:
    """Returns ``sampling`` with some fields replaced. Raises ValueError on an unknown one or a value out of range."""
    known = [known.name for known in fields(SamplingConfig)]
    if unknown := sorted(options.keys() - set(known)):
        near = difflib.get_close_matches(unknown[0], [*known, *OTHER_NAMES], n=1)
        said = f"did you mean {near[0]}?" if near else f"the known ones are {', '.join(known)}"
        raise ValueError(f"unknown sampling options {unknown}: {said}")
    return replace(sampling, **{name: _typed(name, value) for name, value in options.items()})


def sampling_for(sampling: SamplingConfig, options: Mapping[str, Any], models: Mapping[str, Any]) -> SamplingConfig:
    """Returns ``sampling`` with options as ``own_names`` takes them. ``models`` are configurations by name.

    Another prior is guided as the default one, but for one that never saw a row without its caption. Raises ValueError
    as ``change_sampling`` and ``check_sampling`` do, and for a size that these models do not reach.
    """
    own = own_names(options)
    changed, largest = change_sampling(sampling, own), largest_side(models)
    if changed.size > largest:
        sides = " or ".join(str(side) for side in (BASE, *UPSAMPLERS.values()) if side <= largest)
        require(
            "size" not in own, f"size is larger than what this bundle draws, which is {sides} px: use size={largest}"
        )
        changed = change_sampling(changed, {"size": largest})
    prior = models.get(PRIORS[changed.prior])
    if changed.prior != sampling.prior and prior is not None and prior.drop_text == 0:
        changed = change_sampling(sampling, {"prior_guidance": 0.0} | own)
    check_sampling(changed, models)
    return changed


def _typed(name: str, value: object) -> Any:
    """Returns a value of an option as its type, numpy's numbers too. Raises ValueError for one of another type."""
    kind = type(getattr(SamplingConfig, name))
    allowed, needed = {
        int: (Integral, "a whole number"),
        float: (Real, "a number"),
        str: (str, "a word"),
    }[kind]
    # Python's bool is an int, and True steps would be 1.
    if not isinstance(value, allowed) or isinstance(value, bool) or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name} is {value!r}: use {needed}")
    return kind(value)


def read_sampling(folder: Path) -> SamplingConfig:
    """Returns the sampling defaults in a bundle's folder, or the class's own where it has none.

    Raises ValueError, which names the file, as ``change_sampling`` does, and for a file that is not JSON.
    """
    path = folder / SAMPLING_FILE
    if not path.is_file():
        return SamplingConfig()
    try:
        options = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): fix or delete it") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds {options!r} in place of sampling options: fix or delete it")
    try:
        return change_sampling(SamplingConfig(), options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; if another version wrote it, use that version") from error


def write_sampling(folder: Path, sampling: SamplingConfig) -> None:
    """Writes the sampling defaults into a bundle's folder, as ``read_sampling`` takes them."""
    (folder / SAMPLING_FILE).write_text(json.dumps(asdict(sampling), indent=2) + "\n")
