"""Trains a decoder of another architecture, puts it in the place of a project's, draws, and saves the whole.

python examples/another_decoder.py [CONFIG] [SAMPLES]
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

import unclip
from unclip.architectures import (
    KINDS,
    Decoder,
    DecoderConfig,
    DecoderTask,
    Kind,
    preset_config,
    timestep_embedding,
)


class Blocks(nn.Module):
    """Residual 5x5 blocks at one resolution, in the place of the U-Net and called as it is."""

    def __init__(self, inputs: int, outputs: int, width: int, depth: int, embedding_width: int):
        super().__init__()
        self.embedding_width = embedding_width
        self.time = nn.Linear(embedding_width, embedding_width)
        self.conv_in = nn.Conv2d(inputs, width, 1)
        self.spread = nn.ModuleList(nn.Conv2d(width, width, 5, padding=2, groups=width) for _ in range(depth))
        self.shift = nn.ModuleList(nn.Linear(embedding_width, width) for _ in range(depth))
        self.mix = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, width), nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1)
            )
            for _ in range(depth)
        )
        self.conv_out = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor, t: Tensor, added: Tensor, context: Tensor, shown: Tensor, layout: Tensor) -> Tensor:
        """Returns the output for patches [b, inputs, h, w]; of the conditions it takes ``added`` alone."""
        embedding = F.silu(self.time(timestep_embedding(t, self.embedding_width)) + added)
        hidden = self.conv_in(x)
        for spread, shift, mix in zip(self.spread, self.shift, self.mix, strict=True):
            hidden = hidden + mix(spread(hidden) + shift(embedding)[:, :, None, None])
        return self.conv_out(hidden).float()


class BlockDecoder(Decoder):
    """The decoder with that network; conditions, loss and sampling stay."""

    def __init__(self, config: DecoderConfig, embed_dim: int):
        super().__init__(config, embed_dim)
        area = config.patch**2
        self.unet = Blocks(3 * area, 6 * area, 2 * config.channels, 3, self.unet.embedding_width)  # type: ignore[assignment]


class BlockDecoderTask(DecoderTask):
    """The decoder's task with that model."""

    def begun(self) -> BlockDecoder:
        return BlockDecoder(self.config, self.embed_dim)


# With this line it can be saved and loaded, wherever it has run.
KINDS["block_decoder"] = Kind(BlockDecoder, DecoderConfig, ("embed_dim",))

if __name__ == "__main__":
    config, samples = (*sys.argv[1:], *["configs/nano.yaml", "256"][len(sys.argv) - 1 :])
    project = unclip.open(config)
    project.run()
    own_text = {"text_encoder": "glide", "context_width": 0, "text_width": 48, "text_depth": 1, "text_heads": 2}
    sizes = replace(preset_config("nano").decoder.model, **own_text)
    task = BlockDecoderTask(sizes, project.artifact("clip").model().embed_dim)
    data = project.pairs("train", embeddings=True).tensors(side=task.image_size)
    decoder, journal = unclip.train("decoder", data, preset="nano", task=task, samples=int(samples))
    print(f"loss {journal[0]['loss']:.3f} -> {journal[-1]['loss']:.3f}")

    model = project.model().replace(decoder=decoder)
    to = Path("out/examples")
    model.save(to / "block-decoder")
    again = unclip.load(to / "block-decoder")
    again.generate("a square yellow monster", size=64).save(to / "monster-by-another-decoder.png")
