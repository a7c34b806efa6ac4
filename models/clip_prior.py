"""Karlo's diffusion prior: ours, but for how captions enter and how image embeddings are scaled."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion_prior import DiffusionPrior
from models.nn.text_encoder import ClipTextEncoder
from models.nn.transformer import normal_linear
from models.prior_configs import STEP_TOKENS, DiffusionPriorConfig, check_least


@dataclass(frozen=True)
class ClipPriorConfig(DiffusionPriorConfig):
    """As ``DiffusionPriorConfig``, with the depth and heads of a CLIP's text encoder as wide as its embeddings.

    ``scale`` is not used: embeddings are standardised instead.
    """

    text_depth: int = 12
    text_heads: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "text_depth", "text_heads")


class ClipPrior(DiffusionPrior):
    """A prior that reads captions through CLIP's text encoder and diffuses standardised image embeddings.

    x = (CLIP's image embedding - ``mean``) / ``std``, [d] each. The embedding is not of unit norm before that. Padding
    is hidden, and hidden text is the empty caption, whose own text embedding enters too.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ClipPriorConfig, embed_dim: int):
        super().__init__(config, embed_dim)
        self.text = ClipTextEncoder(
            config.vocabulary, config.text_context, embed_dim, config.text_depth, config.text_heads, embed_dim
        )
        self.states_in = normal_linear(embed_dim, config.width)
        self.position = nn.Parameter(torch.zeros(config.text_context + 4, config.width))
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("std", torch.ones(embed_dim))
        # Weights of the parent's conditioning, which Karlo's files do not have.
        del self.caption, self.null_embedding

    @property
    def scale(self) -> float:
        """Raises ValueError: the losses and statistics that need a scale are the parent's, and are wrong here."""
        raise ValueError(
            "a ClipPrior diffuses embeddings of CLIP's own length, and here they have unit norm: it can be sampled, "
            "but neither trained nor measured; train a DiffusionPrior instead"
        )

    def caption_inputs(self, tokens: Tensor, text_embedding: Tensor, keep_text: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the inputs as the parent does; ``text_embedding`` is unused, as the text encoder makes its own.

        ``x_t`` and the result of ``forward`` are standardised, [b, d].
        """
        text = self.text(tokens, keep_text)
        sequence = torch.cat([self.states_in(text.states), self.embedding_in(text.pooled)[:, None]], dim=1)
        return sequence + self.position[:-STEP_TOKENS], F.pad(text.shown, (0, 1), value=True)

    def image_embedding(self, samples: Tensor) -> Tensor:
        """Returns image embeddings, unit norm [b, d], of standardised samples [b, d]."""
        return F.normalize(samples * self.std + self.mean, dim=-1)
