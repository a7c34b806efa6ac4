"""What a client may ask for: the fields of OpenAI's image API, and ours."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.settings import MOST_IMAGES
from serve.work import Row

LARGEST_SEED = 2**53  # what JavaScript counts to exactly
PROMPT = 4000  # characters; the tokenizer's own limit is lower and is said in tokens
Share = Annotated[float, Field(ge=0, le=1)]


class Common(BaseModel):
    """The fields that all endpoints have.

    Attributes:
        prompt: The caption.
        model: The served model, ``dall-e-2``, or the beginning of the bundle's key; may be left out.
        n: How many images.
        size: Width and height in pixels; ``auto`` is the largest that the bundle makes.
        response_format: ``url`` is valid as long as the server keeps the image.
        user: Accepted and ignored.
        seed: Of the first image; each next image adds one. Random if left out; the answer has it.
        steps: Steps of the decoder.
        guidance: The decoder's guidance, one less than the literature's scale.
        stream: Answer with server-sent events, each image as soon as it is made.
        partial_images: How many of the smaller images are sent before the last, with ``stream``.
        progress: Send our own events of the place in line and of steps, too, with ``stream``.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = Field(None, max_length=PROMPT)
    model: str | None = Field(None, max_length=100)
    n: int = Field(1, ge=1, le=MOST_IMAGES)
    size: Literal["auto", "64x64", "256x256", "512x512", "1024x1024"] = "auto"
    response_format: Literal["url", "b64_json"] = "url"
    user: str | None = Field(None, max_length=1000)
    seed: int | None = Field(None, ge=0, lt=LARGEST_SEED)
    steps: int | None = Field(None, ge=2, le=1000)
    guidance: float | None = Field(None, ge=0, le=30)
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    progress: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """Leaves out what is null, which OpenAI's types allow for fields that have a default here."""
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values

    def rows(self, seed: int) -> tuple[Row, ...]:
        """Returns the images to draw, the first with ``seed``."""
        return tuple(Row(self.prompt, seed + i) for i in range(self.n))

    def options(self) -> dict[str, Any]:
        """Returns the sampling options that the request sets, but for the size."""
        options = {
            "decoder_steps": self.steps,
            "decoder_guidance": self.guidance,
            "prior": getattr(self, "prior", None),
        }
        return {name: value for name, value in options.items() if value is not None}


class Captioned(Common):
    """Asks for images of a caption, by OpenAI's fields for them.

    Attributes:
        prompt: The caption.
        prior: Which prior draws the image embedding.
        quality: OpenAI's; there is one quality.
        background: OpenAI's; images are opaque.
        moderation: OpenAI's; the server's own rules hold.
        output_format: OpenAI's; images are PNG.
    """

    prompt: str = Field(max_length=PROMPT)
    prior: Literal["ar", "diffusion"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    output_format: Literal["png"] | None = None


class Generation(Captioned):
    """Asks for images of a caption."""


class Variation(Common):
    """Asks for other images with the meaning of one (section 3.1 of the paper).

    Attributes:
        image: A PNG, JPEG or WebP.
        eta: How free they are: 0 is the reconstruction, 1 changes most.
        prompt: Tells the decoder what is in the image.
    """

    image: UploadFile
    eta: Share = 1.0


class Edit(Captioned):
    """Asks for a part of an image to be drawn again, or for an image changed by words.

    Attributes:
        image: A PNG, JPEG or WebP.
        prompt: The caption of what it should become.
        mask: An image whose transparent pixels are drawn again; without one the image is changed by words.
        before: The caption of the image as it is, where it is changed by words (section 3.3 of the paper).
        strength: How far it is turned towards the words; the paper goes up to 0.25 to 0.5.
        prior: Which prior draws the image embedding, with a mask.
    """

    image: UploadFile
    mask: UploadFile | None = None
    before: str | None = Field(None, max_length=PROMPT)
    strength: Share = 0.4

    def rows(self, seed: int) -> tuple[Row, ...]:
        """Returns the images to draw: with a mask of the next seeds, else of one seed, turned further and further."""
        if self.mask is not None:
            return super().rows(seed)
        return tuple(Row(self.prompt, seed, self.strength * (i + 1) / self.n) for i in range(self.n))

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.mask is None) == (self.before is None):
            raise ValueError("give a mask (transparent where to draw), or a caption of the image as it is as 'before'")
        return self


class Interpolation(Common):
    """Asks for images on the way from one image to another (section 3.2 of the paper); ``n`` includes both ends.

    Attributes:
        first: A PNG, JPEG or WebP.
        second: Another.
    """

    prompt: None = None  # a way between two images has no caption
    first: UploadFile
    second: UploadFile
    n: int = Field(5, ge=2, le=MOST_IMAGES)

    def rows(self, seed: int) -> tuple[Row, ...]:
        """Returns the images to draw, all of one seed."""
        return tuple(Row(None, seed, i / (self.n - 1)) for i in range(self.n))
