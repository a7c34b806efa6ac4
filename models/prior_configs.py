"""Sizes of a CLIP and of the two priors. No torch here, so that a configuration can be read without it.

A prior has no field for the dimension of embeddings or the number of codes: CLIP and the codec give them.
"""

from dataclasses import dataclass
from math import log
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

VOCABULARY = 49408
"""The tokens of CLIP's BPE."""
RIDGE_READS = "ridge reads CLIP's words: use text_encoder frozen"
STEP_TOKENS = 3
"""Inputs of a step of the diffusion prior, after those of the caption: timestep, noised image embedding, query."""

Schedule = Literal["cosine", "linear"]


def require(condition: bool, message: str) -> None:
    """Raises ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def check_choices(config: object) -> None:
    """Raises ValueError for a field whose value is not one of those that its type names."""
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal:
            value, *known, last = getattr(config, name), *map(repr, get_args(kind))
            require(value in get_args(kind), f"{name} is {value!r}: use {', '.join(known)} or {last}")


def check_least(config: object, least: int, *names: str) -> None:
    """Raises ValueError for one of these fields whose value is below ``least``."""
    for name in names:
        value = getattr(config, name)
        require(value >= least, f"{name} is {value}: use {least} or more")


def check_shares(config: object, *names: str) -> None:
    """Raises ValueError for one of these fields whose value is not in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value < 1, f"{name} is {value}: use a share from 0 up to but not including 1")


def check_transformer(config: object, prefix: str = "", depth: str = "depth") -> None:
    """Raises ValueError unless a transformer can be built from the fields whose names begin with ``prefix``."""
    check_least(config, 1, f"{prefix}{depth}")
    width, heads = getattr(config, f"{prefix}width"), getattr(config, f"{prefix}heads")
    require(
        heads >= 1 and width >= 1 and width % heads == 0,
        f"{prefix}width {width} is not a multiple of {prefix}heads {heads}: change one of them",
    )


def check_text_context(tokens: int) -> None:
    """Raises ValueError unless the tokenizer can make captions of this many tokens."""
    require(3 <= tokens <= 77, f"text_context is {tokens}: use 3 to 77, the length that the tokenizer makes")


@dataclass(frozen=True)
class TextTower:
    """Sizes the text tower of a CLIP as in Radford et al. 2021 (section 2.4): causal, read at the end token.

    Attributes:
        width: Width of token states.
        depth: Layers.
        heads: Attention heads.
        context: BPE tokens, with start and end.
        vocabulary: Vocabulary size; the last two tokens are start and end.
        quick_gelu: OpenAI's approximation replaces GELU.
    """

    width: int
    depth: int
    heads: int
    context: int = 77
    vocabulary: int = VOCABULARY
    quick_gelu: bool = False

    @classmethod
    def of(cls, model_config: dict[str, Any]) -> Self:
        """Returns the sizes in open_clip's configuration of a CLIP. Raises ValueError for a tower of another kind."""
        text = model_config["text_cfg"]
        known = {"width", "layers", "heads", "context_length", "vocab_size"}
        odd = sorted(name for name in text.keys() - known if text[name])
        require(
            not odd,
            f"text_encoder 'frozen' reads text towers like CLIP's own, and this CLIP's has {', '.join(odd)}: choose "
            "another CLIP, or another text_encoder",
        )
        return cls(
            width=text.get("width", 512),
            depth=text.get("layers", 12),
            heads=text.get("heads", 8),
            context=text.get("context_length", 77),
            vocabulary=text.get("vocab_size", VOCABULARY),
            quick_gelu=bool(model_config.get("quick_gelu")),
        )


@dataclass(frozen=True)
class ARPriorConfig:
    """Sizes the autoregressive prior; defaults are Table 3's column.

    The caption goes through a text encoder of its own, whose first ``prefix`` outputs open the sequence; with the CLIP
    text embedding, the dot-product token and 319 codes that makes Table 3's context of 384. Table 3 gives the text
    context as 256, but CLIP's tokenizer stops at 77.

    Attributes:
        text_context: BPE tokens, 3 to 77; longer captions are cut.
        prefix: Outputs of the text encoder that open the sequence.
        text_width: Width of the text encoder.
        text_depth: Layers of the text encoder.
        text_heads: Attention heads of the text encoder.
        width: Width of the transformer over the sequence.
        depth: Layers of that transformer.
        heads: Attention heads of that transformer.
        vocabulary: Vocabulary size of CLIP's BPE tokenizer.
        buckets: Buckets of a code, equal to ``codec.buckets``.
        dropout: Dropout rate of the text encoder and the transformer.
        drop_text: Share of training rows whose caption and text embedding are hidden, for guidance.
        text_encoder: Input of the text encoder: token embeddings of its ``own``, or the token states of this run's
            CLIP, whose text tower is ``frozen`` in it.
        smooth_buckets: Number of smooth functions of a bucket's position in which its embedding and logit are linear,
            for few rows: each row then also trains neighbouring buckets. 0 gives every bucket its own.
        ridge: Input for few rows, with a ``frozen`` text encoder: a ridge regression of image embeddings on text
            embeddings and words. Each code's position gets the regression's coordinate along the code's component; the
            regression also gives the part of an image embedding that no code holds.
        text_noise: Maximum noise on text embeddings in training, in standard deviations of image embeddings; for few
            rows, whose text embeddings overfit their images.
    """

    text_context: int = 77
    prefix: int = 63
    text_width: int = 2048
    text_depth: int = 24
    text_heads: int = 32
    width: int = 1664
    depth: int = 24
    heads: int = 26
    vocabulary: int = VOCABULARY
    buckets: int = 1024
    dropout: float = 0.0
    drop_text: float = 0.1
    text_encoder: Literal["own", "frozen"] = "own"
    smooth_buckets: int = 0
    ridge: bool = False
    text_noise: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self)
        check_transformer(self, "text_")
        check_transformer(self)
        check_text_context(self.text_context)
        require(
            1 <= self.prefix <= self.text_context,
            f"prefix is {self.prefix}: use 1 to text_context, which is {self.text_context}",
        )
        check_least(self, 2, "buckets")
        check_least(self, 0, "smooth_buckets", "text_noise")
        check_shares(self, "dropout", "drop_text")
        require(not self.ridge or self.text_encoder == "frozen", RIDGE_READS)


@dataclass(frozen=True)
class DiffusionPriorConfig:
    """Sizes the diffusion prior; defaults are Table 3's column.

    Unit-norm embeddings are multiplied by ``scale`` times the square root of their dimension. Table 3 gives the text
    context as 256, but CLIP's tokenizer stops at 77.

    Attributes:
        text_context: BPE tokens, 3 to 77; longer captions are cut.
        width: Width of the transformer.
        depth: Layers of the transformer.
        heads: Attention heads of the transformer.
        vocabulary: Vocabulary size of CLIP's BPE tokenizer.
        schedule: Noise schedule, ``cosine`` or ``linear``.
        steps: Timesteps of the diffusion.
        drop_text: Share of training rows whose caption and text embedding are hidden, for guidance.
        scale: Standard deviation of an embedding's component as the model sees it; 0.5375 is the paper's factor of
            17.2 at 1,024 dimensions.
        text_encoder: Input for captions: token embeddings of the prior's ``own``, or the token states of this run's
            CLIP, whose text tower is ``frozen`` in it.
        ridge: Start for few rows, with a ``frozen`` text encoder: the network's output is added to a ridge regression
            of image embeddings on text embeddings and words, solved before the first step, and is zero at first. A
            linear model generalises where a network memorises.
    """

    text_context: int = 77
    width: int = 2048
    depth: int = 24
    heads: int = 32
    vocabulary: int = VOCABULARY
    schedule: Schedule = "cosine"
    steps: int = 1000
    drop_text: float = 0.1
    scale: float = 0.5375
    text_encoder: Literal["own", "frozen"] = "own"
    ridge: bool = False

    def __post_init__(self) -> None:
        check_transformer(self)
        require(self.width % 2 == 0, f"width is {self.width}: use an even width, half sines and half cosines of t")
        check_text_context(self.text_context)
        check_choices(self)
        check_least(self, 2, "steps")
        check_shares(self, "drop_text")
        require(not self.ridge or self.text_encoder == "frozen", RIDGE_READS)
        require(self.scale > 0, f"scale is {self.scale}: use a positive number")


@dataclass(frozen=True)
class ClipConfig:
    """Sizes a CLIP that the pipeline trains itself; the default is a small vision transformer.

    Attributes:
        embed_dim: Dimension of the embeddings.
        image_size: Side of its images in pixels.
        tower: ``vit``, or ``resnet``, CLIP's modified ResNet, which halves the image five times
            and trains on one worker.
        layers: Layers of the image tower: one number for a vit, four for a resnet.
        width: Width of the image tower.
        patch: Side of a vit's patch in pixels.
        text_width: Width of the text tower.
        text_layers: Layers of the text tower.
        text_heads: Attention heads of the text tower.
        text_context: BPE tokens, 3 to 77, with start and end.
        temperature: Initial temperature of the contrastive loss. It is learned, but hardly changes in a few hundred
            steps, and a low one makes CLIP distinguish similar pairs.
        least_crop: Share of the side of the smallest random crop in training; 1 uses whole images.
    """

    embed_dim: int = 256
    image_size: int = 64
    tower: Literal["vit", "resnet"] = "vit"
    layers: tuple[int, ...] = (6,)
    width: int = 256
    patch: int = 8
    text_width: int = 192
    text_layers: int = 4
    text_heads: int = 6
    text_context: int = 77
    temperature: float = 0.07
    least_crop: float = 0.75

    def __post_init__(self) -> None:
        check_choices(self)
        require(0.01 <= self.temperature <= 1, f"temperature is {self.temperature}: use 0.01 to 1")
        require(0 < self.least_crop <= 1, f"least_crop is {self.least_crop}: use a share above 0, up to 1")
        require(all(n >= 1 for n in self.layers), f"layers is {self.layers}: use positive numbers")
        if self.tower == "vit":
            require(len(self.layers) == 1, f"layers is {self.layers}: a vit takes one number")
            require(
                self.patch >= 1 and self.image_size % self.patch == 0,
                f"image_size {self.image_size} is not a multiple of patch {self.patch}: change one of them",
            )
            require(
                self.embed_dim <= self.width,
                f"embed_dim {self.embed_dim} is above width {self.width}: a vit cannot fill it, widen the tower",
            )
        else:
            require(len(self.layers) == 4, f"layers is {self.layers}: a resnet takes four numbers")
            require(self.image_size % 32 == 0, f"image_size is {self.image_size}: a resnet takes multiples of 32")
        pooled = self.width if self.tower == "vit" else 32 * self.width
        require(
            pooled >= 1 and pooled % min(64, pooled) == 0,
            f"width is {self.width}: a vit wider than 64 takes multiples of 64, a resnet even numbers",
        )
        check_transformer(self, "text_", "layers")
        check_text_context(self.text_context)

    def model_config(self) -> dict:
        """Returns the sizes as an open_clip model configuration, ready for JSON."""
        vision: dict = {"image_size": self.image_size, "width": self.width}
        if self.tower == "vit":
            vision |= {"layers": self.layers[0], "patch_size": self.patch, "head_width": min(64, self.width)}
        else:
            vision |= {"layers": list(self.layers), "head_width": min(64, 32 * self.width)}
        text = {
            "context_length": self.text_context,
            "vocab_size": VOCABULARY,
            "width": self.text_width,
            "heads": self.text_heads,
            "layers": self.text_layers,
        }
        begins = {} if self.temperature == 0.07 else {"init_logit_scale": -log(self.temperature)}
        return {"embed_dim": self.embed_dim, "vision_cfg": vision, "text_cfg": text, **begins}
