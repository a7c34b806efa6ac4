"""Weights that are cast together are the weights, in the other precision, and learn what those would."""

from copy import deepcopy

import torch

from models.nn.casting import call_in
from models.nn.unet import ResBlock
from tests.models.small_models import normal, randomised


def test_a_block_computes_and_learns_as_one_with_half_weights() -> None:
    block = randomised(ResBlock(32, 32, 32, dropout=0.0))
    half = deepcopy(block).bfloat16()
    x, embedding = normal(2, 32, 4, 4).bfloat16(), normal(2, 32, seed=2).bfloat16()
    ours, theirs = call_in(torch.bfloat16, block, x, embedding), half(x, embedding)
    assert torch.equal(ours, theirs)
    for out in (ours, theirs):
        out.float().square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, half.get_parameter(name).grad.float()), name
