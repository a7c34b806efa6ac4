"""The recipe of the evaluation."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Annotated

from pydantic import Field, NonNegativeInt

from models import clip_weights
from models.prior_configs import require
from pipeline.held_out import FEWEST

HeldOutRows = Annotated[int, Field(ge=FEWEST)]


@dataclass(frozen=True)
class EvaluationRecipe:
    """Holds the numbers of held-out rows and samples of an evaluation.

    The first rows are used, so they are always the same. Nothing here may be tuned on test rows.

    Attributes:
        rows: Maximum rows for the priors' losses and sampled embeddings.
        image_rows: Maximum rows that the decoder draws at 64 px, from the images' own embeddings and through each
            prior; if a caption's ground truth can be drawn, also as many training rows.
        upsampler_rows: Maximum rows with large enough images for each upsampler.
        samples: Samples per row from priors and upsamplers, whose mean is measured.
        seed: Seed of all noise.
        judge: Second CLIP that retrieves the captions of the 64 px images if their ground truth cannot be drawn:
            ``open_clip:NAME:TAG`` or ``local-dir:FOLDER``. The key includes its name, not its bytes.
    """

    rows: HeldOutRows = 256
    image_rows: HeldOutRows = 64
    upsampler_rows: HeldOutRows = 32
    samples: Annotated[int, Field(ge=2)] = 8
    seed: NonNegativeInt = 0
    judge: str | None = None

    def __post_init__(self) -> None:
        require(
            self.judge is None or bool(re.fullmatch(clip_weights.PATTERN, self.judge)),
            f"judge is {self.judge!r}: use open_clip:NAME:TAG, local-dir:FOLDER or null",
        )


# Fields that count rows, by their names.
ROWS = tuple(field.name for field in fields(EvaluationRecipe) if field.name.endswith("rows"))
