"""A trained cascade with which a program draws: captions and images in, PIL images out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import torch
from PIL import Image

from jobs.bundles import find_bundle
from models.cascade import UnCLIP
from models.random_streams import check_seeds
from models.sampling_config import SamplingConfig
from pipeline.data.pairs.decoding import open_image
from pipeline.sampling import edits
from pipeline.sampling.drawing import prior_steps, read_bundle
from pipeline.sampling.edits import ProgressDisplay, show_progress
from pipeline.training.device import choose_device

ImageLike = Image.Image | np.ndarray | str | Path
"""An image: PIL's, an array uint8 [height, width, 3], or the path of a file that holds one."""


def load(path: str | Path | None = None, device: str = "auto") -> Model:
    """Opens trained models to draw with, on as many threads as torch has in this process.

    Args:
        path: A run's output folder, a project's YAML file, its release ("release:FILE"), or a bundle's folder; by
            default the newest finished run under ``out/``.
        device: "cpu", "cuda", or "auto", which is a GPU where there is one.

    Raises:
        UserError: No bundle is finished, or the device does not exist.
        CorruptObject: A file of the bundle is damaged in its store.
    """
    folder = find_bundle(None if path is None else str(path)).folder
    return Model(read_bundle(folder, choose_device(device)))


class Model:
    """Draws, varies, interpolates and embeds.

    Methods that draw take sampling options by name, for that call alone, such as ``size=256`` or ``decoder_steps=50``;
    ``sampling`` has all of them with their defaults. They raise ValueError for an unknown option, one that is out of
    range, a seed below 0 and a caption that is too long, TypeError for what is neither caption nor image. Images are
    given as PIL images, as arrays uint8 [height, width, 3] or as paths. ``progress`` is True for a line
    on stderr, False for nothing, or a function that is called with a model's name, the steps done and their number.

    Attributes:
        cascade: The networks, and the same calls on tensors.
    """

    def __init__(self, cascade: UnCLIP):
        self.cascade = cascade

    @property
    def device(self) -> torch.device:
        """Returns the device that it computes on."""
        return self.cascade.clip.mean.device

    @property
    def sampling(self) -> SamplingConfig:
        """Returns the sampling options that hold where a call names none."""
        return self.cascade.sampling

    def to(self, device: str | torch.device) -> Self:
        """Moves all networks, in place, and returns itself. Raises UserError for a device that is not there."""
        there = choose_device(str(device))
        parts = {name: part.to(there) for name, part in vars(self.cascade).items() if hasattr(part, "to")}
        self.cascade = replace(self.cascade, **parts)
        return self

    def replace(self, **parts: Any) -> Model:
        """Returns a model with other networks or sampling defaults, such as ``diffusion_prior=mine``.

        Networks are moved to its device, in place. Raises ValueError for those that do not belong together.
        """
        there = {name: part.to(self.device) if hasattr(part, "to") else part for name, part in parts.items()}
        return Model(replace(self.cascade, **there))

    def save(self, folder: str | Path) -> None:
        """Writes a bundle that ``load`` opens. Raises FileExistsError for a folder that is not empty."""
        self.cascade.save(folder)

    @overload
    def generate(self, captions: str, seeds: int | None = None, **options: Any) -> Image.Image: ...

    @overload
    def generate(self, captions: str, seeds: Sequence[int], **options: Any) -> list[Image.Image]: ...

    @overload
    def generate(
        self, captions: Sequence[str], seeds: int | Sequence[int] | None = None, **options: Any
    ) -> list[Image.Image]: ...

    def generate(
        self,
        captions: str | Sequence[str],
        seeds: int | Sequence[int] | None = None,
        batch: int = 8,
        progress: ProgressDisplay = True,
        **options: Any,
    ) -> Image.Image | list[Image.Image]:
        """Draws captions. An image depends on its caption, its seed and the options alone, beyond rounding.

        Args:
            captions: Caption, or a list of captions.
            seeds: Seeds, one for each image; a number is the first of consecutive ones, 0 by default. One caption with
                several seeds gives as many images.
            batch: Number of images that are drawn at once.
            progress: Progress line on stderr, or a function that is called after every step with the model's name, the
                steps done and all steps.
            options: Sampling options, such as ``decoder_steps=50``.

        Returns:
            An image for one caption with one seed, else a list.
        """
        if isinstance(seeds, np.ndarray | torch.Tensor):
            seeds = seeds.tolist()
        single = isinstance(captions, str) and not isinstance(seeds, Sequence)
        if isinstance(captions, str):
            captions = [captions] * (len(seeds) if isinstance(seeds, Sequence) else 1)
        elif not isinstance(captions, Sequence) or not all(isinstance(each, str) for each in captions):
            raise TypeError(f"captions are {_kind(captions)}: give a text, or a list of texts")
        if not isinstance(seeds, Sequence):
            check_seeds([seeds or 0])
            seeds = range(seeds or 0, (seeds or 0) + len(captions))
        check_seeds(seeds)
        if len(seeds) != len(captions):
            raise ValueError(f"got {len(captions)} captions and {len(seeds)} seeds: give one seed for each")
        sampling = self.cascade.sampling_with(dict(options))
        starts = range(0, len(captions), batch)
        steps = len(starts) * prior_steps(self.cascade, asdict(sampling), sampling.prior)
        images: list[Image.Image] = []
        with show_progress("drawing", self.cascade, sampling, progress, decodings=len(starts), more=steps) as watch:
            for start in starts:
                part = slice(start, start + batch)
                images += _pil(self.cascade.generate(captions[part], seeds[part], watch, **options).image.numpy())
        return images[0] if single else images

    __call__ = generate

    def vary(
        self,
        image: ImageLike,
        count: int = 4,
        eta: float = 1.0,
        caption: str | None = None,
        seed: int = 0,
        progress: ProgressDisplay = True,
        **options: Any,
    ) -> list[Image.Image]:
        """Returns ``count`` other images with the meaning of an image (section 3.1 of the paper).

        ``eta`` is from 0, the image reconstructed, to 1, the freest. A caption tells the decoder what is in the image.
        """
        made = edits.variations(
            self.cascade, _opened(image), count, eta, caption, edits.EditSettings(seed, options, progress)
        )
        return _pil(made.images[1:])

    def interpolate(
        self,
        first: ImageLike,
        second: ImageLike,
        count: int = 9,
        seed: int = 0,
        progress: ProgressDisplay = True,
        **options: Any,
    ) -> list[Image.Image]:
        """Returns ``count`` images from one image to another, both ends included and reconstructed (section 3.2)."""
        ends = _opened(first), _opened(second)
        return _pil(edits.interpolation(self.cascade, *ends, count, edits.EditSettings(seed, options, progress)).images)

    def change(
        self,
        image: ImageLike,
        before: str,
        after: str,
        shares: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
        seed: int = 0,
        progress: ProgressDisplay = True,
        **options: Any,
    ) -> list[Image.Image]:
        """Returns an image turned by each share towards what ``after`` says beyond ``before`` (section 3.3)."""
        whole = _opened(image)
        return _pil(
            edits.text_difference(
                self.cascade, whole, before, after, shares, edits.EditSettings(seed, options, progress)
            ).images
        )

    def embed(self, what: ImageLike | Sequence[str] | Sequence[ImageLike]) -> np.ndarray:
        """Returns CLIP's embeddings of captions or images, unit norm: fp32 [d] of one, [n, d] of a list.

        ``a @ b.T`` are their cosines. A str is a caption, so an image file is given as a Path. Raises ValueError for a
        str that names an image file, and for captions and images in one list.
        """
        single = isinstance(what, str | Path | Image.Image) or (isinstance(what, np.ndarray) and what.ndim < 4)
        if not single and not isinstance(what, Sequence | np.ndarray):
            raise TypeError(f"embed takes captions or images, or a list of either, not {_kind(what)}")
        several: list[Any] = [what] if single else list(what)  # type: ignore[arg-type]
        captions = [each for each in several if isinstance(each, str)]
        if captions and len(captions) < len(several):
            raise ValueError("this list has captions and images: call embed once for each kind")
        for caption in captions:
            if Path(caption).suffix.lower() in Image.registered_extensions() or os.path.isfile(caption):
                raise ValueError(
                    f"{caption!r} looks like a file, and a str is a caption: embed(Path({caption!r})) embeds the "
                    "image; for the words, end them with a full stop"
                )
        with torch.no_grad():
            if len(captions) == len(several):
                found = self.cascade.clip.encode_text(self.cascade.clip.tokenize(several).to(self.device))
            else:
                found = self.cascade.embed([_opened(each) for each in several])
        vectors = found.cpu().numpy()
        return vectors[0] if single else vectors

    def __repr__(self) -> str:
        parts = [(name, part) for name, part in vars(self.cascade).items() if isinstance(part, torch.nn.Module)]
        lines = [f"  {name:16}{sum(p.numel() for p in part.parameters()):>15,} parameters" for name, part in parts]
        return "\n".join([f"unclip.Model, draws {self.sampling.size} px on {self.device}", *lines])


def _pil(images: Iterable[np.ndarray]) -> list[Image.Image]:
    """Returns images uint8 [s, s, 3] as PIL's."""
    return [Image.fromarray(image) for image in images]


def _opened(image: ImageLike) -> Image.Image:
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(image)
    if isinstance(image, str | Path):
        return open_image(Path(image))
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"an image is {_kind(image)}: give PIL's, a path, or an array uint8 [height, width, 3], which a tensor "
            "[3, height, width] from 0 to 1 becomes by (255 * tensor).round().byte().permute(1, 2, 0).cpu().numpy()"
        )
    return image


def _kind(value: object) -> str:
    """Returns how an error names a value: its type, and what else of an array matters."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"{type(value).__name__} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {', '.join(sorted({type(each).__name__ for each in value}))}"
    return "None" if value is None else f"{type(value).__name__} {value!r}"
