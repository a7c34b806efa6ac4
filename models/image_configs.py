"""What the decoder and the upsamplers are made of. No torch here, so that a configuration can be read without it.

The dimension of image embeddings is no field: it is read from CLIP.
"""

from dataclasses import dataclass

from models.prior_configs import check_transformer, require


def check_image_model(
    size: int, channels: int, depth: int, multipliers: tuple[int, ...], patch: int, dropout: float
) -> None:
    """Raise ValueError unless a U-Net of this shape can work on pictures of ``size`` pixels a side."""
    require(channels >= 2 and channels % 2 == 0, f"channels is {channels}: use an even number, 2 or more")
    require(depth >= 1, f"depth is {depth}: use 1 or more residual blocks a resolution")
    require(
        len(multipliers) >= 1 and min(multipliers) >= 1,
        f"multipliers is {multipliers}: use one whole number, 1 or more, for each resolution",
    )
    require(patch >= 1, f"patch is {patch}: use 1 or more pixels")
    multiple = patch * 2 ** (len(multipliers) - 1)
    require(
        size >= multiple and size % multiple == 0,
        f"{size} px is not a multiple of {multiple}, which {len(multipliers)} multipliers and patch {patch} need: "
        "use fewer multipliers, a smaller patch or another size",
    )
    require(0 <= dropout < 1, f"dropout is {dropout}: use a share from 0 up to but not including 1")


def check_diffusion(schedule: str, steps: int, prediction: str) -> None:
    """Raise ValueError unless these describe a diffusion process that the image models know."""
    require(schedule in ("cosine", "linear"), f"schedule is {schedule!r}: use 'cosine' or 'linear'")
    require(steps >= 2, f"steps is {steps}: use 2 or more diffusion steps")
    require(prediction in ("eps", "v", "x0"), f"prediction is {prediction!r}: use 'eps', 'v' or 'x0'")


@dataclass(frozen=True)
class DecoderConfig:
    """The 64 px decoder; defaults are Table 3's column.

    ``depth`` is the number of residual blocks a resolution, ``attention_resolutions`` are sides of feature maps.
    ``patch`` is a small machine's option: squares of that many pixels become channels before the U-Net and pixels
    again after it, so patch 2 at 64 px is a U-Net at 32 px. ``text_context`` is the longest caption in tokens; CLIP's
    tokenizer stops at 77, so more than that is the same as 77, and longer captions than this are cut.
    ``drop_image`` and ``drop_text`` are the shares of training rows without image embedding and without caption; a
    dropped embedding becomes zeros or a learned vector (``null_image``). ``prediction`` is what the network is asked
    for: the noise (eps), v, or the picture (x0), for which a small network need not carry the noise through. The
    variance is always learned.

    ``text_encoder`` "glide" is the paper's. "clip" is CLIP's causal one, as Karlo has: its outputs are projected to
    ``context_width`` (0: ``text_width``), padding is hidden, and a dropped caption is an empty one. ``embedding_norm``
    is the length that image embeddings are given; 0 is the square root of their dimension, for unit variance.
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
    vocabulary: int = 49408
    clip_tokens: int = 4
    drop_image: float = 0.1
    drop_text: float = 0.5
    null_image: str = "zero"
    patch: int = 1
    schedule: str = "cosine"
    steps: int = 1000
    prediction: str = "eps"
    text_encoder: str = "glide"
    context_width: int = 0
    embedding_norm: float = 0.0

    def __post_init__(self) -> None:
        check_image_model(self.image_size, self.channels, self.depth, self.multipliers, self.patch, self.dropout)
        check_diffusion(self.schedule, self.steps, self.prediction)
        check_transformer("text_", self.text_width, self.text_depth, self.text_heads)
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
        require(self.text_context >= 2, f"text_context is {self.text_context}: use 2 or more tokens")
        require(self.vocabulary >= 2, f"vocabulary is {self.vocabulary}: use 49408 for CLIP's tokens")
        require(self.clip_tokens >= 1, f"clip_tokens is {self.clip_tokens}: use 1 or more, the paper has 4")
        for name in ("drop_image", "drop_text"):
            share = getattr(self, name)
            require(0 <= share <= 1, f"{name} is {share}: use a share from 0 to 1")
        require(self.null_image in ("zero", "learned"), f"null_image is {self.null_image!r}: use 'zero' or 'learned'")
        require(self.text_encoder in ("glide", "clip"), f"text_encoder is {self.text_encoder!r}: use 'glide' or 'clip'")
        require(
            self.context_width == 0 or (self.context_width > 0 and self.text_encoder == "clip"),
            f"context_width is {self.context_width}: use 0, or a positive width with text_encoder 'clip'",
        )
        require(
            self.embedding_norm >= 0, f"embedding_norm is {self.embedding_norm}: use a length, or 0 for unit variance"
        )

    def feature_sides(self) -> tuple[int, ...]:
        """The side of the U-Net's feature maps at each resolution, largest first."""
        return tuple(self.image_size // self.patch // 2**level for level in range(len(self.multipliers)))


@dataclass(frozen=True)
class UpsamplerConfig:
    """A diffusion upsampler from ``low_size`` to ``image_size`` pixels; defaults are Table 3's 64 to 256 column.

    Trained on crops of ``crop`` times the side, run at full size. ``corruption`` is what happens to the small picture
    in training, and, at its mild end, in sampling if ``corrupt_at_inference``: "blur" (Gaussian, kernel 3, sigma
    0.6), "bsr" (blind super-resolution: blurs, resampling, noise and JPEG) or "bsr_light" (the same, weaker).
    ``patch`` and ``prediction`` are as in the decoder.

    Two options are Karlo's: the timestep embedding is added and does not scale and shift (``scale_shift`` false), and
    a second U-Net of the same shape, ``last_unet``, takes timestep 0, the last step of sampling.
    """

    low_size: int = 64
    image_size: int = 256
    channels: int = 320
    depth: int = 3
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    dropout: float = 0.1
    corruption: str = "blur"
    crop: float = 0.25
    schedule: str = "cosine"
    steps: int = 1000
    prediction: str = "eps"
    patch: int = 1
    corrupt_at_inference: bool = True
    scale_shift: bool = True
    last_unet: bool = False

    def __post_init__(self) -> None:
        require(
            self.low_size >= 1 and self.image_size == self.scale * self.low_size and self.scale >= 2,
            f"image_size {self.image_size} is not a multiple of low_size {self.low_size}: use 4 times low_size",
        )
        require(
            self.corruption in ("blur", "bsr", "bsr_light"),
            f"corruption is {self.corruption!r}: use 'blur', 'bsr' or 'bsr_light'",
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
        # A full picture is checked too: it need not be a multiple of the crop.
        for size in (side, self.image_size):
            check_image_model(size, self.channels, self.depth, self.multipliers, self.patch, self.dropout)
        check_diffusion(self.schedule, self.steps, self.prediction)

    @property
    def scale(self) -> int:
        """How many times larger the picture gets."""
        return self.image_size // max(self.low_size, 1)

    @property
    def crop_size(self) -> int:
        """The side of a training crop in pixels of the large picture."""
        return int(self.image_size * self.crop)
