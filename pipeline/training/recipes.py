"""What a training is, as recipes. No torch and no Ray here.

Everything is counted in samples, the rows that a model has seen. Run settings (workers, micro-batch, checkpoints) are
elsewhere, in pipeline.settings, because they do not change a result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log
from typing import Literal

from models.image_configs import DecoderConfig, UpsamplerConfig
from models.prior_configs import ARPriorConfig, ClipConfig, DiffusionPriorConfig, require
from pipeline.parse import ContentFile


def half_life(decay: float, batch: int) -> int:
    """The half-life in samples of an exponential moving average that keeps ``decay`` of itself every ``batch``."""
    return round(batch * log(0.5) / log(decay))


@dataclass(frozen=True)
class TrainingRecipe:
    """How one model is trained; subclasses have Table 3's values.

    ``samples``: where it stops, rounded up to whole batches; raising it later goes on from there. ``batch``: rows a
    step, over all workers. ``lanes``: parallel readers of the data, a bound on workers; ``window``: rows that are
    shuffled with each other, and encoded pictures that a lane holds. ``precision``: "bf16" is autocast, and fp32 on a
    device without bf16. Adam with beta1 0.9 and decoupled ``weight_decay``, on matrices only. The learning rate rises
    over ``warmup`` samples, stays, and falls to zero over the last ``decay``. ``clip_norm`` bounds the norm of the
    gradient; 0 is no bound. ``ema_half_life``, in samples, is that of the averaged weights that become the model, and
    never more than a tenth of the samples seen; 0 is no average. ``init_from``: a safetensors file of weights of the
    same model to begin with, instead of random ones.
    """

    samples: int
    batch: int
    learning_rate: float
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0
    decay: int = 0
    clip_norm: float = 0.0
    ema_half_life: int = 0
    lanes: int = 64
    window: int = 256
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    init_from: ContentFile | None = None

    def __post_init__(self) -> None:
        require(self.lanes >= 1, f"lanes is {self.lanes}: use 1 or more")
        require(
            self.batch >= 1 and self.batch % self.lanes == 0,
            f"batch {self.batch} is not a multiple of lanes {self.lanes}: change one of them",
        )
        require(
            self.samples >= self.batch,
            f"samples {self.samples} is less than one batch of {self.batch}: raise samples or lower batch and lanes",
        )
        require(self.window >= 1, f"window is {self.window}: use 1 or more rows")
        require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}: use a number above 0")
        require(0 <= self.beta2 < 1, f"beta2 is {self.beta2}: use a number from 0 up to but not including 1")
        require(self.eps > 0, f"eps is {self.eps}: use a number above 0")
        for name in ("weight_decay", "warmup", "decay", "clip_norm", "ema_half_life"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}: use 0 or more")
        require(self.decay <= self.samples, f"decay is {self.decay}: use at most samples, {self.samples}")

    @property
    def fork(self) -> int:
        """Samples after which the learning rate falls, in whole batches; the stop if it never does. Up to there
        trainings with other stops and decays are the same."""
        return (-(-self.samples // self.batch) - -(-self.decay // self.batch)) * self.batch


@dataclass(frozen=True)
class ClipRecipe(TrainingRecipe):
    """The CLIP that everything else is built on.

    ``weights``: "train" trains ``model`` from these pairs; "open_clip:NAME:TAG", such as
    "open_clip:ViT-L-14:openai", takes open_clip's weights; "local-dir:FOLDER" takes a folder in open_clip's layout.
    The last two train nothing and ignore the other fields. A key holds the name of the weights and not their bytes,
    so other bytes need another name. Learning rate and decay are those of unCLIP's and CLIP's papers.
    """

    samples: int = 32 * 650_000_000
    batch: int = 32_768
    learning_rate: float = 3e-4
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    warmup: int = 2000 * 32_768
    model: ClipConfig = field(default_factory=ClipConfig)
    weights: str = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        kind, _, rest = self.weights.partition(":")
        known = {
            "train": not rest,
            "open_clip": len(rest.split(":")) == 2 and all(rest.split(":")),
            "local-dir": bool(rest),
        }
        require(
            known.get(kind, False),
            f"weights is {self.weights!r}: use train, open_clip:NAME:TAG or local-dir:FOLDER",
        )


@dataclass(frozen=True)
class ARPriorRecipe(TrainingRecipe):
    """The autoregressive prior: Table 3's first column."""

    samples: int = 1_000_000 * 4096
    batch: int = 4096
    learning_rate: float = 1.6e-4
    beta2: float = 0.91
    eps: float = 1e-10
    weight_decay: float = 4.0e-2
    ema_half_life: int = half_life(0.999, 4096)
    model: ARPriorConfig = field(default_factory=ARPriorConfig)


@dataclass(frozen=True)
class DiffusionPriorRecipe(TrainingRecipe):
    """The diffusion prior: Table 3's second column."""

    samples: int = 600_000 * 4096
    batch: int = 4096
    learning_rate: float = 1.1e-4
    beta2: float = 0.96
    eps: float = 1e-6
    weight_decay: float = 6.0e-2
    ema_half_life: int = half_life(0.9999, 4096)
    model: DiffusionPriorConfig = field(default_factory=DiffusionPriorConfig)


@dataclass(frozen=True)
class DecoderRecipe(TrainingRecipe):
    """The 64 px decoder: Table 3's third column."""

    samples: int = 800_000 * 2048
    batch: int = 2048
    learning_rate: float = 1.2e-4
    ema_half_life: int = half_life(0.9999, 2048)
    model: DecoderConfig = field(default_factory=DecoderConfig)


@dataclass(frozen=True)
class UpsamplerRecipe(TrainingRecipe):
    """An upsampler: Table 3's fourth column, 64 to 256 px."""

    samples: int = 1_000_000 * 1024
    batch: int = 1024
    learning_rate: float = 1.2e-4
    ema_half_life: int = half_life(0.9999, 1024)
    window: int = 64  # of large pictures
    model: UpsamplerConfig = field(default_factory=UpsamplerConfig)
