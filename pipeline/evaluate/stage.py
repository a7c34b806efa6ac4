"""The stage of the evaluation: does it learn? No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Annotated

from pydantic import Field, NonNegativeInt

from models import clip_weights
from models.prior_configs import require
from pipeline.evaluate.captions import Phrases
from pipeline.graph.artifacts import Artifact
from pipeline.graph.ray import on_a_gpu
from pipeline.graph.stages import Context
from pipeline.held_out import FEWEST
from pipeline.parse import ContentFile

VERSION = 12

HeldOutRows = Annotated[int, Field(ge=FEWEST)]
Several = Annotated[int, Field(ge=2)]  # samples, whose spread counts


@dataclass(frozen=True)
class EvaluationRecipe:
    """Says what is measured, and on how many held-out rows.

    The first rows are taken, so always the same ones. Nothing here may be tuned on test rows.

    Attributes:
        rows: At most, for the losses of both priors.
        prior_samples: Image embeddings drawn a row from each prior.
        sampled_rows: Of these, at most, for which both priors draw samples, which are expensive.
        decoder_rows: Rows, at most, that the decoder draws at 64 px from the images' own embeddings; where
            ``phrases`` names backgrounds, captions that name one come first.
        caption_rows: Of these, at most, that are drawn from the caption alone, through each prior.
        name_rows: Rows, at most, that each prior draws from captions that differ in the name alone; as many training
            rows besides.
        upsampler_256_rows: Rows, at most, with images of 256 px.
        upsampler_1024_rows: Rows, at most, with images of 1024 px.
        upsampler_samples: Samples of each, whose mean is compared with bicubic interpolation.
        early: Samples after which the decoder's training leaves the checkpoint that the finished one must beat; 0
            is none.
        seed: Of all noise.
        judge: A second CLIP that looks at the 64 px images, ``open_clip:NAME:TAG`` or ``local-dir:FOLDER``; its
            name is in the key and not its bytes.
        inception: The file of Inception-v3's weights, for FID of the 64 px images; its content is in the key.
        phrases: What captions say in fixed words.
    """

    rows: HeldOutRows = 256
    prior_samples: Several = 16
    sampled_rows: HeldOutRows = 64
    decoder_rows: HeldOutRows = 64
    caption_rows: HeldOutRows = 32
    name_rows: HeldOutRows = 64
    upsampler_256_rows: HeldOutRows = 32
    upsampler_1024_rows: HeldOutRows = 16
    upsampler_samples: Several = 8
    early: NonNegativeInt = 409_600_000
    seed: NonNegativeInt = 0
    judge: str | None = None
    inception: ContentFile | None = None
    phrases: Phrases = field(default_factory=Phrases)

    def __post_init__(self) -> None:
        require(
            self.judge is None or bool(re.fullmatch(clip_weights.PATTERN, self.judge)),
            f"judge is {self.judge!r}: use open_clip:NAME:TAG, local-dir:FOLDER or null",
        )


ROWS = tuple(field.name for field in fields(EvaluationRecipe) if field.name.endswith("rows"))


def run_evaluation(ctx: Context) -> Artifact:
    """Measures every model of the bundle on held-out rows."""
    from pipeline.evaluate.run import evaluate

    return on_a_gpu(evaluate, ctx)
