"""The whole generator: captions to image embeddings to pictures of 64, 256 and 1024 px.

Algorithm 2 of the specification (a prior draws several embeddings and keeps the best), then Algorithm 1 (the decoder
and two upsamplers, each of which gets a slightly damaged picture, as in training).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from models.ar_prior import ARPrior
from models.ar_prior import sample as sample_codes
from models.clip import Clip, tokenize
from models.codec import Codec
from models.decoder import Decoder, decoder_denoise
from models.diffusion.dpm_solver import dpm_solver
from models.diffusion.samplers import Denoise, ancestral, ddim
from models.diffusion.schedules import fast27_grid, log_snr_grid, make_schedule, strided_grid
from models.diffusion_prior import DiffusionPrior, best_of, diffusion_prior_denoise, diffusion_prior_variance
from models.draw import Draw, derive_seed
from models.folder import load_codec, load_model
from models.pixels import to_uint8
from models.sampling_config import SamplingConfig
from models.upsampler import Upsampler, sampling_low, upsampler_denoise

SAMPLING_FILE = "sampling.json"

Progress = Callable[[str, int, int], None]
"""Called after every step with the stage's name, the number of steps done and the number of steps."""


@dataclass(frozen=True)
class Generation:
    """What a caption became: ``embedding``, unit norm, fp32 [b, d], and ``images`` by side in pixels.

    Pictures are uint8 [b, side, side, 3], on the CPU.
    """

    embedding: Tensor
    images: dict[int, Tensor]

    @property
    def image(self) -> Tensor:
        """The largest pictures."""
        return self.images[max(self.images)]


def ignore(stage: str, step: int, steps: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class UnCLIP:
    """A CLIP, one prior or both, a decoder, and up to two upsamplers. The AR prior needs its codec.

    Raises ValueError when the models do not belong together.
    """

    clip: Clip
    decoder: Decoder
    diffusion_prior: DiffusionPrior | None = None
    ar_prior: ARPrior | None = None
    codec: Codec | None = None
    upsampler_256: Upsampler | None = None
    upsampler_1024: Upsampler | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.diffusion_prior is None and self.ar_prior is None:
            raise ValueError("there is no prior: add diffusion_prior or ar_prior")
        if self.upsampler_1024 is not None and self.upsampler_256 is None:
            raise ValueError("upsampler_1024 has nothing to enlarge: add upsampler_256")
        for name in ("decoder", "diffusion_prior", "ar_prior"):
            model = getattr(self, name)
            if model is not None and model.embed_dim != self.clip.embed_dim:
                raise ValueError(
                    f"{name} was trained on {model.embed_dim}-dimensional embeddings, CLIP makes "
                    f"{self.clip.embed_dim}: take both from one bundle"
                )
        if self.ar_prior is not None:
            codes = (self.ar_prior.codes, self.ar_prior.config.buckets)
            if self.codec is None or (self.codec.codes, self.codec.buckets) != codes:
                raise ValueError(f"the AR prior needs its codec, of {codes[0]} codes of {codes[1]} buckets: add codec")

    @classmethod
    def from_folder(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Load a bundle: a folder with a subfolder for each model, named as the fields are, and sampling.json.

        clip, decoder and a prior must be there. Raises FileNotFoundError when they are not, ValueError when something
        is damaged or does not belong together.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder: name a bundle, as the bundle stage or a release makes it")
        optional = ("diffusion_prior", "ar_prior", "upsampler_256", "upsampler_1024")
        models = {name: load_model(folder / name, device) for name in optional if (folder / name).is_dir()}
        codec = load_codec(folder / "codec", device) if (folder / "codec").is_dir() else None
        return cls(
            clip=Clip.from_folder(folder / "clip").to(device),
            decoder=load_model(folder / "decoder", device),
            codec=codec,
            sampling=read_sampling(folder / SAMPLING_FILE),
            **models,
        )

    @torch.no_grad()
    def generate(
        self, captions: Sequence[str], seeds: Sequence[int], progress: Progress = ignore, **options: object
    ) -> Generation:
        """Make one picture for each caption from its own seed.

        ``options`` replace single fields of ``sampling``. A picture depends on its caption, its seed and the options,
        and not on the rest of the batch beyond rounding. Stops at the last upsampler there is. Raises ValueError on
        captions and seeds of different number, and on an option out of range.
        """
        if len(captions) != len(seeds) or not captions:
            raise ValueError(f"got {len(captions)} captions and {len(seeds)} seeds: give one seed for each caption")
        sampling = change_sampling(self.sampling, options)
        tokens = tokenize(list(captions)).to(self.clip.mean.device)
        embedding = self.draw_embedding(tokens, seeds, sampling, progress)
        return self.decode(embedding, tokens, seeds, sampling, progress)

    def draw_embedding(
        self, tokens: Tensor, seeds: Sequence[int], sampling: SamplingConfig, progress: Progress = ignore
    ) -> Tensor:
        """Algorithm 2: the best of several image embeddings for tokens [b, 77], unit norm, fp32 [b, d]."""
        text = self.clip.encode_text(tokens)
        repeats = sampling.candidates
        streams = [(derive_seed(seed, "prior", i), 1) for i in range(repeats) for seed in seeds]
        draw = Draw(streams, text.device)
        draw_samples = self._draw_diffusion if sampling.prior == "diffusion" else self._draw_ar
        samples = draw_samples(tokens.repeat(repeats, 1), text.repeat(repeats, 1), draw, sampling, progress)
        return best_of(samples.unflatten(0, (repeats, len(seeds))), text)

    def _draw_diffusion(
        self, tokens: Tensor, text: Tensor, draw: Draw, sampling: SamplingConfig, progress: Progress
    ) -> Tensor:
        model = self.diffusion_prior
        if model is None:
            raise ValueError("this bundle has no diffusion_prior: use prior 'ar'")
        denoise = diffusion_prior_denoise(model, tokens, text, sampling.prior_guidance)
        noise = draw.normal("x_T", model.embed_dim)
        run = Reverse("diffusion_prior", sampling.prior_sampler, "small", sampling.prior_steps, progress)
        return run(model, denoise, noise, draw) / model.scale

    def _draw_ar(
        self, tokens: Tensor, text: Tensor, draw: Draw, sampling: SamplingConfig, progress: Progress
    ) -> Tensor:
        model, codec = self.ar_prior, self.codec
        if model is None or codec is None:
            raise ValueError("this bundle has no ar_prior: use prior 'diffusion'")
        codes = sample_codes(
            model,
            tokens,
            text,
            codec.sample_upper_dot(draw),
            draw,
            temperature=sampling.temperature,
            guidance=sampling.prior_guidance,
            callback=lambda done: progress("ar_prior", done, model.codes),
        )
        return codec.decode(codes)

    def decode(
        self,
        embedding: Tensor,
        tokens: Tensor,
        seeds: Sequence[int],
        sampling: SamplingConfig,
        progress: Progress = ignore,
    ) -> Generation:
        """Algorithm 1: pictures of embeddings [b, d] and tokens [b, 77], a seed for each."""
        draw = Draw([(derive_seed(seed, "decoder"), 1) for seed in seeds], embedding.device)
        config = self.decoder.config
        denoise = decoder_denoise(self.decoder, embedding, tokens, sampling.decoder_guidance)
        noise = draw.normal("x_T", 3, config.image_size, config.image_size)
        run = Reverse("decoder", sampling.decoder_sampler, "learned", sampling.decoder_steps, progress)
        image = run(self.decoder, denoise, noise, draw)
        images = {config.image_size: image}
        for name in ("upsampler_256", "upsampler_1024"):
            model = getattr(self, name)
            if model is None or model.config.image_size > sampling.size:
                break
            draw = Draw([(derive_seed(seed, name), 1) for seed in seeds], embedding.device)
            low = sampling_low(model.config, image.clamp(-1, 1), draw)
            noise = draw.normal("x_T", 3, model.config.image_size, model.config.image_size)
            run = Reverse(name, "ddim", "small", getattr(sampling, f"{name}_steps"), progress)
            image = run(model, upsampler_denoise(model, low), noise, draw)
            images[model.config.image_size] = image
        return Generation(embedding, {side: to_uint8(x).permute(0, 2, 3, 1).cpu() for side, x in images.items()})


@dataclass(frozen=True)
class Reverse:
    """How one model's reverse diffusion runs.

    ``sampler``: "ddpm", with the ``variance`` "small" or "learned"; "analytic", the same with the diffusion prior's
    optimal variance; "ddim"; or "dpm", DPM-Solver++ on a grid of its own.
    """

    stage: str
    sampler: str
    variance: str
    steps: int
    progress: Progress

    def __call__(
        self, model: DiffusionPrior | Decoder | Upsampler, denoise: Denoise, noise: Tensor, draw: Draw
    ) -> Tensor:
        """From ``noise`` [b, ...] to a sample of the same shape."""
        schedule = make_schedule(model.config.schedule, model.config.steps)
        uneven = self.stage == "upsampler_256" and self.steps == 27
        grid = fast27_grid(schedule.steps) if uneven else strided_grid(schedule.steps, self.steps)

        def report(done: int, _: Tensor) -> None:
            self.progress(self.stage, done, self.steps)

        if self.sampler == "dpm":
            return dpm_solver(denoise, noise, log_snr_grid(schedule, self.steps), schedule, report)
        if self.sampler == "ddim":
            return ddim(denoise, noise, grid, schedule, callback=report)
        variance: str | Tensor = self.variance
        if self.sampler == "analytic" and isinstance(model, DiffusionPrior):
            variance = diffusion_prior_variance(model, grid)
        return ancestral(denoise, noise, grid, schedule, draw, variance, report)


def change_sampling(sampling: SamplingConfig, options: dict[str, object]) -> SamplingConfig:
    """``sampling`` with some fields replaced. Raises ValueError on an unknown one or a value out of range."""
    known = [known.name for known in fields(SamplingConfig)]
    unknown = options.keys() - set(known)
    if unknown:
        raise ValueError(f"unknown sampling options {sorted(unknown)}: the known ones are {', '.join(known)}")
    return replace(sampling, **options)  # type: ignore[arg-type]


def read_sampling(path: Path) -> SamplingConfig:
    """The sampling defaults in a JSON file, or the class's own where there is none. Raises ValueError as above."""
    if not path.is_file():
        return SamplingConfig()
    try:
        options = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}): mend or delete it") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds no sampling options but {options!r}: mend or delete it")
    return change_sampling(SamplingConfig(), options)
