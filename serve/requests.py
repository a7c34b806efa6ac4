"""The fields of requests: OpenAI's image API, ours, and those of other servers, which are ignored or refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from fastapi import UploadFile
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticKnownError

from models.sampling_config import INSTEAD, OTHER_NAMES, own_names
from pipeline.errors import did_you_mean
from pipeline.sampling.recipe import CHARACTERS, LARGEST_SEED, SIZES, even_shares
from serve.errors import ApiError, invalid
from serve.settings import MOST_IMAGES

BEST = 100  # OpenAI's default of output_compression
ALIASES = ("dall-e-", "gpt-image-", "chatgpt-image-")
"""The beginnings of OpenAI's names of image models, which clients have built in."""
QUALITIES = {"low": 0.5, "medium": 1.0, "high": 2.0, "xhigh": 4.0, "max": 8.0}
"""The decoder's steps by the quality, as a multiple of the bundle's own."""
SAME_QUALITY = {"auto": "medium", "standard": "medium", "hd": "high"}

IGNORED = {
    "user": "limits count for each token",
    "safety_identifier": "limits count for each token",
    "moderation": "the server's own rules hold",
    "style": "say in the prompt how it should look",
    "complexity": "nothing is planned before an image is drawn",
    "input_fidelity": "strength says how far an image is changed",
    "negative_prompt": "guidance leads away from the empty caption",
    "true_cfg_scale": "guidance_scale is the decoder's",
    "lora": "the bundle's own weights draw",
    **dict.fromkeys(
        ("system_prompt", "use_system_prompt", "bot_task", "enhance_prompt", "max_sequence_length"),
        "CLIP reads the prompt as it is",
    ),
    **dict.fromkeys(
        ("generator_device", "vae_use_slicing", "vae_use_tiling", "enable_teacache", "enable_cache_dit", "rollout"),
        "the server decides how it computes",
    ),
    **dict.fromkeys(
        ("flow_shift", "guidance_scale_2", "diffusers_kwargs", "extra_params", "infer_align_image_size"),
        "this model has nothing like it",
    ),
    "output_quality": "output_compression sets the quality of JPEG and WebP",
    "enable_upscaling": "size says how large an image is drawn",
}
"""Fields of OpenAI's other models, of vLLM-Omni and of SGLang that change nothing here: the answer warns of them."""

REFUSED = {
    "background=transparent": "this model draws every pixel: use opaque",
    "output_format=gif": "this model draws single images: use png, jpeg or webp",
    "output_format=svg": "this model draws pixels: use png, jpeg or webp",
    "svg": "this model draws pixels: leave it out",
    "frame_count": "this model draws single images: leave it out",
    "frame_duration_ms": "this model draws single images: leave it out",
    "markup": "this model cannot read marks on an image: send a mask of what is to be drawn again",
    "mask_image": "send mask, which is transparent where the image is to be drawn again",
    "reference_image": "send image, and mask",
    "url": "this server fetches no images: send the file as image",
    "layers": "this model draws one layer: leave it out",
    "width": "use size, such as 256x256",
    "height": "use size, such as 256x256",
}
"""Fields, or values of fields, that ask for what this model cannot do, each with what to do instead."""


def _number(value: Any) -> Any:
    """Refuses JSON's true and false, which pydantic takes for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


Whole = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
Share = Annotated[Number, Field(ge=0, le=1)]
Upload = Annotated[list[UploadFile], Field(validation_alias=AliasChoices("image", "image[]"))]


class Common(BaseModel):
    """The fields that all endpoints have.

    Attributes:
        prompt: Caption of the image.
        model: Name of the served model, one of OpenAI's names of image models, or the beginning of the bundle's key.
        n: Number of images, up to 10; for an interpolation at least 2, by default 5.
        size: Width and height in pixels: ``64x64``, ``256x256``, ``512x512`` (downsampled from 1024), ``1024x1024``, or
            ``auto``, the largest that the bundle makes.
        response_format: Format of an image in the response; a ``url`` is valid as long as the server keeps the image.
        output_format: Format of the images; only a PNG carries its recipe.
        output_compression: Quality of JPEG and WebP, 0 to 100.
        quality: Steps of the decoder, as a multiple of the bundle's own and at most its timesteps: ``low`` half,
            ``medium`` (``auto``, ``standard``) one, ``high`` (``hd``) two, ``xhigh`` four, ``max`` eight times as many.
        background: Background of the images, which are opaque.
        seed: Seed of the first image; image i uses seed + i. By default random, and returned.
        steps: Steps of the decoder, in place of ``quality``.
        num_inference_steps: Synonym of ``steps`` in diffusers, vLLM-Omni and SGLang.
        guidance: Guidance of the decoder, one less than the usual scale: 0 is none.
        guidance_scale: Guidance on the usual scale, as in diffusers, vLLM-Omni and SGLang: 1 is none.
        stream: The response is a stream of server-sent events, with each image as soon as it is made.
        partial_images: Number of smaller images sent before the final one, 0 to 3, with ``stream``.
        progress: Our own events are added to ``stream``, for queue position and steps.
    """

    model_config = ConfigDict(extra="allow")

    prompt: str | None = Field(None, max_length=CHARACTERS)
    model: str | None = Field(None, max_length=200)
    n: Whole = Field(1, ge=1, le=MOST_IMAGES)
    size: str = Field("auto", max_length=100)
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Whole = Field(BEST, ge=0, le=100)
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    seed: Whole | None = Field(None, ge=0, le=LARGEST_SEED - 1)
    steps: Whole | None = Field(None, ge=2, le=1000)
    num_inference_steps: Whole | None = Field(None, ge=2, le=1000)
    guidance: Number | None = Field(None, ge=0, le=30)
    guidance_scale: Number | None = Field(None, ge=0, le=31)
    stream: bool = False
    partial_images: Whole = Field(0, ge=0, le=3)
    progress: bool = False

    @model_validator(mode="before")
    @classmethod
    def _possible(cls, values: Any) -> Any:
        """Leaves out what is null, names what others name, and raises ApiError for what this model cannot do."""
        if not isinstance(values, dict):
            return values
        given = {cls._own_name(name): value for name, value in values.items() if value is not None}
        for name, value in given.items():
            plain = _plain(name)
            for refused in (plain, f"{plain}={value}" if isinstance(value, str) else plain):
                if refused in REFUSED:
                    raise invalid(f"{refused}: {REFUSED[refused]}", plain)
        return given

    @classmethod
    def _own_name(cls, name: str) -> str:
        own = OTHER_NAMES.get(name, name)
        return own if own in cls.model_fields and name not in cls.model_fields else name

    @model_validator(mode="after")
    def _known(self) -> Self:
        """Raises ApiError for a field that no client sends."""
        for name in self._ignored():
            if name not in IGNORED:
                why = INSTEAD.get(name) or f"unknown field{did_you_mean(name, type(self).model_fields)}"
                raise invalid(f"{name}: {why}", name)
        return self

    def _ignored(self) -> list[str]:
        return list(dict.fromkeys(map(_plain, self.model_extra or ())))

    def warnings(self) -> list[str]:
        """Returns what of the request changes nothing, each in a line."""
        said = [f"{name} has no effect: {IGNORED[name]}" for name in self._ignored()]
        if self.output_format == "png" and self.output_compression != BEST:
            said.append("output_compression has no effect: PNG is lossless")
        return said

    def shares(self) -> tuple[float, ...]:
        """Returns how far each image is turned, of an operation that turns images."""
        return ()

    def uploads(self) -> Sequence[UploadFile]:
        """Returns the images that the drawing begins with, in order."""
        return ()

    def side(self, sides: Sequence[int]) -> int:
        """Returns the side that ``size`` asks for, of a bundle whose images have these ``sides``. Raises ApiError."""
        largest = sides[-1]
        if self.size == "auto":
            return largest
        possible = [side for side in SIZES if side <= largest] or [largest]
        found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", self.size)
        width, height = map(int, found.groups()) if found else (largest, largest)
        if found and width == height and width in possible:
            return width
        nearest = min(possible, key=lambda side: abs(side * side - width * height))
        raise ApiError(
            400,
            "invalid_size",
            f"size is {self.size}, and this bundle draws squares of {', '.join(map(str, possible))} px: use "
            f"{nearest}x{nearest}, the nearest, or auto",
            "size",
        )

    def options(self, sampling: Mapping[str, Any], timesteps: int) -> dict[str, Any]:
        """Returns the sampling options that the request changes, but for the size.

        Args:
            sampling: The bundle's sampling defaults.
            timesteps: Timesteps of the decoder, which is as many steps as it can take.
        """
        names = ("steps", "num_inference_steps", "guidance", "guidance_scale", "prior")
        try:
            options = own_names({name: value for name in names if (value := getattr(self, name, None)) is not None})
        except ValueError as e:
            raise invalid(str(e)) from None
        share = QUALITIES[self.said_quality]
        if "decoder_steps" not in options and share != 1:
            options["decoder_steps"] = min(max(2, round(share * sampling["decoder_steps"])), timesteps)
        return options

    @property
    def said_quality(self) -> str:
        """Returns the quality by the name that an answer has."""
        return SAME_QUALITY.get(self.quality, self.quality)


class Generation(Common):
    """Requests images for a caption.

    Attributes:
        prompt: Caption of the image.
        prior: Prior that draws the image embedding; by default the bundle's own.
    """

    prompt: str = Field(max_length=CHARACTERS)
    prior: Literal["ar", "diffusion"] | None = None

    @model_validator(mode="after")
    def _captioned(self) -> Self:
        if not self.prompt.strip():
            raise invalid("prompt is empty: say what the image should show", "prompt")
        return self


class Variation(Common):
    """Requests variations of an image (section 3.1 of the paper).

    Attributes:
        image: A PNG, JPEG or WebP.
        eta: Freedom of the variations: 0 is the reconstruction, 1 changes most.
        prompt: Caption of the image, as a condition for the decoder.
    """

    image: Upload
    eta: Share = 1.0

    def uploads(self) -> Sequence[UploadFile]:
        """Returns the image."""
        return self.image

    @model_validator(mode="after")
    def _of_one(self) -> Self:
        _check_count(self.image, 1, "a variation is of one image")
        return self


class Edit(Generation):
    """Requests inpainting, a change by words, or a blend of two images.

    Attributes:
        image: A PNG, JPEG or WebP; two, as ``image[]``, are blended.
        prompt: Caption of what the image should become.
        mask: Image whose transparent pixels are redrawn; without one the image is changed by words.
        before: Caption of the original image, for a change by words (section 3.3 of the paper). By default the caption
            in a PNG's own recipe, or else that of the nearest training image, or else empty.
        strength: Fraction of the rotation towards the words; the paper goes up to 0.25 to 0.5.
        prior: Prior that draws the image embedding, with a mask.
    """

    image: Upload
    mask: UploadFile | None = None
    before: str | None = Field(None, max_length=CHARACTERS)
    strength: Share = 0.4

    def uploads(self) -> Sequence[UploadFile]:
        """Returns the image, or both, and the mask if there is one."""
        return [*self.image, *([] if self.mask is None else [self.mask])]

    def shares(self) -> tuple[float, ...]:
        """Returns how far the image is turned: with a mask not at all, else further and further."""
        if self.mask is not None:
            return ()
        if len(self.image) == 2:
            return tuple((i + 1) / (self.n + 1) for i in range(self.n))
        return tuple(self.strength * (i + 1) / self.n for i in range(self.n))

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.mask is None:
            _check_count(self.image, 2, "this model changes one image, or blends two")
        else:
            _check_count(self.image, 1, "with a mask this model draws over one image")
        if self.mask is not None and self.before is not None:
            raise invalid("before: a mask redraws a part, before changes the whole image: leave one out", "before")
        return self


class Interpolation(Common):
    """Requests images between two (section 3.2 of the paper); ``n`` includes both ends.

    Attributes:
        first: A PNG, JPEG or WebP.
        second: Another PNG, JPEG or WebP.
    """

    prompt: None = None  # a way between two images has no caption
    first: UploadFile
    second: UploadFile
    n: Whole = Field(5, ge=2, le=MOST_IMAGES)

    def uploads(self) -> Sequence[UploadFile]:
        """Returns both images."""
        return self.first, self.second

    def shares(self) -> tuple[float, ...]:
        """Returns the share of the way of each image."""
        return even_shares(self.n)


def names_model(model: str, served: str, bundle: str) -> bool:
    """Returns whether a request for ``model`` means the model of this name, whose bundle has this key."""
    return model == served or model.startswith(ALIASES) or (len(model) >= 8 and bundle.startswith(model))


def _plain(name: str) -> str:
    """Returns the field that an entry of a form belongs to, such as svg for svg[model]."""
    return name.partition("[")[0]


def _check_count(images: Iterable[UploadFile], most: int, why: str) -> None:
    if (count := len(list(images))) > most:
        raise invalid(f"image: {why}, and {count} were sent: send {'one' if most == 1 else 'two at most'}", "image")
