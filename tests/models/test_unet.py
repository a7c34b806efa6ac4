import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from models.nn.embedding import timestep_embedding
from models.nn.unet import Attention, UNet
from tests.models.small_models import normal, randomised


def attentive() -> UNet:
    unet = UNet(
        4, 5, channels=12, depth=1, multipliers=(1, 2, 3), attention_levels=frozenset({1}), head_channels=12,
        context_width=7,
    )  # fmt: skip
    return randomised(unet)


@pytest.mark.parametrize("width", [32, 33])
def test_the_timestep_embedding_equals_diffusers(width: int) -> None:
    t = torch.tensor([0.0, 1.0, 17.5, 999.0])
    expected = get_timestep_embedding(t, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, width), expected, atol=1e-6, rtol=0)
    assert torch.equal(timestep_embedding(t[[0, 1, 3]].long(), width), timestep_embedding(t[[0, 1, 3]], width))


def test_it_starts_as_zero_and_has_attention_only_where_asked() -> None:
    plain = UNet(3, 3, channels=8, depth=1, multipliers=(1, 2))
    assert not any(isinstance(module, Attention) for module in plain.modules())
    with torch.no_grad():
        assert (plain(normal(1, 3, 8, 8), torch.tensor([5])) == 0).all()
    attending = [name for name, module in attentive().named_modules() if isinstance(module, Attention)]
    assert len(attending) == 1 + 1 + 2  # level 1 going down, the middle, and level 1 coming up


@pytest.mark.parametrize("size", [(4, 4), (12, 20), (32, 8)])
def test_any_size_that_can_be_halved_works(size: tuple[int, int]) -> None:
    unet = attentive()
    with torch.no_grad():
        assert unet(normal(1, 4, *size), torch.tensor([0]), None, normal(1, 2, 7)).shape == (1, 5, *size)


def test_a_size_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4 pixels a side, got 8 x 6"):
        attentive()(normal(1, 4, 8, 6), torch.tensor([0]), None, normal(1, 2, 7))


def test_the_first_layer_sees_all_of_the_least_noise_under_autocast() -> None:
    """At t = 0 of the cosine schedule its deviation is 0.0064; bf16 has steps of up to 0.0039 below 1, a fifth of it
    and more once rounded."""
    unet, seen = attentive(), []
    unet.conv_in.register_forward_hook(lambda module, given, made: seen.append((given[0], made)))
    x = 0.9 + 0.0064 * normal(2, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        unet(x, torch.zeros(2, dtype=torch.int64), context=normal(2, 3, 7))
    (given, made) = seen[0]
    assert given.dtype == made.dtype == torch.float32
    assert torch.equal(given, x)


def test_the_last_layer_is_fp32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = attentive()(normal(1, 4, 8, 8), torch.tensor([0]), None, normal(1, 2, 7))
    assert out.dtype == torch.float32
