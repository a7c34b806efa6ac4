"""A pre-norm transformer with an optional key-value cache, and the embedding that feeds captions to it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nn.attention import attend


class Cache:
    """Keys and values of the positions seen so far, a pair of [b, heads, context, width / heads] per layer.

    ``length`` positions are held; lowering it drops the last ones.
    """

    def __init__(self, context: int):
        self.context = context
        self.length = 0
        self.shown: Tensor | None = None
        self.layers: list[tuple[Tensor, Tensor]] = []

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends one layer's new keys and values, [b, heads, n, head], and returns all of them."""
        if layer == len(self.layers):
            rows, heads, _, head = keys.shape
            shape = (rows, heads, self.context, head)
            self.layers.append((keys.new_empty(shape), values.new_empty(shape)))
        stop = self.length + keys.shape[2]
        for kept, new in zip(self.layers[layer], (keys, values), strict=True):
            kept[:, :, self.length : stop] = new
        all_keys, all_values = self.layers[layer]
        return all_keys[:, :, :stop], all_values[:, :, :stop]


def normal_linear(inputs: int, outputs: int, std: float = 0.02) -> nn.Linear:
    """Returns a linear layer whose weights are normal with standard deviation ``std`` and whose biases are zero."""
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear


def quick_gelu(x: Tensor) -> Tensor:
    """Returns the approximation x sigmoid(1.702 x) of GELU, with which OpenAI's CLIPs were trained."""
    return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)); the hidden layer is four times as wide.

    ``joining_std`` is the initial standard deviation of the weights that join a branch to the residual stream.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        causal: bool,
        dropout: float,
        joining_std: float,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.activation = activation
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = normal_linear(width, 3 * width)
        self.attention_out = normal_linear(width, width, joining_std)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp_in = normal_linear(width, 4 * width)
        self.mlp_out = normal_linear(4 * width, width, joining_std)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        layer: int = 0,
        cache: Cache | None = None,
        shown: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        attended = self._attend(self.norm_attention(x), layer, cache, shown, last_only)
        x = x[:, -1:] if last_only else x
        x = x + self.dropout(self.attention_out(attended))
        return x + self.dropout(self.mlp_out(self.activation(self.mlp_in(self.norm_mlp(x)))))

    def _attend(
        self, x: Tensor, layer: int, cache: Cache | None, shown: Tensor | None, last_only: bool = False
    ) -> Tensor:
        queries, keys, values = self._queries_keys_values(x, last_only)
        if cache is not None:
            keys, values = cache.extend(layer, keys, values)
        new, seen = queries.shape[2], keys.shape[2]
        masked = self.causal and new > 1  # a single new position may see everything before it
        mask = None if shown is None else shown[:, None, None, :]
        if masked and (mask is not None or new < seen):
            # PyTorch's causal flag aligns the mask with the first key, and new queries are the last positions.
            earlier = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
            mask = earlier if mask is None else mask & earlier
        out = attend(queries, keys, values, mask, causal=masked and mask is None)
        return out.transpose(1, 2).flatten(2)

    def _queries_keys_values(self, x: Tensor, last_only: bool) -> list[Tensor]:
        """Returns queries, keys and values, [b, heads, n, width / heads] each.

        With ``last_only`` the queries are those of the last position alone.
        """
        if not last_only:
            return list(self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4))
        width, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
        queries = F.linear(x[:, -1:], weight[:width], bias[:width])
        keys, values = F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (queries, keys, values)]


class Transformer(nn.Module):
    """[b, n, width] to [b, n, width], with a final layer norm.

    With ``causal``, position i sees positions up to i; otherwise all see all. With a cache, which only a causal one
    can have, a call brings the positions after those of the calls before it. Weights start as in GPT-2: standard
    deviation 0.02, divided by sqrt(2 depth) where a branch joins the residual stream. Dropout, where there is any, uses
    PyTorch's global generator.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        causal: bool,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ):
        super().__init__()
        joining_std = 0.02 / (2 * depth) ** 0.5
        self.blocks = nn.ModuleList(Block(width, heads, causal, dropout, joining_std, activation) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, cache: Cache | None = None, shown: Tensor | None = None, last_only: bool = False
    ) -> Tensor:
        """Returns the output for x [b, n, width], of the same shape.

        ``shown`` bool [b, n]: False hides a position from all others; position 0 must be shown. With a cache it comes
        with the first call and holds for the later ones, whose own positions are shown. With ``last_only`` the result
        is the last position's, [b, 1, width], and the last layer computes no other.
        """
        positions, last = x.shape[1], len(self.blocks) - 1
        if cache is not None and cache.length == 0:
            cache.shown = shown
        elif cache is not None and cache.shown is not None:
            shown = F.pad(cache.shown, (0, cache.length + positions - cache.shown.shape[1]), value=True)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, cache, shown, last_only and layer == last)
        if cache is not None:
            cache.length += positions
        return self.norm(x)


def is_padding(tokens: Tensor, end: int) -> Tensor:
    """Returns which positions come after the first ``end`` token: booleans shaped like ``tokens``, [b, n].

    CLIP's tokenizer pads with 0, which is also the token of "!": only the end token tells the two apart.
    """
    ends = (tokens == end).long()
    return ends.cumsum(-1) - ends > 0


def cut_captions(tokens: Tensor, context: int) -> Tensor:
    """Returns the first ``context`` of tokens [b, context or more]. Raises ValueError on fewer."""
    if tokens.shape[1] < context:
        raise ValueError(f"captions must have {context} tokens or more, got {tokens.shape[1]}: pad them")
    return tokens[:, :context]


class CaptionEmbedding(nn.Module):
    """BPE tokens [b, context or more] to vectors [b, context, width]: token plus position; the rest is cut.

    Padded positions hold a learned vector of their own instead of a token, and a dropped caption is all padding
    (GLIDE, section 2.3). That differs from an empty caption, which has a start and an end token.
    """

    def __init__(self, vocabulary: int, context: int, width: int):
        super().__init__()
        self.end = vocabulary - 1  # CLIP's BPE: the end of text is the last token
        self.context = context
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.padding = nn.Parameter(torch.empty(context, width))
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        nn.init.normal_(self.padding, std=0.02)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Returns vectors of ``tokens``, int64 [b, context or more]; ``keep``, bool [b], is False to drop a caption.

        Raises ValueError on fewer tokens.
        """
        tokens = cut_captions(tokens, self.context)
        shown = keep[:, None] & ~is_padding(tokens, self.end)
        return torch.where(shown[..., None], self.token(tokens) + self.position, self.padding)
