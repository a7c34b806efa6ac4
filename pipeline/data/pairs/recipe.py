"""The recipe of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline.data.pairs.image import MAX_BYTES, MAX_PIXELS, MOST_PIXELS, Storing
from pipeline.parse import ContentFile


@dataclass(frozen=True)
class PairsRecipe:
    """Says how images are stored, by img2dataset's options, and which are refused.

    Attributes:
        image_size: Size in pixels to which larger images are reduced by resize_mode; smaller ones are not enlarged.
        resize_mode: Mode of resizing: keep_ratio resizes the short side to image_size, keep_ratio_largest the long
            side. center_crop crops the former to a square, border pads the latter to one with white. no keeps the size.
        min_image_size: Minimum short side in pixels; smaller images are rejected.
        encode_format: File format of the stored images: ``jpg``, ``png`` or ``webp``.
        encode_quality: Quality, 0 to 100; for png the compression, 0 to 9.
        max_bytes: Maximum bytes of a fetched image.
        max_pixels: Maximum pixels of an image, checked in its header before decoding; Pillow's own limit is
            178,956,970.
        allow: Non-public hosts and networks that may be contacted, such as ``10.0.0.0/8``.
        deny_hosts: Text file of hosts that are never contacted, including their subdomains.
        deny_urls: Text file of URLs that are never fetched.
        deny_sha256: Text file of sha256 of images that are never kept.
    """

    image_size: Annotated[int, Field(ge=64)] = 1024  # the smallest image that a model is trained on
    resize_mode: Literal["keep_ratio", "keep_ratio_largest", "center_crop", "border", "no"] = "keep_ratio"
    min_image_size: NonNegativeInt = 0
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: int = 95
    max_bytes: PositiveInt = MAX_BYTES
    max_pixels: Annotated[int, Field(gt=0, le=MOST_PIXELS)] = MAX_PIXELS
    allow: tuple[str, ...] = ()
    deny_hosts: ContentFile | None = None
    deny_urls: ContentFile | None = None
    deny_sha256: ContentFile | None = None

    def __post_init__(self) -> None:
        limit = 9 if self.encode_format == "png" else 100
        if not 0 <= self.encode_quality <= limit:
            raise ValueError(f"encode_quality: {self.encode_quality} is outside 0..{limit} for {self.encode_format}")

    @property
    def storing(self) -> Storing:
        """Returns the fields by which one image is resized and encoded."""
        return Storing(self.image_size, self.encode_format, self.encode_quality, self.resize_mode, self.min_image_size)

    @property
    def deny_lists(self) -> tuple[ContentFile | None, ContentFile | None, ContentFile | None]:
        """Returns the lists by kind, as read_deny_lists takes them."""
        return self.deny_hosts, self.deny_urls, self.deny_sha256
