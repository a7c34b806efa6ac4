"""The U-Net of ADM (Dhariwal & Nichol 2021), with GLIDE's attention to a context."""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nn.attention import attend
from models.nn.casting import half_precision, no_autocast, run
from models.nn.embedding import timestep_embedding


def group_norm(channels: int) -> nn.GroupNorm:
    """Returns a norm of 32 groups, as in ADM, or for widths that are not multiples of 32 of as many as divide them."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def zeroed(module: nn.Module) -> nn.Module:
    """Returns the module with all weights zero, so that its branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """Two convolutions, between which the embedding scales and shifts.

    Without ``scale_shift`` it is added instead, before the normalisation (DDPM). ``resize`` "up" or "down" doubles or
    halves the side; "" keeps it.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding_width: int,
        dropout: float,
        resize: str = "",
        scale_shift: bool = True,
    ):
        super().__init__()
        self.resize = resize
        self.scale_shift = scale_shift
        self.norm_in = group_norm(channels)
        self.conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_width, (2 if scale_shift else 1) * out_channels)
        self.norm_out = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self._resized(F.silu(self.norm_in(x)))
        h = self.conv_in(h)
        modulation = self.modulation(F.silu(embedding))[..., None, None]
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.norm_out(h) * (1 + scale) + shift
        else:
            h = self.norm_out(h + modulation)
        return self.skip(self._resized(x)) + self.conv_out(self.dropout(F.silu(h)))

    def _resized(self, x: Tensor) -> Tensor:
        if self.resize == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resize == "down" else x


class Attention(nn.Module):
    """Attention of every pixel to all pixels and all context tokens, their keys and values in one sequence (GLIDE)."""

    def __init__(self, channels: int, head_channels: int, context_width: int):
        super().__init__()
        self.head_channels = head_channels
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(context_width, 2 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor, shown: Tensor | None = None) -> Tensor:
        """Returns x [b, c, h, w] plus its attention to all pixels and to ``context`` [b, n, context_width].

        ``shown`` bool [b, n]: False hides a token of ``context``.
        """
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        queries, keys, values = (self._heads(part) for part in self.qkv(pixels).chunk(3, dim=-1))
        context_keys, context_values = (self._heads(part) for part in self.context_kv(context).chunk(2, dim=-1))
        mask = None if shown is None else F.pad(shown, (0, pixels.shape[1]), value=True)[:, None, None]
        keys, values = torch.cat([context_keys, keys], dim=2), torch.cat([context_values, values], dim=2)
        h = attend(queries, keys, values, mask)
        h = self.out(h.transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])

    def _heads(self, x: Tensor) -> Tensor:
        """Turns [b, n, channels] to [b, heads, n, head_channels]."""
        return x.unflatten(-1, (-1, self.head_channels)).transpose(1, 2)


class Stage(nn.Module):
    """A residual block, followed by attention if ``attention`` is given."""

    def __init__(self, resblock: ResBlock, attention: Attention | None = None):
        super().__init__()
        self.resblock = resblock
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None, shown: Tensor | None = None) -> Tensor:
        x = run(self.resblock, x, embedding)
        return x if self.attention is None else run(self.attention, x, context, shown)


class UNet(nn.Module):
    """[b, in_channels, h, w] to [b, out_channels, h, w], for any h and w that are multiples of 2^(resolutions - 1).

    ``depth`` residual blocks at each resolution, which has ``channels`` times its multiplier. ``attention_levels``
    are the resolutions, 0 the largest, that attend to themselves and to a context of ``context_width``; the middle
    then does so too. Without attention levels nothing attends. ``scale_shift`` is as in ``ResBlock``.
    The last convolution of every branch, and of the network, starts at zero. The first and last layers are fp32 even
    under autocast; on a GPU all layers between them are in autocast's precision (models/nn/casting.py).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        depth: int,
        multipliers: tuple[int, ...],
        dropout: float = 0.0,
        attention_levels: frozenset[int] = frozenset(),
        head_channels: int = 64,
        context_width: int = 0,
        scale_shift: bool = True,
    ):
        super().__init__()
        self.channels = channels
        self.embedding_width = 4 * channels
        self.multiple = 2 ** (len(multipliers) - 1)
        widths = [channels * multiplier for multiplier in multipliers]

        def stage(width_in: int, width: int, attends: bool) -> Stage:
            attention = Attention(width, head_channels, context_width) if attends else None
            return Stage(ResBlock(width_in, width, self.embedding_width, dropout, "", scale_shift), attention)

        def resizing(width: int, resize: str) -> Stage:
            return Stage(ResBlock(width, width, self.embedding_width, dropout, resize, scale_shift))

        self.time = nn.Sequential(
            nn.Linear(channels, self.embedding_width),
            nn.SiLU(),
            nn.Linear(self.embedding_width, self.embedding_width),
        )
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        current, skips = widths[0], [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(depth):
                self.down.append(stage(current, width, level in attention_levels))
                current = width
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(resizing(width, "down"))
                skips.append(width)
        self.middle = nn.ModuleList([stage(current, current, bool(attention_levels)), stage(current, current, False)])
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(depth + 1):
                self.up.append(stage(current + skips.pop(), width, level in attention_levels))
                current = width
            if level > 0:
                self.up.append(resizing(width, "up"))
        self.norm_out = group_norm(current)
        self.conv_out = zeroed(nn.Conv2d(current, out_channels, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        added: Tensor | None = None,
        context: Tensor | None = None,
        shown: Tensor | None = None,
        layout: Tensor | None = None,
    ) -> Tensor:
        """Returns the network's output for a noised image.

        Args:
            x: Noised image, [b, in_channels, h, w].
            t: Timesteps, [b].
            added: Vector added to the timestep embedding, [b, embedding_width].
            context: Tokens to attend to, [b, n, context_width].
            shown: Mask bool [b, n]; False hides a token of ``context``.
            layout: Features added after the middle, at the lowest resolution, [b, width, h, w].

        Raises:
            ValueError: The sides cannot be halved often enough.
        """
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(
                f"this U-Net takes multiples of {self.multiple} pixels a side, got {x.shape[2]} x {x.shape[3]}"
            )
        embedding = self.timestep(t)
        if added is not None:
            embedding = embedding + added
        # bf16 would round away a fifth of the noise in x at t = 0, and at the end the differences of the variance.
        with no_autocast(x):
            x = self.conv_in(x.float())
        half = half_precision(x)
        if half is not None:
            x, embedding = x.to(half), embedding.to(half)
            context = None if context is None else context.to(half)
            layout = None if layout is None else layout.to(half)
        with nullcontext() if half is None else no_autocast(x):
            skips = [x]
            for stage in self.down:
                x = stage(x, embedding, context, shown)
                skips.append(x)
            for stage in self.middle:
                x = stage(x, embedding, context, shown)
            if layout is not None:
                x = x + layout
            for stage in self.up:
                if stage.resblock.resize == "":  # a stage that resizes has no counterpart on the way down
                    x = torch.cat([x, skips.pop()], dim=1)
                x = stage(x, embedding, context, shown)
        with no_autocast(x):
            return self.conv_out(F.silu(self.norm_out(x.float())))

    def timestep(self, t: Tensor) -> Tensor:
        """Returns the embedding of timesteps [b], [b, embedding_width]."""
        return self.time(timestep_embedding(t, self.channels))
