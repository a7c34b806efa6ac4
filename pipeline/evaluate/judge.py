"""A second CLIP that looks at the pictures: a model that has learnt from a CLIP may please that one alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

    from models.clip import Clip


def load_judge(weights: str | None, device: torch.device) -> Clip | None:
    """The CLIP of ``evaluation.judge``, written as ``clip.weights`` is; None for none. Raises UserError."""
    if weights is None:
        return None
    from models.clip import Clip

    try:
        clip = Clip.named(weights)
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"evaluation.judge: {e}") from e
    return clip.to(device)
