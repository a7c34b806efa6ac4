"""A correction at full resolution of a network that works on patches of pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nn.casting import no_autocast
from models.nn.unet import zeroed


class PixelCorrection(nn.Module):
    """Corrects an output [b, c, h, w] pixel by pixel, given what the network saw; the correction starts at zero.

    With ``patch`` above 1 all pixels of a patch come from one position of the U-Net, so errors of neighbouring
    positions show as a grid. Three 3x3 convolutions see across its borders. Near the data x_t says more of a pixel than
    the output does, near the noise nothing, so the timestep scales and shifts the features, as in a ResBlock.

    Args:
        seen: Channels of what the network saw.
        channels: Channels between the convolutions.
        outputs: Channels of the output.
        embedding_width: Width of the timestep embedding.
    """

    def __init__(self, seen: int, channels: int, outputs: int, embedding_width: int):
        super().__init__()
        self.conv_in = nn.Conv2d(seen + outputs, channels, 3, padding=1)
        self.conv_middle = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = zeroed(nn.Conv2d(channels, outputs, 3, padding=1))
        self.scale_shift = zeroed(nn.Linear(embedding_width, 4 * channels))

    def forward(self, output: Tensor, seen: Tensor, embedding: Tensor) -> Tensor:
        """Corrects ``output``, given [b, seen, h, w] and a timestep embedding [b, embedding_width]."""
        with no_autocast(output):  # bf16 would round the least noise in x_t away
            first, second = self.scale_shift(F.silu(embedding.float()))[:, :, None, None].chunk(2, dim=1)
            hidden = modulated(self.conv_in(torch.cat([seen, output], dim=1)), first)
            hidden = modulated(self.conv_middle(F.silu(hidden)), second)
            return output + self.conv_out(F.silu(hidden))


def modulated(hidden: Tensor, scale_shift: Tensor) -> Tensor:
    """Scales and shifts channels by [b, 2 c, 1, 1]."""
    scale, shift = scale_shift.chunk(2, dim=1)
    return hidden * (1 + scale) + shift
