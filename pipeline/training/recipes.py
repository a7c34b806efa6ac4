"""The recipes of trainings. No torch and no Ray here.

Progress is counted in samples, the rows that a model has seen. Run settings (workers, micro-batch, checkpoints) are
elsewhere, in pipeline.settings, because they do not change a result but for rounding, and micro-batch and workers for
dropout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from models import clip_weights
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.prior_configs import ARPriorConfig, ClipConfig, DiffusionPriorConfig, require
from pipeline.parse import ContentFile

Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running average


@dataclass(frozen=True)
class TrainingRecipe:
    """Says how one model is trained; its subclasses have the values of Table 3.

    Progress is counted in samples: the rows that a model has seen.

    Attributes:
        samples: Samples seen at the end of the training, rounded up to whole batches; raising it later continues the
            training.
        batch: Rows per step, over all workers; a multiple of ``lanes``.
        optimizer: ``adamw``, or ``muon`` for the matrices and kernels of hidden layers and AdamW for the rest.
        learning_rate: Learning rate after the warmup.
        beta2: Adam's beta2; beta1 is 0.9.
        eps: Adam's epsilon.
        weight_decay: Decoupled weight decay of layer weights, but not of biases, norms, embeddings, positions and
            padding.
        warmup_steps: Optimizer steps of linear warmup; ``scale`` does not change them.
        decay: Samples before the end over which the learning rate falls to zero, as a branch of a training with
            constant rate. If ``samples`` overrides a preset's, the decay keeps its share of them.
        clip_norm: Maximum gradient norm; 0 does not clip.
        ema_half_life: Half-life in samples of the averaged weights (EMA) that become the model; at most a tenth of the
            samples seen, so that even a short training forgets its random initialisation. ``nano`` and ``tiny`` use
            that tenth; 0 turns averaging off.
        lanes: Parallel data streams, from each of which a step takes the same number of rows.
        window: Shuffle window of a lane in rows; a worker holds 1.25 times as many encoded images per lane in memory.
        captions: Captions that a model reads: ``any`` draws one of a row's each time, ``first`` uses the first.
        seed: Seed of weights, order and noise.
        precision: Precision: ``fp32``, or ``bf16`` with autocast, which is fp32 on a device without bf16.
        init_from: Safetensors file of initial weights for the same model, instead of random ones.
    """

    # The module of pipeline.training.tasks that makes the model and its loss.
    task: ClassVar[str]
    # Raised when the code makes something else of the same recipe and inputs.
    version: ClassVar[int]

    samples: PositiveInt
    batch: PositiveInt
    learning_rate: PositiveFloat
    optimizer: Literal["adamw", "muon"] = "adamw"
    beta2: Decay = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    decay: NonNegativeInt = 0
    clip_norm: NonNegativeFloat = 0.0
    ema_half_life: NonNegativeInt = 0
    lanes: PositiveInt = 64
    window: PositiveInt = 256
    captions: Literal["any", "first"] = "any"
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    init_from: ContentFile | None = None

    def __post_init__(self) -> None:
        require(
            self.batch % self.lanes == 0,
            f"batch {self.batch} is not a multiple of lanes {self.lanes}: change one of them",
        )
        require(
            self.samples >= self.batch,
            f"samples {self.samples} is less than one batch of {self.batch}: raise samples, or lower batch "
            f"and lanes, {self.lanes}, of which batch is a multiple",
        )
        require(self.decay <= self.samples, f"decay is {self.decay}: use at most samples, {self.samples}")

    @property
    def pretrained(self) -> bool:
        """Returns whether the weights exist already, so that nothing is trained."""
        return False

    @property
    def whole_samples(self) -> int:
        """Returns ``samples``, rounded up to whole batches: where the training stops."""
        return -(-self.samples // self.batch) * self.batch

    @property
    def fork(self) -> int:
        """Returns the samples after which the learning rate falls, in whole batches; the stop if it never does.

        Up to there, trainings with other stops and decays are the same.
        """
        return self.whole_samples - -(-self.decay // self.batch) * self.batch


@dataclass(frozen=True)
class ClipRecipe(TrainingRecipe):
    """Says which CLIP everything else is built on.

    Learning rate, warmup and weight decay are those of unCLIP's and CLIP's papers; large presets set ``decay``, as in
    the latter.

    Attributes:
        model: Sizes of the CLIP to train.
        weights: ``train`` trains ``model`` from these pairs; ``open_clip:NAME:TAG``, such as
            ``open_clip:ViT-L-14:openai``, takes open_clip's weights; ``local-dir:FOLDER`` takes a folder in open_clip's
            layout. The last two skip training and ignore the other fields. A key includes the weights' name, not their
            bytes.
    """

    task: ClassVar[str] = "clip"
    version: ClassVar[int] = 5

    samples: PositiveInt = 32 * 650_000_000
    batch: PositiveInt = 32_768
    learning_rate: PositiveFloat = 3e-4
    beta2: Decay = 0.98
    eps: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.2
    warmup_steps: NonNegativeInt = 2000
    model: ClipConfig = field(default_factory=ClipConfig)
    weights: str = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(re.fullmatch(f"train|{clip_weights.PATTERN}", self.weights)),
            f"weights is {self.weights!r}: use train, open_clip:NAME:TAG or local-dir:FOLDER",
        )

    @property
    def pretrained(self) -> bool:
        """Returns whether ``weights`` names a CLIP that somebody else has trained."""
        return self.weights != "train"


@dataclass(frozen=True)
class ARPriorRecipe(TrainingRecipe):
    """Trains the autoregressive prior as Table 3's first column says."""

    task: ClassVar[str] = "ar_prior"
    version: ClassVar[int] = 9

    samples: PositiveInt = 1_000_000 * 4096
    batch: PositiveInt = 4096
    learning_rate: PositiveFloat = 1.6e-4
    beta2: Decay = 0.91
    eps: PositiveFloat = 1e-10
    weight_decay: NonNegativeFloat = 4.0e-2
    ema_half_life: NonNegativeInt = 2_837_711  # keeps 0.999 of itself a batch
    model: ARPriorConfig = field(default_factory=ARPriorConfig)


@dataclass(frozen=True)
class DiffusionPriorRecipe(TrainingRecipe):
    """Trains the diffusion prior as Table 3's second column says."""

    task: ClassVar[str] = "diffusion_prior"
    version: ClassVar[int] = 9

    samples: PositiveInt = 600_000 * 4096
    batch: PositiveInt = 4096
    learning_rate: PositiveFloat = 1.1e-4
    beta2: Decay = 0.96
    eps: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 6.0e-2
    ema_half_life: NonNegativeInt = 28_389_889  # keeps 0.9999 of itself a batch
    model: DiffusionPriorConfig = field(default_factory=DiffusionPriorConfig)


@dataclass(frozen=True)
class DecoderRecipe(TrainingRecipe):
    """Trains the 64 px decoder as Table 3's third column says."""

    task: ClassVar[str] = "decoder"
    version: ClassVar[int] = 7

    samples: PositiveInt = 800_000 * 2048
    batch: PositiveInt = 2048
    learning_rate: PositiveFloat = 1.2e-4
    ema_half_life: NonNegativeInt = 14_194_944  # keeps 0.9999 of itself a batch
    model: DecoderConfig = field(default_factory=DecoderConfig)


@dataclass(frozen=True)
class UpsamplerRecipe(TrainingRecipe):
    """Trains an upsampler as Table 3's fourth column says, from 64 to 256 px."""

    task: ClassVar[str] = "upsampler"
    version: ClassVar[int] = 6

    samples: PositiveInt = 1_000_000 * 1024
    batch: PositiveInt = 1024
    learning_rate: PositiveFloat = 1.2e-4
    ema_half_life: NonNegativeInt = 7_097_472  # keeps 0.9999 of itself a batch
    window: PositiveInt = 64  # large images need more memory
    model: UpsamplerConfig = field(default_factory=UpsamplerConfig)
