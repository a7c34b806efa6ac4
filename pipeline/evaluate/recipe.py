"""What an evaluation looks at. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Annotated

from pydantic import Field, NonNegativeInt

from models.prior_configs import require
from pipeline.evaluate.captions import Phrases
from pipeline.held_out import FEWEST
from pipeline.parse import ContentFile

Rows = Annotated[int, Field(ge=FEWEST)]
Several = Annotated[int, Field(ge=2)]  # samples, whose spread counts


@dataclass(frozen=True)
class EvaluationRecipe:
    """How many held-out rows each figure takes, at most: the first ones, so always the same. Of fewer than FEWEST there
    are no figures.

    ``rows``: losses of the priors; ``sampled_rows``: their samples, which are dear, ``prior_samples`` a row of each.
    ``decoder_rows``: pictures of 64 px from the images' own embeddings; ``caption_rows``: the same from the caption
    alone, through each prior. ``upsampler_256_rows`` and
    ``upsampler_1024_rows``: large pictures, ``upsampler_samples`` of each. ``early``: samples that an earlier
    checkpoint of the decoder has seen, which the finished one must beat; the decoder's training publishes it as a
    milestone. 0 compares with none. ``judge``: a second CLIP that looks at the pictures of 64 px,
    "open_clip:NAME:TAG" or "local-dir:FOLDER"; a key holds its name and not its bytes. ``inception``: the file of
    Inception-v3's weights, for FID of the same pictures; its content counts. ``phrases``: what captions say in fixed
    words, which the emoji set brings (see pipeline.config). Nothing here may be tuned on test rows.
    """

    rows: Rows = 256
    prior_samples: Several = 16
    sampled_rows: Rows = 64
    decoder_rows: Rows = 64
    caption_rows: Rows = 32
    upsampler_256_rows: Rows = 32
    upsampler_1024_rows: Rows = 16
    upsampler_samples: Several = 8
    early: NonNegativeInt = 409_600_000
    seed: NonNegativeInt = 0
    judge: str | None = None
    inception: ContentFile | None = None
    phrases: Phrases = field(default_factory=Phrases)

    def __post_init__(self) -> None:
        require(
            self.judge is None or bool(re.fullmatch(r"open_clip:[^:]+:[^:]+|local-dir:.+", self.judge)),
            f"judge is {self.judge!r}: use open_clip:NAME:TAG, local-dir:FOLDER or null",
        )


ROWS = tuple(field.name for field in fields(EvaluationRecipe) if field.name.endswith("rows"))
