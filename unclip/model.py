"""A trained cascade with which a program draws: captions and images in, PIL images out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from operator import index
from pathlib import Path
from typing import Any, Self, Unpack, overload

import numpy as np
import torch
from PIL import Image

from jobs.bundles import Bundle, find_bundle
from models.cascade import UnCLIP
from models.random_streams import check_seeds
from models.sampling_config import SamplingConfig, own_names
from pipeline.data.pairs.image import MAX_BYTES
from pipeline.errors import UserError, did_you_mean
from pipeline.graph.device import choose_device
from pipeline.local import read_local
from pipeline.sampling.drawing import read_bundle
from pipeline.sampling.nearest import TrainingImage, TrainingImages
from pipeline.sampling.operations import BATCH, ProgressDisplay, draw_recipe, resolve_sampling, with_images
from pipeline.sampling.recipe import (
    ImageRecipe,
    Row,
    change_recipe,
    describe,
    read_recipe,
)
from unclip.image import (
    DrawnImage,
    ImageLike,
    check_captions_given,
    drawn_image,
    kind_of,
    looks_like_a_file,
    opened,
    opened_mask,
)
from unclip.options import Options


def load(path: str | Path | None = None, device: str = "auto") -> Model:
    """Opens trained models to draw with, on as many threads as torch has in this process.

    Args:
        path: A run's output folder, a project's YAML file, its release ("release:FILE"), a bundle's folder or zip, the
            address of a zip that ends in "#sha256=" and its hash, or "demo", the quick start's, which is fetched; by
            default the newest finished run under ``out/``.
        device: "cpu", "cuda", or "auto", which is a GPU where there is one.

    Raises:
        UserError: No bundle is finished, or the device does not exist.
        CorruptObject: A file of the bundle is damaged in its store.

    Examples:
        >>> model = unclip.load("out/nano", device="cpu")
    """
    return load_bundle(find_bundle(None if path is None else str(path)), device)


def load_bundle(bundle: Bundle, device: str) -> Model:
    """Opens the models of a bundle; see ``load``."""
    return Model(read_bundle(bundle.folder, choose_device(device)), bundle.key, cache(bundle.training))


class Model:
    """Draws, varies, interpolates, changes, inpaints and embeds, and finds the nearest training images.

    Methods that draw take sampling options by name, such as ``size=256`` or ``steps=50``, which apply to that call;
    ``sampling`` has all of them with their defaults. They raise ValueError for an unknown option, a value out of range,
    a seed below 0 and a caption that is too long, TypeError for an argument that is neither caption nor image. Images
    are PIL images, arrays uint8 [height, width, 3] or paths. ``progress`` is True for a line on stderr, False for
    silence, or a function that is called with a model's name, the finished steps and their total. Drawn images carry
    their recipe, which ``save`` writes into a PNG and ``redraw`` draws again.

    Attributes:
        cascade: Networks, with the same methods on tensors.
        bundle: Key of their bundle, for recipes; "" without one.
    """

    def __init__(self, cascade: UnCLIP, bundle: str = "", training: Callable[[], TrainingImages] | None = None):
        self.cascade, self.bundle, self._training = cascade, bundle, training

    @property
    def device(self) -> torch.device:
        """Returns the device of the networks."""
        return self.cascade.clip.mean.device

    @property
    def sampling(self) -> SamplingConfig:
        """Returns the default sampling options."""
        return self.cascade.sampling

    def to(self, device: str | torch.device) -> Self:
        """Moves all networks, in place, and returns itself. Raises UserError for a missing device.

        Examples:
            >>> model = model.to("cpu")
        """
        there = choose_device(str(device))
        parts = {name: part.to(there) for name, part in vars(self.cascade).items() if hasattr(part, "to")}
        self.cascade = replace(self.cascade, **parts)
        return self

    def replace(self, **parts: Any) -> Model:
        """Returns a model with other networks or sampling defaults, such as ``diffusion_prior=mine``.

        Networks are moved to its device, in place. Raises ValueError for unknown parts and incompatible networks.

        Examples:
            >>> mine = model.replace(diffusion_prior=unclip.load("out/nano").cascade.diffusion_prior)
        """
        if unknown := parts.keys() - vars(self.cascade).keys():
            raise ValueError(f"{min(unknown)}: unknown part{did_you_mean(min(unknown), vars(self.cascade))}")
        there = {name: part.to(self.device) if hasattr(part, "to") else part for name, part in parts.items()}
        return Model(replace(self.cascade, **there))

    def save(self, folder: str | Path) -> None:
        """Writes a bundle that ``load`` opens. Raises FileExistsError for a folder that is not empty.

        Examples:
            >>> model.save("my-bundle")
        """
        self.cascade.save(folder)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts to a type checker
        self,
        captions: str,
        seed: int = 0,
        *,
        batch: int = BATCH,
        progress: ProgressDisplay = True,
        **options: Unpack[Options],
    ) -> DrawnImage: ...

    @overload
    def generate(
        self,
        captions: str,
        seed: Sequence[int],
        *,
        batch: int = BATCH,
        progress: ProgressDisplay = True,
        **options: Unpack[Options],
    ) -> list[DrawnImage]: ...

    @overload
    def generate(
        self,
        captions: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        *,
        n: int,
        batch: int = BATCH,
        progress: ProgressDisplay = True,
        **options: Unpack[Options],
    ) -> list[DrawnImage]: ...

    @overload
    def generate(
        self,
        captions: Sequence[str],
        seed: int | Sequence[int] = 0,
        *,
        batch: int = BATCH,
        progress: ProgressDisplay = True,
        **options: Unpack[Options],
    ) -> list[DrawnImage]: ...

    def generate(
        self,
        captions: Any,
        seed: Any = 0,
        *,
        n: Any = None,
        batch: int = BATCH,
        progress: ProgressDisplay = True,
        **options: Any,
    ) -> Any:
        """Draws captions. Up to rounding, an image depends only on its caption, its seed and the options.

        Args:
            captions: Caption, or a list of captions.
            seed: Seed of the first image, image i uses seed + i; or a list of seeds, one for each image. One caption
                with several seeds makes as many images.
            n: Number of images per caption.
            batch: Number of images drawn at once.
            progress: Progress line on stderr, or a function of model name, step and number of steps.
            options: Sampling options, such as ``steps=50``.

        Returns:
            An image for one caption with one seed and no ``n``, otherwise a list.

        Examples:
            >>> monster = model.generate("a square yellow monster", seed=7, size=64)
            >>> cactus, planet = model.generate(["a cactus", "a planet"], size=64, progress=False)
        """
        own = own_names({**options, **({} if n is None else {"n": n})})
        seed = own.pop("seed", seed)
        seed = seed.tolist() if isinstance(seed, np.ndarray | torch.Tensor) else seed
        several = isinstance(seed, Sequence)
        alone = isinstance(captions, str) and "n" not in own
        captions = check_captions_given(captions)
        recipe = describe("draw", own, caption="")
        captions = [each for each in captions for _ in range(len(seed) if alone and several else recipe.n)]
        check_seeds(seed if several else [seed])
        seeds = [index(each) for each in seed] if several else range(index(seed), index(seed) + len(captions))
        if len(seeds) != len(captions):
            raise ValueError(f"got {len(captions)} captions and {len(seeds)} seeds: give one seed for each")
        rows = [Row(caption, seed) for caption, seed in zip(captions, seeds, strict=True)]
        images = self._draw(recipe, [], progress, batch, rows)
        return images[0] if alone and not several else images

    __call__ = generate

    def vary(
        self,
        image: ImageLike,
        n: int = 4,
        eta: float = 1.0,
        caption: str | None = None,
        seed: int = 0,
        progress: ProgressDisplay = True,
        **options: Unpack[Options],
    ) -> list[DrawnImage]:
        """Returns ``n`` variations of an image, with the same embedding (section 3.1 of the paper).

        ``eta`` ranges from 0, a reconstruction, to 1, the freest variation. The caption is a condition for the decoder.

        Examples:
            >>> others = model.vary(monster, n=2, size=64)
        """
        recipe = self._asked("vary", {"n": n, "seed": seed}, options, eta=eta, caption=caption)
        return self._draw(recipe, [opened(image)], progress)

    def interpolate(
        self,
        first: ImageLike,
        second: ImageLike,
        n: int = 9,
        seed: int = 0,
        progress: ProgressDisplay = True,
        **options: Unpack[Options],
    ) -> list[DrawnImage]:
        """Returns ``n`` images from one image to another, both ends included and reconstructed (section 3.2).

        Examples:
            >>> between = model.interpolate(cactus, planet, n=3, size=64)
        """
        if (given := own_names({**options})).get("n", n) < 2:
            raise ValueError(f"an interpolation takes 2 or more images, got {given.get('n', n)}")
        recipe = self._asked("interpolate", {"n": n, "seed": seed}, options, shares=(0.0, 1.0))
        return self._draw(recipe, [opened(first), opened(second)], progress)

    def change(
        self,
        image: ImageLike,
        before: str,
        after: str,
        n: int = 6,
        strength: float = 0.5,
        shares: Sequence[float] = (),
        seed: int = 0,
        progress: ProgressDisplay = True,
        **options: Unpack[Options],
    ) -> list[DrawnImage]:
        """Returns an image moved along the difference of two captions' embeddings (section 3.3).

        ``n`` images go from the image itself to the fraction ``strength`` of the rotation, or one to each of
        ``shares``.

        Examples:
            >>> crowned = model.change(monster, "a monster with horns", "a monster with a crown", n=3, size=64)
        """
        given = {"shares": tuple(shares)} if shares else {"n": n, "strength": strength}
        words = {"before": before, "caption": after, "shares": (1.0,)}
        recipe = self._asked("change", {**given, "seed": seed}, options, **words)
        return self._draw(recipe, [opened(image)], progress)

    def inpaint(
        self,
        image: ImageLike,
        mask: ImageLike,
        caption: str,
        n: int = 1,
        seed: int = 0,
        progress: ProgressDisplay = True,
        **options: Unpack[Options],
    ) -> list[DrawnImage]:
        """Returns ``n`` versions of an image, redrawn where the mask is transparent; ``caption`` describes the whole.

        Examples:
            >>> mask = PIL.Image.new("RGBA", monster.size)  # transparent everywhere
            >>> hats = model.inpaint(monster, mask, "a monster with a hat", size=64)
        """
        recipe = self._asked("inpaint", {"n": n, "seed": seed}, options, caption=caption)
        return self._draw(recipe, [opened(image), opened_mask(mask)], progress)

    def nearest(self, image: ImageLike, n: int = 8) -> list[TrainingImage]:
        """Returns the ``n`` training images nearest to an image by CLIP, nearest first, with licence and attribution.

        Raises UserError if the models' training images are unknown.

        Examples:
            >>> captions = [found.caption for found in model.nearest(monster, n=4)]
        """
        if self._training is None:
            raise UserError(
                "these models do not come from a bundle, so their training images are unknown; load one with "
                "unclip.load"
            )
        return self._training().nearest(self.embed([opened(image)]), n)

    def redraw(
        self,
        image: DrawnImage | str | Path,
        given: Sequence[ImageLike] = (),
        progress: ProgressDisplay = True,
        **changes: Any,
    ) -> list[DrawnImage]:
        """Returns a recipe's images, one or several, drawn again: up to rounding the same, if the models are.

        Args:
            image: Image that was drawn here, or the path of a PNG.
            given: Input images of its operation, in order.
            progress: Progress line on stderr, or a function, as ``generate`` takes it.
            changes: Sampling options, ``caption``, ``seed`` or ``n`` that replace the recipe's.

        Raises:
            UserError: The file has no recipe, or cannot be read.

        Examples:
            >>> [again] = model.redraw(monster, seed=8)
        """
        recipe = (
            image.recipe if isinstance(image, DrawnImage) else read_recipe(read_local(image, MAX_BYTES), str(image))
        )
        recipe = change_recipe(recipe, changes)
        masked = recipe.operation == "inpaint"
        return self._draw(
            recipe, [(opened_mask if masked and i else opened)(one) for i, one in enumerate(given)], progress
        )

    def _asked(self, operation: str, given: dict[str, Any], options: Any, **fields: Any) -> ImageRecipe:
        check_seeds([given["seed"]])
        return describe(operation, {**given, **own_names(dict(options))}, **fields)

    def _draw(
        self,
        recipe: ImageRecipe,
        images: list[Image.Image],
        progress: ProgressDisplay,
        batch: int = BATCH,
        rows: Sequence[Row] | None = None,
    ) -> list[DrawnImage]:
        made = draw_recipe(self.cascade, recipe, images, progress, batch, rows)
        done = with_images(recipe.drawn(asdict(resolve_sampling(self.cascade, recipe)), self.bundle), images)
        rows = recipe.rows if rows is None else rows
        return [drawn_image(pixels, done.of(row)) for row, pixels in zip(rows, made, strict=True)]

    def embed(self, what: ImageLike | Sequence[str] | Sequence[ImageLike]) -> np.ndarray:
        """Returns CLIP's embeddings of captions or images, unit norm: fp32 [d] for one, [n, d] for a list.

        ``a @ b.T`` are their cosines. A str is a caption, so pass an image file as a Path. Raises ValueError for a str
        that names an image file, and for captions and images in one list.

        Examples:
            >>> cosines = model.embed([monster, cactus]) @ model.embed(["a monster", "a cactus"]).T
        """
        single = isinstance(what, str | Path | Image.Image) or getattr(what, "ndim", 4) < 4  # of an array or tensor
        if not single and not isinstance(what, Sequence | np.ndarray | torch.Tensor):
            raise TypeError(f"embed takes captions or images, or a list of either, not {kind_of(what)}")
        several: list[Any] = [what] if single else list(what)  # type: ignore[arg-type]
        captions = [each for each in several if isinstance(each, str)]
        if captions and len(captions) < len(several):
            raise ValueError("this list has captions and images: call embed once for each kind")
        for caption in captions:
            if looks_like_a_file(caption):
                raise ValueError(
                    f"{caption!r} looks like a file, but a str is read as a caption: embed(Path({caption!r})) embeds "
                    "the image; end a caption with a full stop"
                )
        with torch.no_grad():
            if len(captions) == len(several):
                found = self.cascade.clip.encode_text(self.cascade.clip.tokenize(several).to(self.device))
            else:
                found = self.cascade.embed([opened(each) for each in several])
        vectors = found.cpu().numpy()
        return vectors[0] if single else vectors

    def __repr__(self) -> str:
        parts = [(name, part) for name, part in vars(self.cascade).items() if isinstance(part, torch.nn.Module)]
        lines = [f"  {name:16}{sum(p.numel() for p in part.parameters()):>15,} parameters" for name, part in parts]
        return "\n".join([f"unclip.Model, draws {self.sampling.size} px on {self.device}", *lines])
