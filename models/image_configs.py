"""Sizes of the decoder and the upsamplers. No torch here, so that a configuration can be read without it.

CLIP gives the dimension of image embeddings, so it has no field.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from models.prior_configs import (
    VOCABULARY,
    Schedule,
    check_choices,
    check_least,
    check_shares,
    check_transformer,
    require,
)

Prediction = Literal["eps", "v", "x0"]


def check_image_model(config: DecoderConfig | UpsamplerConfig, size: int) -> None:
    """Raises ValueError unless the U-Net and its diffusion can work on images of ``size`` pixels a side."""
    channels, multipliers, patch, max_snr = config.channels, config.multipliers, config.patch, config.max_snr
    require(channels >= 2 and channels % 2 == 0, f"channels is {channels}: use an even number, 2 or more")
    check_least(config, 1, "depth", "patch")
    check_least(config, 0, "pixel_channels")
    require(
        len(multipliers) >= 1 and min(multipliers) >= 1,
        f"multipliers is {multipliers}: use one whole number, 1 or more, for each resolution",
    )
    multiple = patch * 2 ** (len(multipliers) - 1)
    require(
        size >= multiple and size % multiple == 0,
        f"{size} px is not a multiple of {multiple}, which {len(multipliers)} multipliers and patch {patch} need: "
        "use fewer multipliers, a smaller patch or another size",
    )
    check_shares(config, "dropout")
    check_choices(config)
    check_least(config, 2, "steps")
    require(max_snr is None or 0 < max_snr < inf, f"max_snr is {max_snr}: use a positive number, or null for the usual")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes the 64 px decoder; defaults are Table 3's column.

    The variance is always learned.

    Attributes:
        image_size: Side of the images in pixels: 64, the first size of the cascade.
        channels: Channels of the first resolution.
        depth: Residual blocks per resolution.
        multipliers: Multipliers of ``channels``, one for each resolution.
        head_channels: Channels per attention head.
        attention_resolutions: Sides of feature maps with attention.
        dropout: Dropout rate in residual blocks.
        text_context: BPE tokens; CLIP's tokenizer stops at 77, so larger values mean 77, and longer captions are cut.
        text_width: Width of the decoder's text encoder.
        text_depth: Layers of the decoder's text encoder.
        text_heads: Attention heads of the decoder's text encoder.
        vocabulary: Vocabulary size of CLIP's BPE tokenizer.
        clip_tokens: Tokens made from the image embedding.
        drop_image: Share of training rows without image embedding, for guidance.
        drop_text: Share of training rows without caption.
        null_image: Replacement of a dropped image embedding: ``zero`` or ``learned``.
        patch: Squares of that many pixels become channels before the U-Net and pixels again after it; above 1 for
            small machines.
        schedule: Noise schedule, ``cosine`` or ``linear``.
        steps: Timesteps of the diffusion.
        prediction: Target that the network predicts: the noise (``eps``), ``v``, or the image (``x0``), for networks
            too small to carry noise through.
        text_encoder: Text encoder: ``glide``, the paper's; ``clip``, a causal one like CLIP's, as in Karlo; or
            ``frozen``, the untrained text tower of this run's CLIP, with its own sizes. The last two mask padding, and
            represent a dropped caption by an empty one.
        context_width: Width that the text encoder's outputs are projected to, with ``clip`` or ``frozen``; 0 is
            ``text_width``.
        embedding_norm: Norm to which image embeddings are scaled; 0 is the square root of their dimension, for unit
            variance.
        whiten: Whitening of image embeddings: they are centred, and all directions scaled to nearly equal variance. A
            CLIP trained on few images spreads them over few directions.
        layout_channels: Channels of the spatial projection of the image embedding, and with ``frozen`` of the caption's
            words, at the lowest resolution; 0 turns it off.
        pixel_channels: Channels between the three 3x3 convolutions at full resolution that correct the network's output
            across the borders of ``patch``, given its input and the timestep; 0 leaves them out.
        max_snr: Bound on the signal-to-noise ratio that weighs the squared error; ``null`` is 5 for ``x0`` and none for
            ``eps`` and ``v``, whose error then counts as it is (docs/how/diffusion.md).
    """

    image_size: int = 64
    channels: int = 512
    depth: int = 3
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    head_channels: int = 64
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.1
    text_context: int = 256
    text_width: int = 2048
    text_depth: int = 24
    text_heads: int = 32
    vocabulary: int = VOCABULARY
    clip_tokens: int = 4
    drop_image: float = 0.1
    drop_text: float = 0.5
    null_image: Literal["zero", "learned"] = "zero"
    patch: int = 1
    schedule: Schedule = "cosine"
    steps: int = 1000
    prediction: Prediction = "eps"
    text_encoder: Literal["glide", "clip", "frozen"] = "glide"
    context_width: int = 0
    embedding_norm: float = 0.0
    whiten: bool = False
    layout_channels: int = 0
    pixel_channels: int = 0
    max_snr: float | None = None

    def __post_init__(self) -> None:
        check_image_model(self, self.image_size)
        check_least(self, 0, "layout_channels", "embedding_norm")
        check_least(self, 1, "clip_tokens")
        check_least(self, 2, "text_context", "vocabulary")
        check_transformer(self, "text_")
        sides = self.feature_sides()
        require(
            len(self.attention_resolutions) >= 1 and set(self.attention_resolutions) <= set(sides),
            f"attention_resolutions is {self.attention_resolutions}: use one or more of {sides}, the sides of this "
            "U-Net's feature maps",
        )
        for side, multiplier in zip(sides, self.multipliers, strict=True):
            width = self.channels * multiplier
            # The middle block attends at the last resolution, whether or not that one is listed.
            if side in self.attention_resolutions or side == sides[-1]:
                require(
                    self.head_channels >= 1 and width % self.head_channels == 0,
                    f"head_channels is {self.head_channels}: use a divisor of the {width} channels at {side} px",
                )
        require(not (self.whiten and self.embedding_norm), "whiten and embedding_norm both scale embeddings: use one")
        for name in ("drop_image", "drop_text"):
            share = getattr(self, name)
            require(0 <= share <= 1, f"{name} is {share}: use a share from 0 to 1")
        require(
            self.context_width == 0 or (self.context_width > 0 and self.text_encoder != "glide"),
            f"context_width is {self.context_width}: use 0, or a positive width with text_encoder 'clip' or 'frozen'",
        )

    def feature_sides(self) -> tuple[int, ...]:
        """Returns the side of the U-Net's feature maps at each resolution, largest first."""
        return tuple(self.image_size // self.patch // 2**level for level in range(len(self.multipliers)))


@dataclass(frozen=True)
class UpsamplerConfig:
    """Sizes a diffusion upsampler; defaults are Table 3's 64 to 256 column.

    Attributes:
        low_size: Side of the small image: 64, or 256.
        image_size: Side of the large image: 256, or 1024.
        channels: Channels of the first resolution.
        depth: Residual blocks per resolution.
        multipliers: Multipliers of ``channels``, one for each resolution.
        dropout: Dropout rate in residual blocks.
        corruption: Corruption of the small image in training: ``blur`` (Gaussian, kernel 3, sigma 0.6), ``bsr`` (blind
            super-resolution: blurs, resampling, noise and JPEG) or ``bsr_light`` (the same, weaker).
        crop: Share of the side that training sees; sampling works at full size.
        schedule: Noise schedule, ``cosine`` or ``linear``.
        steps: Timesteps of the diffusion.
        prediction: Target that the network predicts: the noise (``eps``), ``v``, or the image (``x0``), for networks
            too small to carry noise through.
        patch: Squares of that many pixels become channels before the U-Net and pixels again after it; above 1 for
            small machines.
        pixel_channels: Channels between the three 3x3 convolutions at full resolution that correct the network's output
            across the borders of ``patch``, given its input and the timestep; 0 leaves them out.
        corrupt_at_inference: Mild corruption of the small image in sampling, too.
        scale_shift: Scale and shift of features by the timestep embedding, as in ADM; false adds the embedding, as
            Karlo does.
        last_unet: Second U-Net of the same shape for the last step of sampling, as in Karlo.
        max_snr: Bound on the signal-to-noise ratio that weighs the squared error; ``null`` is 5 for ``x0`` and none for
            ``eps`` and ``v``, whose error then counts as it is (docs/how/diffusion.md).
    """

    low_size: int = 64
    image_size: int = 256
    channels: int = 320
    depth: int = 3
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    dropout: float = 0.1
    corruption: Literal["blur", "bsr", "bsr_light"] = "blur"
    crop: float = 0.25
    schedule: Schedule = "cosine"
    steps: int = 1000
    prediction: Prediction = "eps"
    patch: int = 1
    pixel_channels: int = 0
    corrupt_at_inference: bool = True
    scale_shift: bool = True
    last_unet: bool = False
    max_snr: float | None = None

    def __post_init__(self) -> None:
        require(
            self.low_size >= 1 and self.image_size == self.scale * self.low_size and self.scale >= 2,
            f"image_size {self.image_size} is not a multiple of low_size {self.low_size}: use 4 times low_size",
        )
        require(
            self.corruption == "blur" or self.scale == 4,
            f"corruption {self.corruption!r} shrinks by 4, not {self.scale}: use an image_size of 4 times low_size",
        )
        require(0 < self.crop <= 1, f"crop is {self.crop}: use a share of the side above 0, up to 1")
        side = self.crop_size
        require(
            side == self.image_size * self.crop and side % self.scale == 0,
            f"crop {self.crop} of {self.image_size} px is not a multiple of {self.scale} px: change crop",
        )
        # A full image is checked too: it need not be a multiple of the crop.
        for size in (side, self.image_size):
            check_image_model(self, size)

    @property
    def scale(self) -> int:
        """Returns how many times larger the image gets."""
        return self.image_size // max(self.low_size, 1)

    @property
    def crop_size(self) -> int:
        """Returns the side of a training crop in pixels of the large image."""
        return int(self.image_size * self.crop)
