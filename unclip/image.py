"""Images that know how they were drawn, and images as people have them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.data.pairs.decoding import open_image
from pipeline.sampling.recipe import ImageRecipe

ImageLike = Image.Image | np.ndarray | torch.Tensor | str | Path
"""An image: PIL's, an array or tensor uint8 [height, width, 3], a tensor [3, height, width], uint8 or in [0, 1], or the
path of a file that holds one."""


class DrawnImage(Image.Image):
    """A PIL image with its recipe, which ``save`` writes into PNG files.

    Images derived from it, such as by ``resize`` or ``copy``, have none.

    Attributes:
        recipe: Recipe of the image, for ``unclip.Model.redraw``.

    Examples:
        >>> seed = monster.recipe.seed
    """

    recipe: ImageRecipe

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """Writes the image as PIL's ``save`` does, with its recipe if the file is a PNG.

        Examples:
            >>> monster.save("monster.png")
        """
        if "recipe" in vars(self):  # not in what was unpickled
            info = PngInfo()
            for name, value in self.recipe.chunks().items():
                info.add_itxt(name, value)
            params = {"pnginfo": info, **params}
        super().save(fp, format, **params)


def drawn_image(pixels: np.ndarray, recipe: ImageRecipe) -> DrawnImage:
    """Returns pixels, uint8 [side, side, 3], as an image that carries its recipe."""
    image: Any = Image.fromarray(pixels)
    image.__class__ = DrawnImage
    image.recipe = recipe
    return image


def opened(given: ImageLike) -> Image.Image:
    """Returns an image as PIL's. Raises TypeError for what is none, UserError for a file that cannot be read."""
    image = _pixels_of(given) if isinstance(given, torch.Tensor) else given
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(image)
    if isinstance(image, str | Path):
        return open_image(Path(image))
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"an image is {kind_of(given)}: give PIL's, a path, an array uint8 [height, width, 3], or a tensor "
            "[3, height, width], uint8 or in [0, 1]"
        )
    return image


def _pixels_of(tensor: torch.Tensor) -> np.ndarray | torch.Tensor:
    """Returns a tensor as the array that ``opened`` takes; as it is, where its shape or its range is another."""
    pixels = tensor
    if tensor.ndim == 3 and tensor.shape[0] == 3:
        within = tensor.is_floating_point() and bool(((tensor >= 0) & (tensor <= 1)).all())
        pixels = (255 * tensor.float()).round().byte() if within else tensor
        pixels = pixels.permute(1, 2, 0) if pixels.dtype == torch.uint8 else tensor
    return pixels.cpu().numpy() if pixels.dtype == torch.uint8 else tensor  # numpy has no bf16


def opened_mask(mask: ImageLike) -> Image.Image:
    """Returns how opaque a mask is, white where it is wholly; see ``opened``."""
    if isinstance(mask, str | Path):
        return open_image(Path(mask), opacity=True)
    return Image.merge("RGB", [opened(mask).convert("RGBA").getchannel("A")] * 3)


def looks_like_a_file(text: str) -> bool:
    """Returns whether a caption names an image file."""
    return Path(text).suffix.lower() in Image.registered_extensions() or os.path.isfile(text)


def kind_of(value: object) -> str:
    """Returns how an error names a value: its type, and what else of an array matters."""
    if isinstance(value, np.ndarray | torch.Tensor):
        of = f"{type(value).__name__} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        return f"{of}, {value.min():g} to {value.max():g}" if "float" in of and 0 not in value.shape else of
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {', '.join(sorted({type(each).__name__ for each in value}))}"
    return "None" if value is None else f"{type(value).__name__} {value!r}"


def check_captions_given(captions: object) -> Sequence[str]:
    """Returns captions as a list. Raises TypeError for what is neither a text nor a list of texts."""
    if isinstance(captions, str):
        return [captions]
    if not isinstance(captions, Sequence) or not all(isinstance(each, str) for each in captions):
        raise TypeError(f"captions are {kind_of(captions)}: give a text, or a list of texts")
    return captions
