"""The text encoders that the decoder may have: GLIDE's (section 2.3) and CLIP's (Radford et al. 2021, section 2.4)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.nn.transformer import CaptionEmbedding, Transformer, cut_captions, is_padding, quick_gelu
from models.tokens import cut_tokens


class EncodedText(NamedTuple):
    """Holds a vector for each position, [b, context, width], and one for the caption, [b, d].

    ``shown`` bool [b, context] is True where a position may be attended to; None shows all.
    """

    states: Tensor
    pooled: Tensor
    shown: Tensor | None


class TextEncoder(nn.Module):
    """GLIDE's: BPE tokens to vectors, trained inside the decoder.

    All positions see all, as in GLIDE. The caption's vector is the last position's output.
    """

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int):
        super().__init__()
        self.context = context
        self.embedding = CaptionEmbedding(vocabulary, context, width)
        self.transformer = Transformer(width, depth, heads, causal=False)

    def forward(self, tokens: Tensor, keep: Tensor) -> EncodedText:
        """Encodes tokens int64 [b, context or more], cut to ``context``; ``keep`` bool [b], False drops a caption."""
        states = self.transformer(self.embedding(tokens[:, : self.context], keep))
        return EncodedText(states, states[:, -1], None)


class ClipTextEncoder(nn.Module):
    """CLIP's: positions see those before them, and the caption's vector is projected from its end token's output.

    That vector, of width ``embed_dim``, has no unit norm yet. A dropped caption is an empty one, and padding is not
    shown, as in Karlo.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        width: int,
        depth: int,
        heads: int,
        embed_dim: int,
        activation: Callable[[Tensor], Tensor] = quick_gelu,
    ):
        super().__init__()
        self.start, self.end = vocabulary - 2, vocabulary - 1  # the last two tokens of CLIP's BPE
        self.context = context
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.transformer = Transformer(width, depth, heads, causal=True, activation=activation)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, tokens: Tensor, keep: Tensor) -> EncodedText:
        """Encodes tokens as ``TextEncoder`` does; a caption that is cut ends with the end token.

        Raises ValueError on fewer tokens than ``context``.
        """
        tokens = cut_tokens(cut_captions(tokens, self.context), self.context, self.end)
        place = torch.arange(self.context, device=tokens.device)
        empty = self.start * (place == 0) + self.end * (place == 1)
        return self.read(torch.where(keep[:, None], tokens, empty))

    def read(self, tokens: Tensor) -> EncodedText:
        """Returns the encoded text of tokens int64 [b, n], n up to ``context``; shapes as in ``forward``."""
        states = self.transformer(self.token(tokens) + self.position[: tokens.shape[1]])
        # The end token has the largest id, as CLIP's own code relies on.
        pooled = self.projection(states[torch.arange(len(tokens), device=tokens.device), tokens.argmax(1)])
        return EncodedText(states, pooled, ~is_padding(tokens, self.end))
