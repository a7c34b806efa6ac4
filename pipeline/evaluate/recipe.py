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

    The first rows are taken, so always the same ones. Nothing here may be tuned on test rows.

    Attributes:
        rows: Rows, at most, for both priors: their losses, and the embeddings that they sample.
        image_rows: Rows, at most, that the decoder draws at 64 px, from the images' own embeddings and through each
            prior; where it can be drawn what a caption means, as many training rows besides.
        upsampler_rows: Rows, at most, with large enough images, for each upsampler.
        samples: Samples a row, whose mean is measured, of priors and upsamplers.
        seed: Seed of all noise.
        judge: A second CLIP that looks for the captions of the 64 px images where it cannot be drawn what these mean,
            ``open_clip:NAME:TAG`` or ``local-dir:FOLDER``; its name is in the key and not its bytes.
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
