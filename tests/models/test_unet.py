import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.attention_processor import AttnAddedKVProcessor
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from models.nn.embedding import timestep_embedding
from models.nn.unet import Attention, ResBlock, UNet
from tests.models.mutations import fails_under


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The same module with all weights drawn anew, so that no zero at the start hides a branch."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attentive() -> UNet:
    unet = UNet(
        4, 5, channels=12, depth=1, multipliers=(1, 2, 3), attention_levels=frozenset({1}), head_channels=12,
        context_width=7,
    )  # fmt: skip
    return randomised(unet)


@pytest.mark.parametrize("width", [32, 33])
@fails_under((timestep_embedding, "angles.cos()", "angles.sin()"), (timestep_embedding, "/ half", "/ (half - 1)"))
def test_the_timestep_embedding_equals_diffusers(width: int) -> None:
    t = torch.tensor([0.0, 1.0, 17.5, 999.0])
    expected = get_timestep_embedding(t, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, width), expected, atol=1e-6, rtol=0)
    assert torch.equal(timestep_embedding(t[[0, 1, 3]].long(), width), timestep_embedding(t[[0, 1, 3]], width))


def convert(ours: UNet, theirs: UNet2DModel) -> None:
    """Copy our weights into the same network of diffusers, block by block."""

    def copy(source: nn.Module, target: nn.Module) -> None:
        target.load_state_dict(source.state_dict())

    def copy_block(source: ResBlock, target: nn.Module) -> None:
        copy(source.norm_in, target.norm1)
        copy(source.conv_in, target.conv1)
        copy(source.modulation, target.time_emb_proj)
        copy(source.norm_out, target.norm2)
        copy(source.conv_out, target.conv2)
        if target.conv_shortcut is not None:
            copy(source.skip, target.conv_shortcut)

    copy(ours.time[0], theirs.time_embedding.linear_1)
    copy(ours.time[2], theirs.time_embedding.linear_2)
    copy(ours.conv_in, theirs.conv_in)
    copy(ours.norm_out, theirs.conv_norm_out)
    copy(ours.conv_out, theirs.conv_out)
    down = [b for block in theirs.down_blocks for b in (*block.resnets, *(block.downsamplers or ()))]
    up = [b for block in theirs.up_blocks for b in (*block.resnets, *(block.upsamplers or ()))]
    for stages, blocks in ((ours.down, down), (ours.middle, theirs.mid_block.resnets), (ours.up, up)):
        for stage, block in zip(stages, blocks, strict=True):
            copy_block(stage.resblock, block)


@pytest.mark.parametrize("scale_shift", [True, False])
@fails_under(
    (UNet.forward, "x = torch.cat([x, skips.pop()], dim=1)", "x = torch.cat([skips.pop(), x], dim=1)"),
    (ResBlock._resized, 'mode="nearest"', 'mode="bilinear"'),
    (ResBlock.forward, "self.skip(self._resized(x)) + ", ""),
)
def test_the_network_without_attention_equals_diffusers(scale_shift: bool) -> None:
    ours = randomised(UNet(6, 3, channels=32, depth=2, multipliers=(1, 2, 3), scale_shift=scale_shift))
    theirs = UNet2DModel(
        in_channels=6,
        out_channels=3,
        block_out_channels=(32, 64, 96),
        layers_per_block=2,
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D", "UpBlock2D"),
        add_attention=False,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
        flip_sin_to_cos=True,
        freq_shift=0,
    ).eval()
    convert(ours, theirs)
    x, t = normal(2, 6, 16, 24), torch.tensor([3, 700])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs(x, t).sample, atol=1e-4, rtol=1e-4)


@fails_under(
    (Attention.forward, "x + h", "h"),
    (Attention.forward, "torch.cat([context_keys, keys], dim=2)", "torch.cat([keys, context_keys], dim=2)"),
    (Attention.forward, "self.norm(x)", "x"),
)
def test_attention_equals_diffusers() -> None:
    ours = randomised(Attention(24, head_channels=8, context_width=10))
    theirs = DiffusersAttention(
        query_dim=24,
        added_kv_proj_dim=10,
        norm_num_groups=8,  # what group_norm takes for 24 channels
        heads=3,
        dim_head=8,
        bias=True,
        residual_connection=True,
        processor=AttnAddedKVProcessor(),
    ).eval()
    for linear, names in ((ours.qkv, ("to_q", "to_k", "to_v")), (ours.context_kv, ("add_k_proj", "add_v_proj"))):
        parts = zip(names, linear.weight.chunk(len(names)), linear.bias.chunk(len(names)), strict=True)
        for name, weight, bias in parts:
            getattr(theirs, name).load_state_dict({"weight": weight, "bias": bias})
    theirs.to_out[0].load_state_dict(ours.out.state_dict())
    theirs.group_norm.load_state_dict(ours.norm.state_dict())
    x, tokens = normal(2, 24, 4, 6), normal(2, 5, 10, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, tokens), theirs(x, encoder_hidden_states=tokens), atol=1e-5, rtol=1e-5)


def test_rows_do_not_see_each_other() -> None:
    unet = attentive()
    x, t, added, context = normal(4, 4, 8, 12), torch.tensor([1, 50, 400, 999]), normal(4, 48), normal(4, 6, 7)
    with torch.no_grad():
        out = unet(x, t, added, context)
        order = torch.tensor([2, 0, 3, 1])
        permuted = unet(x[order], t[order], added[order], context[order])
        alone = unet(x[:1], t[:1], added[:1], context[:1])
    torch.testing.assert_close(permuted, out[order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone, out[:1], atol=1e-4, rtol=1e-4)


def test_the_order_of_context_tokens_does_not_matter_but_every_input_does() -> None:
    unet = attentive()
    x, t, added, context = normal(1, 4, 8, 8), torch.tensor([50]), normal(1, 48), normal(1, 6, 7)
    with torch.no_grad():
        out = unet(x, t, added, context)
        torch.testing.assert_close(unet(x, t, added, context.flip(1)), out, atol=1e-4, rtol=1e-4)
        others = [unet(x, t + 50, added, context), unet(x, t, -added, context), unet(x, t, added, 9 * context)]
    assert all((other - out).abs().max() > 1e-3 for other in others)


def test_hidden_tokens_are_as_good_as_absent() -> None:
    unet = attentive()
    x, t, context = normal(2, 4, 8, 8), torch.tensor([5, 50]), normal(2, 6, 7)
    shown = torch.tensor([[True, False, True, True, False, False]]).expand(2, -1)
    with torch.no_grad():
        out = unet(x, t, None, context, shown)
        torch.testing.assert_close(out, unet(x, t, None, context[:, [0, 2, 3]]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            unet(x, t, None, context, torch.ones_like(shown)), unet(x, t, None, context), atol=1e-5, rtol=1e-5
        )
        assert not torch.allclose(out, unet(x, t, None, 9 * context, shown), atol=1e-5)


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


@fails_under((UNet.forward, "self.conv_in(x.float())", "self.conv_in(x.bfloat16().float())"))
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
