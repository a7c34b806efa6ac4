"""The recipe of an image: what commands, Python, HTTP and the page make their words from. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

from models.sampling_config import SamplingConfig, change_sampling, own_names
from pipeline.errors import UserError, did_you_mean
from pipeline.parse import parse

if TYPE_CHECKING:
    from PIL.Image import Image

CHARACTERS = 4000  # of a caption; the tokenizer's own limit is lower and is said in tokens
LARGEST_SEED = 2**53  # what JavaScript counts to exactly
MOST = 1000  # images of a recipe, and image embeddings of each
SIZES = (64, 256, 512, 1024)  # px; what no model makes is drawn larger and made smaller
DRAWN = (64, 256, 1024)  # px, of these
CHUNKS, CHUNK_BYTES = 16, 1 << 16  # of a PNG that are looked at for a recipe, and of one that is taken for a part of it
HEADER = 33  # bytes of a PNG before its second chunk
ITXT = 5 * b"\0"  # what follows the name of a text chunk of ours, which is neither compressed nor translated
SHOWN = 300  # characters of a message about a recipe, which may repeat what a stranger wrote


class Operation(NamedTuple):
    """Says what an operation is given.

    Attributes:
        least: Number of images that it needs.
        most: Number of images that it takes.
        captioned: True where it needs a caption.
        turned: True where its images have shares.
    """

    least: int = 1
    most: int = 1
    captioned: bool = False
    turned: bool = False


OPERATIONS = {
    "draw": Operation(0, 0, captioned=True),
    "vary": Operation(),
    "interpolate": Operation(2, 2, turned=True),
    "change": Operation(captioned=True, turned=True),
    "inpaint": Operation(2, 2, captioned=True),  # the image and its mask
    "nearest": Operation(),
    "reconstruct": Operation(),
    "components": Operation(),
    "priors": Operation(0, 1, captioned=True),
}
"""What can be drawn, by the name that commands, Python, the server and recipes have for it."""
FROM_NOISE = ("draw", "inpaint", "priors")
"""The operations that begin with noise, and with a prior; the others begin with the latents of an image."""


class Row(NamedTuple):
    """Describes one image: its caption, its seed, and how far it is turned where an operation turns images."""

    caption: str | None
    seed: int
    share: float = 0.0


@dataclass(frozen=True)
class InputImage:
    """Names an image that a drawing begins with.

    Attributes:
        sha256: Hash of its size and pixels, as ``pixels_hash`` makes it.
        name: Name of its file, without folders; "" where it was none.
    """

    sha256: str
    name: str = ""


@dataclass(frozen=True)
class ImageRecipe:
    """Describes images to draw. The one in an image has all sampling options, the bundle and the version.

    Raises ValueError for what no bundle can draw.

    Attributes:
        operation: One of OPERATIONS.
        caption: Caption of what is drawn; for ``vary`` and ``reconstruct`` of the image that is given.
        before: Caption of the image as it is, for ``change``.
        n: Number of images, where ``shares`` are empty; for ``nearest`` that of training images.
        seed: Seed of the first image. Image i has seed + i, and all that have ``shares`` have this one.
        eta: Freedom of ``vary``: 0 is the reconstruction, 1 changes most.
        shares: Shares of the way or the turn, one for each image, for ``interpolate`` and ``change``.
        counts: Numbers of principal components, for ``components``; none takes the paper's.
        side: Side of the images where they are made smaller than they were drawn, in pixels; else 0.
        strip: True where one file shows all of them side by side.
        images: Images that it begins with; of ``inpaint`` the image and its mask.
        options: Sampling options by name.
        bundle: Key of the bundle that drew; "" where it is not known.
        version: Version of this software that drew; "" where it is not known.
    """

    operation: str = "draw"
    caption: str | None = None
    before: str | None = None
    n: int = 1
    seed: int = 0
    eta: float = 1.0
    shares: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    side: int = 0
    strip: bool = False
    images: tuple[InputImage, ...] = ()
    options: dict[str, str | int | float] = field(default_factory=dict)
    bundle: str = ""
    version: str = ""

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"unknown operation {self.operation}{did_you_mean(self.operation, OPERATIONS)}")
        for name in ("n", "seed"):
            if type(number := getattr(self, name)) is not int:
                raise ValueError(f"{name} is {number!r}; use a whole number")
        for name, text in (("caption", self.caption), ("before", self.before)):
            if text is not None and len(text) > CHARACTERS:
                raise ValueError(f"{name} has {len(text)} characters; use {CHARACTERS} or less")
        if not 1 <= self.n <= MOST or len(self.shares) > MOST:
            raise ValueError(f"n is {len(self.shares) or self.n}; use 1 to {MOST}")
        if not 0 <= self.seed <= LARGEST_SEED - self.n:
            said = "below 0" if self.seed < 0 else f"too large; use one below {LARGEST_SEED}"
            raise ValueError(f"seed {self.seed} is {said}")
        if not isinstance(self.eta, int | float) or not 0 <= self.eta <= 1:
            raise ValueError(f"eta {self.eta} is outside 0 to 1; 0 gives the reconstruction, 1 changes most")
        if not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(f"shares {list(self.shares)} are not all from 0 to 1")
        if not all(1 <= count <= 1 << 20 for count in self.counts) or len(self.counts) > MOST:
            raise ValueError(f"counts {list(self.counts)} are not numbers of components")
        if not 0 <= self.side <= SIZES[-1]:
            raise ValueError(f"side is {self.side}; use one of {', '.join(map(str, SIZES))}")
        if not re.fullmatch(r"[0-9a-z]{0,64}", self.bundle) or not re.fullmatch(r"[\w.+-]{0,40}", self.version):
            raise ValueError("bundle and version are not a key and a version")
        if self.operation == "change" and self.before is not None and self.before == self.caption:
            raise ValueError(f"both captions are {self.caption!r}; describe the wanted image in the second")
        sampling = change_sampling(SamplingConfig(), dict(self.options))
        if sampling.candidates > MOST:
            raise ValueError(f"candidates is {sampling.candidates}; use {MOST} or less")

    @property
    def rows(self) -> tuple[Row, ...]:
        """Returns the images to draw."""
        if self.shares:
            return tuple(Row(self.caption, self.seed, share) for share in self.shares)
        return tuple(Row(self.caption, self.seed + i) for i in range(self.n))

    def of(self, row: Row) -> ImageRecipe:
        """Returns the recipe of one of its images."""
        shares = (row.share,) if self.shares else ()
        return replace(self, caption=row.caption, seed=row.seed, n=1, shares=shares)

    def drawn(self, settings: Mapping[str, Any], bundle: str) -> ImageRecipe:
        """Returns the recipe of what a bundle of this key has drawn with all these sampling options."""
        side = self.side if self.side < settings["size"] else 0
        return replace(self, options=dict(settings), side=side, bundle=bundle, version=own_version())

    def chunks(self) -> dict[str, str]:
        """Returns the text chunks of a PNG from which ``read_recipe`` makes this recipe again."""
        made = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in OWN_CHUNKS}
        plain = {name: value for name, value in made.items() if name == "operation" or value != DEFAULTS[name]}
        if self.images:
            plain["images"] = [{"sha256": each.sha256, "name": each.name} for each in self.images]
        return {
            **({} if self.caption is None else {"caption": self.caption}),
            "seed": str(self.seed),
            "settings": json.dumps(self.options, sort_keys=True),
            "made": json.dumps(plain, sort_keys=True),
        }


OWN_CHUNKS = ("caption", "seed", "options")
PARAMETERS = ("caption", "before", "n", "seed", "eta", "shares")
"""What of a recipe may stand among sampling options."""
DEFAULTS = {each.name: each.default for each in fields(ImageRecipe)}


@cache
def own_version() -> str:
    """Returns the version of this software; "" in a job on a cluster, to which its code travels uninstalled."""
    try:
        return version("unclip-ray")
    except PackageNotFoundError:
        return ""


def describe(operation: str, options: Mapping[str, Any], **given: Any) -> ImageRecipe:
    """Returns the recipe of images to draw; ``options`` as ``change_recipe`` takes them, the rest is its fields."""
    return change_recipe(ImageRecipe(operation, **given), options)


def change_recipe(recipe: ImageRecipe, options: Mapping[str, Any]) -> ImageRecipe:
    """Returns a recipe with other sampling options, and with other values of PARAMETERS where those are among them.

    All may have our names or those of OTHER_NAMES. Where images have shares, ``n`` of them go from 0 to ``strength``.
    Raises ValueError for what no bundle can draw.
    """
    own = own_names(options)
    given = {name: own.pop(name) for name in PARAMETERS if name in own}
    if (size := own.get("size")) is not None:
        given["side"] = 0
        if type(size) is int and size not in SIZES:
            raise ValueError(f"size is {size}: use {', '.join(map(str, SIZES[:-1]))} or {SIZES[-1]}")
        if size in SIZES and size not in DRAWN:
            own["size"], given["side"] = drawn_side(size), size
    if (shares := given.get("shares", recipe.shares)) and ("n" in given or "strength" in own):
        n, strength = replace(recipe, n=given.pop("n", len(shares))).n, own.pop("strength", shares[-1])
        if not 0 <= strength <= 1:
            raise ValueError(f"strength {strength} is outside 0 to 1; the paper goes up to 0.25 to 0.5")
        given["shares"] = even_shares(n, strength)
    return replace(recipe, options={**recipe.options, **own}, **given)


def drawn_side(side: int) -> int:
    """Returns the side of the smallest of the cascade's images that is not below ``side``."""
    return min(drawn for drawn in DRAWN if drawn >= side)


def pixels_hash(image: Image) -> str:
    """Returns the sha256 of an image's width, height and RGB pixels."""
    return hashlib.sha256(b"%d %d\n" % image.size + image.convert("RGB").tobytes()).hexdigest()


def text_chunks(data: bytes) -> dict[str, str]:
    """Returns the text chunks before a PNG's pixels that are written as ours. Reads no pixels and unpacks nothing."""
    found: dict[str, str] = {}
    at = 8 if data.startswith(b"\x89PNG\r\n\x1a\n") else len(data)
    for _ in range(CHUNKS):
        head = data[at : at + 8]
        if len(head) < 8 or head[4:] == b"IDAT":
            break
        size = int.from_bytes(head[:4])
        if head[4:] == b"iTXt" and size <= CHUNK_BYTES:
            name, there, text = data[at + 8 : at + 8 + size].partition(ITXT)
            if there:
                found.setdefault(name.decode("latin-1"), text.decode(errors="replace"))
        at += 12 + size  # length, kind and checksum
    return found


def add_chunks(png: bytes, chunks: Mapping[str, str]) -> bytes:
    """Returns a PNG with text chunks added, and its pixels as they were compressed."""
    added = b""
    for name, value in chunks.items():
        body = b"iTXt" + name.encode("latin-1") + ITXT + value.encode()
        added += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:HEADER] + added + png[HEADER:]


def read_recipe(data: bytes, name: str) -> ImageRecipe:
    """Returns the recipe that an image of this software carries; it may come from anybody.

    Args:
        data: The file, a PNG.
        name: Its name, for messages.

    Raises:
        UserError: It carries none, or one that cannot be read.
    """
    chunks = text_chunks(data)
    if not {"seed", "settings"} <= chunks.keys():
        raise UserError(
            f"{name}: has no recipe; PNG files of unclip carry one, but most programs drop it when they save an image"
        )
    try:
        made, options = json.loads(chunks.get("made", "{}")), json.loads(chunks["settings"])
        values = {**made, "seed": int(chunks["seed"]), "options": options}
        if "caption" in chunks:
            values["caption"] = chunks["caption"]
        found: ImageRecipe = parse(ImageRecipe, values)
        check_recipe(found, len(found.images))
    except (ValueError, TypeError, RecursionError, UserError) as e:
        raise UserError(
            f"{name}: its recipe cannot be read ({str(e)[:SHOWN]}); draw with its caption instead"
        ) from None
    return found


def check_recipe(recipe: ImageRecipe, images: int) -> None:
    """Raises ValueError for an operation without the images, or the caption, that it needs."""
    needs = OPERATIONS[recipe.operation]
    if not needs.least <= images <= needs.most:
        raise ValueError(f"{recipe.operation} takes {needs.most} images, not {images}")
    if needs.captioned and recipe.caption is None:
        raise ValueError(f"{recipe.operation} needs a caption")
    if recipe.operation == "change" and recipe.before is None:
        raise ValueError("change needs a caption of the original image")
    if needs.turned and not recipe.shares:
        raise ValueError(f"{recipe.operation} needs shares, one for each image")


def even_shares(n: int, last: float = 1.0) -> tuple[float, ...]:
    """Returns ``n`` shares from 0 to ``last``; of one alone, ``last``."""
    return tuple(last * i / (n - 1) for i in range(n)) if n > 1 else (last,)


def recipe_differences(recipe: ImageRecipe, other: ImageRecipe) -> Sequence[str]:
    """Returns what differs between two recipes, a line each, and of the options those that both have."""
    lines = [
        f"{each.name}: {_short(getattr(recipe, each.name))} -> {_short(getattr(other, each.name))}"
        for each in fields(ImageRecipe)
        if each.name != "options" and getattr(recipe, each.name) != getattr(other, each.name)
    ]
    lines += [
        f"{name}: {recipe.options[name]} -> {other.options[name]}"
        for name in sorted(recipe.options.keys() & other.options.keys())
        if recipe.options[name] != other.options[name]
    ]
    return lines


def _short(value: object) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], InputImage):
        return ", ".join(f"{each.name or 'an image'} {each.sha256[:12]}" for each in value)
    return value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else repr(value)
