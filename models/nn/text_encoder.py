"""The text encoder that is trained inside the decoder (GLIDE, section 2.3)."""

from torch import Tensor, nn

from models.nn.transformer import CaptionEmbedding, Transformer


class TextEncoder(nn.Module):
    """BPE tokens to one vector for each position and one for the caption.

    All positions see all, as in GLIDE. The caption's vector is the last position's output.
    """

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int):
        super().__init__()
        self.context = context
        self.embedding = CaptionEmbedding(vocabulary, context, width)
        self.transformer = Transformer(width, depth, heads, causal=False)

    def forward(self, tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """``tokens`` int64 [b, context or more], the rest is cut; ``keep`` bool [b], False drops the caption.

        Returns [b, context, width] and [b, width].
        """
        states = self.transformer(self.embedding(tokens[:, : self.context], keep))
        return states, states[:, -1]
