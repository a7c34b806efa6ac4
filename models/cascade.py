"""The whole generator: captions to image embeddings to images of 64, 256 and 1024 px, and changed images.

A prior draws several embeddings and the best is kept; then come the decoder and two upsamplers, each of which gets a
slightly damaged image, as in training (docs/how/bundle.md). Sections are those of Ramesh et al. 2022.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Self, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.ar_prior import ARPrior
from models.ar_prior import sample as sample_codes
from models.clip import Clip
from models.codec import Codec
from models.decoder import Decoder, decoder_denoise
from models.diffusion.samplers import ddim_inversion
from models.diffusion.schedules import make_schedule
from models.diffusion_prior import DiffusionPrior, best_of, diffusion_prior_denoise
from models.folder import load_codec, load_model, save_codec, save_model
from models.inpainting import KnownRegion
from models.manipulation import Inversion, check_embedding, first_components, slerp, text_difference
from models.pixels import from_uint8, to_uint8
from models.precision import autocast
from models.random_streams import RandomStreams, check_seeds, derive_seed
from models.reverse import Progress, ReverseProcess, sampling_grid, silent
from models.sampling_config import (
    MODELS,
    PRIORS,
    UPSAMPLERS,
    SamplingConfig,
    own_names,
    read_sampling,
    sampling_for,
    write_sampling,
)
from models.tokens import prompt_tokens, text_context
from models.upsampler import Upsampler, sampling_low, upsampler_denoise
from models.view import view

OPTIONAL = tuple(name for name in MODELS if name != "decoder")


@dataclass(frozen=True)
class Generation:
    """Holds the ``embedding`` of captions, unit norm, fp32 [b, d], and their ``images`` by side in pixels.

    Images are uint8 [b, side, side, 3], on the CPU.
    """

    embedding: Tensor
    images: dict[int, Tensor]

    @property
    def image(self) -> Tensor:
        """Returns the largest images."""
        return self.images[max(self.images)]


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
        for name, kind in get_type_hints(type(self)).items():
            if not isinstance(part := getattr(self, name), kind):
                said = str(kind) if isinstance(kind, UnionType) else kind.__name__
                raise ValueError(f"{name} is a {type(part).__name__}: give a {said.split(' | ')[0].split('.')[-1]}")
        if self.diffusion_prior is None and self.ar_prior is None:
            raise ValueError("a prior is missing: add diffusion_prior or ar_prior")
        if self.upsampler_1024 is not None and self.upsampler_256 is None:
            raise ValueError("upsampler_1024 has nothing to enlarge: add upsampler_256")
        for name in ("decoder", *PRIORS.values()):
            if (model := getattr(self, name)) is not None and model.embed_dim != self.clip.embed_dim:
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
        """Loads a bundle: a folder with a subfolder for each model, named as the fields are, and sampling.json.

        clip, decoder and a prior must be there. Raises FileNotFoundError when they are not, ValueError when something
        is damaged or does not belong together.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: name a bundle, as the bundle stage or a release makes")
        models = {name: load_model(folder / name, device) for name in OPTIONAL if (folder / name).is_dir()}
        return cls(
            clip=Clip.from_folder(folder / "clip").to(device),
            decoder=load_model(folder / "decoder", device),
            codec=load_codec(folder / "codec", device) if (folder / "codec").is_dir() else None,
            sampling=read_sampling(folder),
            **models,
        )

    def save(self, path: str | Path) -> None:
        """Writes a bundle that ``from_folder`` opens as the same generator.

        Raises FileExistsError when the folder is not empty: parts of another bundle would stay in it.
        """
        folder = Path(path)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty: name a new folder for the bundle")
        self.clip.save(folder / "clip")
        for name in ("decoder", *OPTIONAL):
            if (model := getattr(self, name)) is not None:
                save_model(folder / name, model)
        if self.codec is not None:
            save_codec(folder / "codec", self.codec)
        write_sampling(folder, self.sampling)

    def upsamplers(self, size: int) -> dict[str, Upsampler]:
        """Returns the upsamplers up to images of ``size`` pixels, by name, the smallest first."""
        models = {name: getattr(self, name) for name in UPSAMPLERS}
        return {name: model for name, model in models.items() if model and model.config.image_size <= size}

    @torch.no_grad()
    def generate(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        progress: Progress = silent,
        known: KnownRegion | None = None,
        **options: object,
    ) -> Generation:
        """Makes one image for each caption from its own seed, all of it or the part of an image that is not ``known``.

        ``options`` replace single fields of ``sampling``. An image depends on its caption, its seed and the options,
        and not on the rest of the batch beyond rounding. Stops at the last upsampler there is. Raises ValueError on
        captions and seeds of different number, a caption that is too long, a seed below 0, and an option out of range.
        """
        if len(captions) != len(seeds) or not captions:
            raise ValueError(f"got {len(captions)} captions and {len(seeds)} seeds: give one seed for each caption")
        sampling = self.sampling_with(options)
        tokens = self._tokens(captions)
        embedding = self.draw_embedding(tokens, self._text(captions), seeds, sampling, progress)
        return self.decode(embedding, tokens, seeds, sampling, progress, known=known)

    def draw_embedding(
        self, tokens: Tensor, text: Tensor, seeds: Sequence[int], sampling: SamplingConfig, progress: Progress = silent
    ) -> Tensor:
        """Returns the best of several image embeddings that the prior draws for each caption, unit norm, fp32 [b, d].

        ``tokens`` [b, 77] and ``text``, CLIP's embeddings [b, d], are of the same captions.
        """
        repeats = sampling.candidates  # each with a seed of its own: no image depends on the rest of its batch
        streams = [(derive_seed(seed, "prior", i), 1) for i in range(repeats) for seed in seeds]
        rng = RandomStreams(streams, text.device)
        draw_samples = self._draw_diffusion if sampling.prior == "diffusion" else self._draw_ar
        with autocast(text.device, sampling.precision):
            samples = draw_samples(tokens.repeat(repeats, 1), text.repeat(repeats, 1), rng, sampling, progress)
        return best_of(samples.unflatten(0, (repeats, len(seeds))), text)

    def _draw_diffusion(
        self, tokens: Tensor, text: Tensor, rng: RandomStreams, sampling: SamplingConfig, progress: Progress
    ) -> Tensor:
        model = self.diffusion_prior
        if model is None:
            raise ValueError("this bundle has no diffusion_prior: use prior 'ar'")
        denoise = diffusion_prior_denoise(model, tokens, text, sampling.prior_guidance)
        noise = rng.normal("x_T", model.embed_dim)
        run = ReverseProcess("diffusion_prior", sampling.prior_sampler, "small", sampling.prior_steps, progress)
        return model.image_embedding(run(model, denoise, noise, rng))

    def _draw_ar(
        self, tokens: Tensor, text: Tensor, rng: RandomStreams, sampling: SamplingConfig, progress: Progress
    ) -> Tensor:
        model, codec = self.ar_prior, self.codec
        if model is None or codec is None:
            raise ValueError("this bundle has no ar_prior: use prior 'diffusion'")
        codes = sample_codes(
            model,
            tokens,
            text,
            codec.sample_upper_dot(rng),
            rng,
            temperature=sampling.temperature,
            guidance=sampling.prior_guidance,
            callback=lambda done: progress("ar_prior", done, model.codes),
        )
        return model.image_embedding(codes, codec, tokens, text)

    @torch.no_grad()
    def decode(
        self,
        embedding: Tensor,
        tokens: Tensor | None,
        seeds: Sequence[int],
        sampling: SamplingConfig,
        progress: Progress = silent,
        noise: Tensor | None = None,
        eta: float = 0.0,
        known: KnownRegion | None = None,
    ) -> Generation:
        """Draws images of embeddings [b, d], of unit norm, and of tokens [b, 77] or no captions.

        ``seeds`` are as many as embeddings. ``noise`` [b, 3, s, s] is the decoder's x_T in place of their own; ``eta``
        belongs to its "ddim" sampler. ``known`` stays. Raises ValueError on unfit embeddings and seeds.
        """
        check_embedding(embedding, self.clip.embed_dim)
        check_seeds(seeds)
        rng = RandomStreams([(derive_seed(seed, "decoder"), 1) for seed in seeds], embedding.device)
        config, inverted = self.decoder.config, noise is not None
        guided = (sampling.decoder_guidance, sampling.decoder_guidance_interval, sampling.decoder_threshold)
        denoise = decoder_denoise(self.decoder, embedding, tokens, *guided)
        noise = rng.normal("x_T", 3, config.image_size, config.image_size) if noise is None else noise
        steps = sampling.decoder_steps
        run = ReverseProcess("decoder", sampling.decoder_sampler, "learned", steps, progress, eta, inverted, known)
        with autocast(embedding.device, sampling.precision):
            image = run(self.decoder, denoise, noise, rng)
        images = {config.image_size: image}
        for name, model in self.upsamplers(sampling.size).items():
            # Under the decoder's seed the purpose "x_T" would give the decoder's own numbers again.
            rng = RandomStreams([(derive_seed(seed, name), 1) for seed in seeds], embedding.device)
            low = sampling_low(model.config, image.clamp(-1, 1), rng)
            noise = rng.normal("x_T", 3, model.config.image_size, model.config.image_size)
            run = ReverseProcess(name, "ddim", "small", getattr(sampling, f"{name}_steps"), progress, known=known)
            with autocast(embedding.device, sampling.precision):
                image = run(model, upsampler_denoise(model, low, sampling.tile), noise, rng)
            images[model.config.image_size] = image
        return Generation(embedding, {side: to_uint8(x).permute(0, 2, 3, 1).cpu() for side, x in images.items()})

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns z_i of each image, by CLIP: unit norm, fp32 [b, d]."""
        return self.clip.encode_image(self._views(images, self.clip.image_size))

    @torch.no_grad()
    def invert(
        self,
        images: Sequence[Image.Image],
        captions: Sequence[str] | None = None,
        progress: Progress = silent,
        **options: object,
    ) -> Inversion:
        """Returns the two latents of each image, z_i by CLIP and x_T by DDIM inversion of the decoder (section 3).

        ``captions`` condition the decoder and stay with the latents. Raises ValueError if they are not one an image.
        """
        sampling = self.manipulation_sampling(options)
        if captions is not None and len(captions) != len(images):
            raise ValueError(f"got {len(images)} images and {len(captions)} captions: give one for each")
        tokens = None if captions is None else self._tokens(captions)
        config = self.decoder.config
        embedding, x0 = self.embed(images), self._views(images, config.image_size)
        guided = (sampling.decoder_guidance, sampling.decoder_guidance_interval, sampling.decoder_threshold)
        denoise = decoder_denoise(self.decoder, embedding, tokens, *guided)
        schedule, steps = make_schedule(config.schedule, config.steps), sampling.decoder_steps

        def report(done: int, _: Tensor) -> None:
            progress("inversion", done, steps)

        grid = sampling_grid("decoder", self.decoder, steps, inverted=True)
        with autocast(embedding.device, sampling.precision):
            noise = ddim_inversion(denoise, from_uint8(x0), grid, schedule, report)
        return Inversion(embedding, noise, tokens)

    def reconstruct(
        self, inversion: Inversion, seed: int = 0, progress: Progress = silent, **options: object
    ) -> Generation:
        """Reconstructs the images of these latents, by DDIM with eta 0 (section 3). ``seed`` is the upsamplers'."""
        return self.variations(inversion, [seed] * len(inversion), 0.0, progress, **options)

    def variations(
        self,
        inversion: Inversion,
        seeds: Sequence[int],
        eta: float = 1.0,
        progress: Progress = silent,
        **options: object,
    ) -> Generation:
        """Draws other images of the same embedding, from the same x_T, by DDIM with ``eta`` above 0 (section 3.1).

        One image becomes as many as there are seeds; several take a seed each. With eta 0 nothing changes, with 1
        most does. Raises ValueError on an eta below 0 or above 1.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}: use 0 for the image itself, up to 1 for variations")
        many, sampling = inversion.repeated(len(seeds)), self.manipulation_sampling(options)
        return self.decode(many.embedding, many.tokens, seeds, sampling, progress, many.noise, eta)

    def interpolate(
        self,
        first: Inversion,
        second: Inversion,
        shares: Sequence[float],
        seed: int = 0,
        progress: Progress = silent,
        **options: object,
    ) -> Generation:
        """Draws images at these shares of the way, both latents interpolated spherically (section 3.2).

        A share of 0 is the first image, reconstructed, and 1 the second. Captions are left out.
        """
        a, b = first.repeated(len(shares)), second.repeated(len(shares))
        share = torch.tensor(list(shares), device=a.embedding.device)
        between = Inversion(slerp(a.embedding, b.embedding, share), slerp(a.noise, b.noise, share))
        return self.variations(between, [seed] * len(shares), 0.0, progress, **options)

    @torch.no_grad()
    def text_difference(
        self,
        inversion: Inversion,
        before: str,
        after: str,
        shares: Sequence[float],
        seed: int = 0,
        progress: Progress = silent,
        **options: object,
    ) -> Generation:
        """Draws the image with its embedding turned by a share towards ``after`` minus ``before`` (section 3.3).

        The paper goes up to 0.25 to 0.5. x_T stays, and captions are left out. Where a prior has a ridge regression,
        the difference is between the image embeddings that it predicts. Raises ValueError on captions alike.
        """
        tokens, ends = self._tokens([before, after]), self._text([before, after])
        priors, shown = (self.diffusion_prior, self.ar_prior), torch.ones_like(tokens[:, 0], dtype=torch.bool)
        # Text embeddings differ along directions that no image embedding has, and the decoder has seen images only.
        regressed = [prior.regress(tokens, ends, shown) for prior in priors if prior is not None]
        ends = next((embedding for embedding in regressed if embedding is not None), ends)
        towards = text_difference(ends[:1], ends[1:]).expand(len(shares), -1)
        many = inversion.repeated(len(shares))
        turned = slerp(many.embedding, towards, torch.tensor(list(shares), device=towards.device))
        return self.variations(Inversion(turned, many.noise), [seed] * len(shares), 0.0, progress, **options)

    def principal_components(
        self,
        embedding: Tensor,
        counts: Sequence[int],
        seed: int = 0,
        progress: Progress = silent,
        **options: object,
    ) -> Generation:
        """Draws an embedding [1, d] from its first principal components, all from one noise (section 4).

        Raises ValueError without a codec, and on more components than it has.
        """
        if self.codec is None:
            raise ValueError("this bundle has no codec, which holds the principal components: train an ar_prior, too")
        parts = torch.cat([first_components(self.codec, embedding, count) for count in counts])
        return self.decode(parts, None, [seed] * len(counts), self.manipulation_sampling(options), progress)

    def manipulation_sampling(self, options: dict[str, object]) -> SamplingConfig:
        """Returns sampling options for changing images: DDIM, and unless ``options`` set them no guidance or threshold.

        Raises ValueError as ``sampling_with`` does, and for another sampler of the decoder.
        """
        # Inversion assumes a prediction that hardly changes within a step: guidance and thresholding change it more.
        plain: dict[str, object] = {"decoder_guidance": 0.0, "decoder_threshold": 0.0, "decoder_sampler": "ddim"}
        sampling = self.sampling_with(plain | own_names(options))
        if sampling.decoder_sampler != "ddim":
            raise ValueError(f"decoder_sampler is {sampling.decoder_sampler!r}: images are changed by 'ddim' alone")
        return sampling

    def sampling_with(self, options: dict[str, object]) -> SamplingConfig:
        """Returns ``sampling`` with options, which may have the names of OTHER_NAMES; see ``sampling_for``.

        Raises ValueError on an unknown one, a value out of range and one that these models cannot take.
        """
        configs = {name: model.config for name in MODELS if (model := getattr(self, name)) is not None}
        return sampling_for(self.sampling, options, configs)

    def _views(self, images: Sequence[Image.Image], side: int) -> Tensor:
        """Returns uint8 [b, 3, side, side]."""
        views = torch.from_numpy(np.stack([view(image, side) for image in images]))
        return views.permute(0, 3, 1, 2).to(self.clip.mean.device)

    def _tokens(self, captions: Sequence[str]) -> Tensor:
        return prompt_tokens(captions, text_context(self)).to(self.clip.mean.device)

    def _text(self, captions: Sequence[str]) -> Tensor:
        """Returns CLIP's embeddings of captions, fp32 [b, d]."""
        return self.clip.encode_text(self.clip.tokenize(captions).to(self.clip.mean.device))
